"""Where what belongs to tokens lies in flat arrays (`pqmim.alphabets`), for tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqmim.alphabets import Alphabets


class TokenPlaces(nn.Module):
    """Finds codewords and their values by tokens; has no weights, but follows its module from device to device.

    Args:
        alphabets: of the tokens.

    Attributes:
        boundaries: (M + 1,) int64, columns where the channels of each sub-quantizer begin, and the end of the last.
    """

    boundaries: Tensor
    _starts: Tensor
    _value_starts: Tensor
    _of_column: Tensor
    _place_in_run: Tensor

    def __init__(self, alphabets: Alphabets) -> None:
        super().__init__()
        channels = torch.from_numpy(alphabets.channels.copy())
        boundaries = torch.cat([channels.new_zeros(1), channels.cumsum(0)])
        of_column = torch.arange(len(channels)).repeat_interleave(channels)
        for name, places in {
            "boundaries": boundaries,
            "_starts": torch.from_numpy(alphabets.starts.copy()),
            "_value_starts": torch.from_numpy(alphabets.value_starts.copy()),
            "_of_column": of_column,
            "_place_in_run": torch.arange(len(of_column)) - boundaries[of_column],
        }.items():
            self.register_buffer(name, places, persistent=False)

    def codewords(self, tokens: Tensor, level: Tensor, first: int = 0) -> Tensor:
        """Places among codewords of tokens (B, m, h, w) of the sub-quantizers from `first` on, at levels (B,)."""
        return self._starts[level, first : first + tokens.shape[1]][..., None, None] + tokens

    def values(self, tokens: Tensor, level: Tensor, first: int = 0) -> Tensor:
        """Places among values of the same tokens: (B, D, h, w) int64 for the D columns of these sub-quantizers."""
        own = slice(first, first + tokens.shape[1])
        channels = self.boundaries.diff()[own, None, None]
        starts = self._value_starts[level, own][..., None, None] + tokens * channels
        columns = slice(int(self.boundaries[own.start]), int(self.boundaries[own.stop]))
        return starts[:, self._of_column[columns] - first] + self._place_in_run[columns, None, None]

    def by_column(self, mask: Tensor, first: int = 0) -> Tensor:
        """What is said of each sub-quantizer from `first` on, (B, m, h, w), said of each of its columns."""
        columns = slice(int(self.boundaries[first]), int(self.boundaries[first + mask.shape[1]]))
        return mask[:, self._of_column[columns] - first]
