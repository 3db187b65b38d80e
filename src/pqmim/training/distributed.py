"""Several processes that train one model together, started by `torchrun` or `accelerate launch`.

Each step has one batch, the same whatever the number of processes; each process computes its part of it, and sums of
gradients travel between them. A process alone needs nothing of this and not the package accelerate.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from pqmim.errors import ConfigError, MissingExtraError

TIMEOUT = timedelta(hours=2)
"""How long the others wait while the main process fits codebooks or validates."""
Result = TypeVar("Result")


def resolve_device(name: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device; auto takes a GPU where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Workers:
    """This process among those that train together.

    Attributes:
        device: where this process computes.
        rank: 0 to count - 1; 0 is the main process, the only one that writes.
        state: accelerate's view of the group, None for a process alone.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def join(cls, device: str) -> Workers:
        """Join the group that the launcher describes in the environment, if there is one.

        Args:
            device: "auto", "cpu" or "cuda".

        Raises:
            ConfigError: no such device.
            MissingExtraError: a launcher was used and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(resolve_device(device))
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "train") from error
        resolve_device(device)  # the same refusal as for one process
        state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
        atexit.register(state.destroy_process_group)  # its threads must not outlive the interpreter
        return cls(state.device, state.process_index, state.num_processes, state)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """The samples of a batch that are this process's: every `count`-th.

        Raises:
            ConfigError: the batch cannot be dealt evenly.
        """
        if batch_size % self.count:
            raise ConfigError(f"batch_size {batch_size} must be a multiple of the {self.count} processes")
        return slice(self.rank, None, self.count)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; all have the same tensors in the same order."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        held = list(tensors)
        total = reduce(torch.cat([tensor.flatten() for tensor in held]), "sum")  # one message, not hundreds
        for tensor, part in zip(held, total.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def from_main(self, compute: Callable[[], Result]) -> Result:
        """What the main process computes, handed to all; the others wait."""
        if self.count == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        held = [compute() if self.is_main else None]
        broadcast_object_list(held)
        result: Result = held[0]  # type: ignore[assignment]
        return result

    def main_first(self) -> AbstractContextManager[None]:
        """Run a block in the main process first, then in the others, which find what it left on disk."""
        return nullcontext() if self.state is None else self.state.main_process_first()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()
