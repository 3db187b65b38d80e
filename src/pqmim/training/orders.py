"""In what order the tokens of a grid are predicted, and what is known then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pqmim.schedule import Schedule
from pqmim.training.layers import UNSEEN


@dataclass(frozen=True)
class LaterPass:
    """A pass of a later group over all positions.

    Attributes:
        known: (B or 1, m or 1, h, w) bool, which of the group's tokens are known.
        predicted: (B or 1, h, w) bool, where its output is wanted.
    """

    known: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Orders:
    """What is known when each token is predicted.

    Attributes:
        content, query: (B or 1, h, w) int64, labels of the first group's streams: see `Sight.by_labels`.
        known: (B or 1, m or 1, h, w) bool, the first group's tokens that content carries. A query carries those of its
            own position if its label is above that of the content there.
        predicted: (B or 1, h, w) bool, where the first group's tokens are predicted.
        passes: for each later group.
        is_whole: whether all tokens of a group are known to the next one; else those that its pass knew.
    """

    content: Tensor
    query: Tensor
    known: Tensor
    predicted: Tensor
    passes: tuple[tuple[LaterPass, ...], ...]
    is_whole: bool

    @classmethod
    def of_schedule(cls, schedule: Schedule, quincunx: Tensor) -> Orders:
        """The steps in which files are coded. The very first one is not predicted.

        Args:
            quincunx: (h, w) int64, step of each position.
        """
        masks = [
            [step_masks(step.begin, step.end, quincunx) for step in schedule.steps_of(group)]
            for group in range(schedule.num_groups)
        ]
        label = torch.zeros_like(quincunx)[None]
        for index, (_, here) in enumerate(masks[0]):
            label[:, here] = index
        known = torch.ones_like(label, dtype=torch.bool)[:, None]
        passes = tuple(
            tuple(LaterPass(before[None, None], here[None]) for before, here in steps) for steps in masks[1:]
        )
        return cls(label, label, known, label > 0, passes, True)

    @classmethod
    def of_known(cls, schedule: Schedule, known: Tensor) -> Orders:
        """Any set of known tokens (B, M, h, w) bool; all others are predicted."""
        groups = [known[:, slice(*schedule.group_bounds(group))] for group in range(schedule.num_groups)]
        content = torch.where(groups[0].any(1), 0, UNSEEN)
        passes = tuple((LaterPass(group, ~group.all(1)),) for group in groups[1:])
        return cls(content, torch.ones_like(content), groups[0], ~groups[0].all(1), passes, False)

    def of_samples(self, choose: Callable[[Tensor], Tensor]) -> Orders:
        """Those of some samples, if they differ between samples."""

        def chosen(mask: Tensor) -> Tensor:
            return choose(mask) if len(mask) > 1 else mask

        passes = tuple(
            tuple(LaterPass(chosen(each.known), chosen(each.predicted)) for each in passes) for passes in self.passes
        )
        content, query, known, predicted = map(chosen, (self.content, self.query, self.known, self.predicted))
        return Orders(content, query, known, predicted, passes, self.is_whole)

    def wanted(self, group: int) -> tuple[Tensor, Tensor | None]:
        """What is predicted of a group: (B or 1, h, w) bool, where; and if there are tokens in these places that are
        known, (B, m, h, w) bool, which are not."""
        if group == 0:
            predicted, known, is_partly_known = self.predicted, self.known, bool((self.query > self.content).any())
        else:
            passes = self.passes[group - 1]
            predicted = torch.stack(torch.broadcast_tensors(*(each.predicted for each in passes))).any(0)
            known, is_partly_known = passes[-1].known, not self.is_whole
        return predicted, ~known if is_partly_known else None

    @property
    def is_complete(self) -> Tensor:
        """(B or 1, h, w) bool: where the content knows all tokens of the first group."""
        return (self.content < UNSEEN) & self.known.all(1)


def step_masks(begin: int, end: int, quincunx: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (h, w) bool where a step's group is known before the quincunx steps `begin` to `end`, and where they
    are."""
    return quincunx < begin, (quincunx >= begin) & (quincunx < end)
