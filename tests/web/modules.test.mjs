// Container, range decoder, schedule, alphabets, plan and scaling, against what the Python package says of the same inputs:
// the file that PQMIM_CASES names, which tests/web/web_cases.py writes.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { Alphabets } from "../../web/dist/alphabets.js";
import { crc16, crc32 } from "../../web/dist/checksums.js";
import { parseContainer } from "../../web/dist/container.js";
import { gather, gridPlan } from "../../web/dist/gridPlan.js";
import { readHeader, tokenHash } from "../../web/dist/index.js";
import { PrefixReader, TokenReader } from "../../web/dist/rangeDecoder.js";
import { resize } from "../../web/dist/resize.js";
import { groupBounds, positionsOf, scheduleOf } from "../../web/dist/schedule.js";

const cases = JSON.parse(readFileSync(process.env.PQMIM_CASES, "utf8"));
const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
const hex = (data) => Buffer.from(data).toString("hex");

/** What a function returns, or the error that it throws as "name: message". */
function outcomeOf(compute) {
  try {
    return compute();
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
}

test("checksums", () => {
  for (const { data, crc16: small, crc16FromOnes, crc32: large } of cases.checksums) {
    assert.equal(crc16(bytes(data)), small);
    assert.equal(crc16(bytes(data), 0xffff), crc16FromOnes);
    assert.equal(crc32(bytes(data)), large);
    assert.equal(crc32(bytes(data).subarray(2), crc32(bytes(data).subarray(0, 2))), large);
  }
});

test("containers, good and bad ones", () => {
  assert.ok(cases.containers.length > 300);
  for (const { data, outcome } of cases.containers) {
    const got = outcomeOf(() => {
      const { payload, alpha, metadata, ...fields } = parseContainer(bytes(data));
      return { ...fields, payload: hex(payload), alpha: alpha && hex(alpha), metadata: metadata && hex(metadata) };
    });
    assert.deepEqual(got, outcome, data);
  }
});

test("the header of a file", () => {
  const { data, outcome } = cases.containers.find(({ outcome }) => outcome.alpha);
  const { width, height, modelId, level, scale, isMini, isPartial } = outcome;
  const header = { width, height, modelId, level, scale, isMini, isPartial, hasAlpha: true };
  assert.deepEqual(readHeader(bytes(data)), header);
});

test("payloads of complete files", () => {
  assert.ok(cases.payloads.length > 100);
  for (const { frequencies, numCodewords, steps, payload, outcome } of cases.payloads) {
    const got = outcomeOf(() => {
      const reader = new TokenReader(bytes(payload));
      const tokens = readAll(reader, frequencies, numCodewords, steps);
      reader.finish();
      return tokens;
    });
    assert.deepEqual(got, outcome);
  }
});

test("payloads of partial files", () => {
  assert.ok(cases.prefixes.length > 100);
  for (const { frequencies, numCodewords, steps, payload, outcome } of cases.prefixes) {
    assert.deepEqual(readAll(new PrefixReader(bytes(payload)), frequencies, numCodewords, steps), outcome);
  }
});

/** Tokens that a source gives, asked in steps of so many. */
function readAll(source, frequencies, numCodewords, steps) {
  const tokens = [];
  let row = 0;
  for (const count of steps) {
    const read = new Uint16Array(count);
    const part = Int32Array.from(frequencies.slice(row * numCodewords, (row + count) * numCodewords));
    tokens.push(...read.subarray(0, source.read(part, numCodewords, count, read)));
    row += count;
  }
  return tokens;
}

test("schedules and positions", () => {
  for (const { numSubquantizers, groupSteps, groupSizes, height, width, steps } of cases.schedules) {
    const groups = groupBounds(numSubquantizers, groupSteps.length, groupSizes);
    const got = scheduleOf(groups, groupSteps).map((step) => ({
      ...step,
      positions: Array.from(positionsOf(step, height, width)),
    }));
    assert.deepEqual(got, steps);
  }
});

test("alphabets", () => {
  for (const { sizes, channels, levels } of cases.alphabets) {
    const alphabets = new Alphabets(sizes, channels);
    assert.equal(alphabets.numLevels, levels.length);
    assert.equal(alphabets.numSubquantizers, channels.length);
    const all = channels.map((_, m) => m);
    levels.forEach(({ starts, valueStarts, numCoded, end, runs }, level) => {
      assert.deepEqual(all.map((m) => alphabets.start(level, m)), starts);
      assert.deepEqual(all.map((m) => alphabets.valueStart(level, m)), valueStarts);
      assert.equal(alphabets.numCoded(level), numCoded);
      assert.equal(alphabets.end(level), end);
      const got = alphabets.runs(level, 0, channels.length);
      assert.deepEqual(got.map(({ first, last, size }) => [size, last - first]), runs);
      assert.deepEqual(got.map(({ first }) => first), [0, ...got.slice(0, -1).map(({ last }) => last)]);
    });
  }
});

test("blocks are all tokens of a step but silent ones, in order", () => {
  for (const { sizes, channels, levels } of cases.alphabets) {
    const alphabets = new Alphabets(sizes, channels);
    for (const [level, count] of levels.flatMap((_, level) => [1, 700, 5000].map((count) => [level, count]))) {
      const got = [];
      for (const { first, last, size, begin, end } of alphabets.blocks(level, 0, channels.length, count)) {
        assert.ok((last - first) * (end - begin) * size <= 1 << 15);
        for (let m = first; m < last; m++) {
          assert.equal(size, alphabets.size(level, m));
          for (let place = begin; place < end; place++) got.push(m * count + place);
        }
      }
      const coded = channels.map((_, m) => m).filter((m) => alphabets.size(level, m) > 1);
      const wanted = coded.flatMap((m) => Array.from({ length: count }, (_, place) => m * count + place));
      assert.deepEqual(got, wanted);
    }
  }
});

test("grid plans", () => {
  for (const { height, width, window, neighbors, windows, own, seen, gathered } of cases.plans) {
    const plan = gridPlan(height, width, window);
    assert.deepEqual(Array.from(plan.neighbors), neighbors);
    const got = plan.windows.map(({ count, positions, placeOf, order, ends }) => ({
      count,
      positions: Array.from(positions),
      placeOf: Array.from(placeOf),
      order: Array.from(order),
      ends,
    }));
    assert.deepEqual(got, windows);
    const all = Int32Array.from({ length: height * width }, (_, position) => position);
    const rows = gather(Uint8Array.from(own), all, Uint8Array.from(seen), all, plan, 32);
    assert.deepEqual(Array.from(rows), gathered);
    const beyond = gather(Uint8Array.from(own), Int32Array.of(height * width), Uint8Array.from(seen), all.subarray(0, 1), plan, 32);
    assert.ok(beyond.subarray(0, 16).every((value) => value === 128)); // no row: zeros
  }
});

test("scaling gives Pillow's pixels", () => {
  for (const { rgb, width, height, toWidth, toHeight, scaled } of cases.scalings) {
    const data = new Uint8ClampedArray(width * height * 4).fill(255);
    rgb.forEach((value, i) => (data[Math.floor(i / 3) * 4 + (i % 3)] = value));
    const got = resize({ data, width, height }, toWidth, toHeight);
    assert.deepEqual([got.width, got.height], [toWidth, toHeight]);
    assert.deepEqual(
      Array.from(got.data.filter((_, i) => i % 4 < 3)),
      scaled,
    );
    assert.ok(got.data.every((value, i) => i % 4 < 3 || value === 255));
  }
});

test("the hash of tokens", async () => {
  for (const { tokens, hash } of cases.hashes) assert.equal(await tokenHash(Uint16Array.from(tokens)), hash);
});
