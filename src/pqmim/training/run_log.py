"""The log of a training run: log.csv, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.csv"


class RunLog:
    """Numbers of a run folder, appended as they come.

    Args:
        folder: of the run; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._started = time.monotonic()
        self._board = _open_board(folder)

    def add(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append to log.csv (one row per value: stage, step, seconds, name, value) and to TensorBoard."""
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["stage", "step", "seconds", "name", "value"])
            seconds = f"{time.monotonic() - self._started:.1f}"
            for name, value in values.items():
                writer.writerow([stage, step, seconds, name, f"{value:.6g}"])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()


def _open_board(folder: Path) -> SummaryWriter | None:
    """Writer of events; None where TensorBoard (an extra) is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
