"""How near files come to a size that was asked for, and what the search costs.

    python benchmarks/target_size.py DATASET -o OUT [-m MODEL] [--images N] [--bpp 0.05 ...] [--bytes 400 ...]

Encodes every image to every target and counts encodings (passes of `PictureEncoder.encode`) and seconds, these against
one plain encoding of the image at quality 50. Exit code 1 if a file is above its target: that must never happen.

Writes OUT/target_size.json and .md, and OUT/measurements.jsonl as it goes; run again, it continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from measurements import Bench, Photo, Row, make_parser, mean, number, read_photos, table, write
from rich.progress import track

from pqmim import bitstream
from pqmim.encoder import EncodedTokens, PictureEncoder
from pqmim.rate_control import TOLERANCE


@contextmanager
def counted_encodings() -> Iterator[list[float]]:
    """List that grows by the trade-off of every encoding while it is open."""
    trade_offs: list[float] = []
    encode = PictureEncoder.encode

    def counted(self: PictureEncoder, w: float, num_bytes: float | None = None) -> EncodedTokens:
        trade_offs.append(w)
        return encode(self, w, num_bytes)

    PictureEncoder.encode = counted  # type: ignore[method-assign]
    try:
        yield trade_offs
    finally:
        PictureEncoder.encode = encode  # type: ignore[method-assign]


def measure(bench: Bench, photo: Photo, target: dict[str, Any]) -> Row:
    """Encode one image to one target.

    Args:
        target: `target_bytes` or `target_bpp` of `Codec.encode`.
    """
    with counted_encodings() as trade_offs:
        data, seconds = bench.timed(lambda: bench.codec.encode(photo.pixels, **target))
    container = bitstream.parse(data)
    limit = target.get("target_bytes") or max(1, int(target["target_bpp"] * photo.num_pixels / 8))
    return {
        **target,
        "limit": limit,
        "bytes": len(data),
        "ratio": len(data) / limit,
        "encodings": len(trade_offs),
        "seconds": seconds,
        "scale": container.scale,
        "is_partial": container.is_partial,
    }


def measure_plain(bench: Bench, photo: Photo) -> Row:
    """Encode one image once."""
    data, seconds = bench.timed(lambda: bench.codec.encode(photo.pixels))
    return {"bytes": len(data), "seconds": seconds}


def report(rows: dict[str, list[Row]], plain: list[Row]) -> str:
    """Table of the targets and table of the images."""
    plain_seconds = sum(row["seconds"] for row in plain)
    lines = []
    for name, of in rows.items():
        ratios = [row["ratio"] for row in of]
        near = sum(1 - TOLERANCE <= ratio <= 1 for ratio in ratios)
        lines.append(
            [
                name,
                number(mean(of, "ratio"), ".2%"),
                f"{min(ratios):.2%}",
                f"{near} of {len(of)}",
                str(sum(ratio > 1 for ratio in ratios)),
                f"{mean(of, 'encodings'):.2f} ({max(row['encodings'] for row in of)})",
                f"{sum(row['seconds'] for row in of) / plain_seconds:.2f}",
                str(sum(row["scale"] > 1 for row in of)),
                str(sum(row["is_partial"] for row in of)),
            ]
        )
    header = ["target", "mean size / target", "smallest", f"within {TOLERANCE:.0%} below", "above"]
    header += ["encodings, mean (most)", "time / plain encoding", "scaled down", "cut"]
    by_image = [
        [first["image"], *(f"{of[index]['ratio']:.2%}" for of in rows.values())] for index, first in enumerate(plain)
    ]
    return table(header, lines) + "\n" + table(["size / target", *rows], by_image)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--bpp", type=float, nargs="*", default=[0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--bytes", type=int, nargs="*", default=[400, 1000, 5000, 20000])
    options = parser.parse_args(arguments)
    if not options.bpp and not options.bytes:
        parser.error("there must be a target")

    targets: dict[str, dict[str, Any]] = {f"{bpp:g} bpp": {"target_bpp": bpp} for bpp in options.bpp}
    targets |= {f"{number:,} B": {"target_bytes": number} for number in options.bytes}
    bench = Bench(options.model, options.output, options.device, options.decoder)
    rows: dict[str, list[Row]] = {name: [] for name in targets}
    plain: list[Row] = []
    for photo in track(read_photos(options.dataset, options.images), "target size"):
        plain.append(bench.row(photo, "plain", partial(measure_plain, bench, photo)))
        for name, target in targets.items():
            rows[name].append(bench.row(photo, name, partial(measure, bench, photo, target)))
    write(options.output, "target_size", {"plain": plain, "targets": rows}, report(rows, plain))
    return int(any(row["ratio"] > 1 for of in rows.values() for row in of))


if __name__ == "__main__":
    sys.exit(main())
