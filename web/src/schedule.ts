/** The order in which tokens are coded: quincunx in space, crossed with groups of sub-quantizers. */

/** Tokens coded together: sub-quantizers `first` to `last` at quincunx steps `begin` to `end`, both exclusive. */
export interface Step {
  readonly group: number;
  readonly first: number;
  readonly last: number;
  readonly begin: number;
  readonly end: number;
}

const QUINCUNX = [
  [4, 2, 4, 0],
  [3, 4, 3, 4],
  [4, 1, 4, 2],
  [3, 4, 3, 4],
];
export const NUM_QUINCUNX_STEPS = 5;

/** Quincunx step of a position; its coordinates may be negative. */
export function quincunxStep(y: number, x: number): number {
  return QUINCUNX[y & 3][x & 3];
}

/**
 * First and last (exclusive) sub-quantizer of each group, in order.
 *
 * @param groupSizes sub-quantizers of each group but the last; null = dealt out evenly.
 */
export function groupBounds(
  numSubquantizers: number,
  numGroups: number,
  groupSizes: readonly number[] | null,
): [number, number][] {
  const bound = (group: number) => {
    if (groupSizes === null) return Math.floor((numSubquantizers * group) / numGroups);
    return group === numGroups ? numSubquantizers : groupSizes.slice(0, group).reduce((sum, size) => sum + size, 0);
  };
  return Array.from({ length: numGroups }, (_, group) => [bound(group), bound(group + 1)]);
}

/**
 * All steps in coding order.
 *
 * @param groups first and last (exclusive) sub-quantizer of each.
 * @param groupSteps steps of each group, 1 to 5; with fewer than five, the first quincunx steps are coded together.
 */
export function scheduleOf(groups: readonly (readonly [number, number])[], groupSteps: readonly number[]): Step[] {
  return groups.flatMap(([first, last], group) => {
    const merged = NUM_QUINCUNX_STEPS - groupSteps[group];
    return Array.from({ length: groupSteps[group] }, (_, index) => ({
      group,
      first,
      last,
      begin: index === 0 ? 0 : merged + index,
      end: merged + index + 1,
    }));
  });
}

/** Positions of a step, as indices into the flattened height x width grid in raster order; there may be none. */
export function positionsOf(step: Step, height: number, width: number): Int32Array {
  const positions: number[] = [];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const quincunx = quincunxStep(y, x);
      if (quincunx >= step.begin && quincunx < step.end) positions.push(y * width + x);
    }
  }
  return Int32Array.from(positions);
}
