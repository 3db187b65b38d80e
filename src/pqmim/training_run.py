"""What the training loops share: steps, learning-rate schedule, EMA, logs, checkpoints, exact resume.

A loop is one call of `Stage.fit`. Everything random in a step is drawn from generators seeded with (seed, step), so a
run that was interrupted and resumed follows the curve of one that was not.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pqmim.codec import resolve_device
from pqmim.config import RunConfig, StageConfig
from pqmim.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"


class TimeIsUp(Exception):
    """`run.max_minutes` is over; the checkpoint is written and `--resume auto` goes on."""


def _open_board(folder: Path) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def learning_rate_factor(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate`; 1 at its height."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    floor = stage.final_learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class TrainingRun:
    """One run folder: clock, log and checkpoint of a sequence of stages.

    Attributes:
        resumed: content of the checkpoint to go on from, or None.
        board: TensorBoard writer, or None where TensorBoard (an extra) is not installed.
    """

    config: RunConfig
    device: torch.device
    resumed: dict[str, Any] | None
    started: float
    board: SummaryWriter | None

    @classmethod
    def open(cls, config: RunConfig, resume: str | Path | None) -> TrainingRun:
        """Create or re-open the run folder.

        Args:
            resume: None = start anew (refused if the folder holds a checkpoint), "auto" = go on if there is a
                checkpoint, a path = go on from that checkpoint.

        Raises:
            OutputError: the folder cannot be written, or holds a run that would be lost.
            ConfigError: the checkpoint to resume from is missing.
        """
        own = config.output / CHECKPOINT
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{config.output}: {error.strerror}") from error
        if resume is None and own.exists():
            raise OutputError(f"{own} exists: use --resume auto to go on, or another run.output")
        source = own if resume == "auto" else Path(resume) if resume is not None else None
        resumed = None
        if source is not None and source.exists():
            resumed = torch.load(source, map_location="cpu", weights_only=True)
        elif resume not in (None, "auto"):
            raise ConfigError(f"{source}: no such checkpoint")
        return cls(config, resolve_device(config.device), resumed, time.monotonic(), _open_board(config.output))

    @property
    def out_of_time(self) -> bool:
        """Whether `max_minutes` is over."""
        limit = self.config.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def is_done(self, stage: str) -> bool:
        """Whether the checkpoint resumed from is already past `stage`."""
        return self.resumed is not None and stage in self.resumed["done"]

    def save(self, stage: str, done: Sequence[str], step: int, **states: dict[str, Any]) -> None:
        """Write the checkpoint, all or nothing."""
        temporary = self.config.output / (CHECKPOINT + ".tmp")
        torch.save({"stage": stage, "done": list(done), "step": step, **states}, temporary)
        os.replace(temporary, self.config.output / CHECKPOINT)

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append to log.csv (one row per value: stage, step, seconds, name, value) and to TensorBoard if installed."""
        path = self.config.output / "log.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["stage", "step", "seconds", "name", "value"])
            seconds = f"{time.monotonic() - self.started:.1f}"
            for name, value in values.items():
                writer.writerow([stage, step, seconds, name, f"{value:.6g}"])
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{stage}/{name}", value, step)
            self.board.flush()


def fit(
    run: TrainingRun,
    name: str,
    stage: StageConfig,
    module: nn.Module,
    parameter_groups: list[dict[str, Any]],
    *,
    losses: Callable[[int], dict[str, Tensor]],
    validate: Callable[[nn.Module, int], dict[str, float]],
    done: Sequence[str] = (),
    crops_per_step: int,
) -> None:
    """Train `module` for `stage.steps` steps and leave the EMA weights in it.

    Args:
        run: run folder; if its checkpoint is inside this stage, training goes on from there.
        name: stage name in logs and checkpoint.
        module: everything that is trained and averaged.
        parameter_groups: optimizer groups; `lr` in each is a multiple of `stage.learning_rate`.
        losses: step -> named terms; "loss" is minimized, the others are logged.
        validate: (EMA copy of the module, step) -> named numbers for the log.
        done: stages finished before this one, recorded in the checkpoint.

    Raises:
        TimeIsUp: `max_minutes` is over; a checkpoint was written.
    """
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(stage.ema_decay), use_buffers=True)
    groups = [{**group, "lr": group.get("lr", 1.0) * stage.learning_rate} for group in parameter_groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    base_rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first = 0
    if run.resumed is not None and run.resumed["stage"] == name and not run.is_done(name):
        module.load_state_dict(run.resumed["module"])
        ema.load_state_dict(run.resumed["ema"])
        optimizer.load_state_dict(run.resumed["optimizer"])
        first = run.resumed["step"]

    def save(step: int, finished: bool = False) -> None:
        run.save(
            name,
            [*done, name] if finished else done,
            step,
            module=module.state_dict(),
            ema=ema.state_dict(),
            optimizer=optimizer.state_dict(),
        )

    last_save = time.monotonic()
    window_start, window_steps = time.monotonic(), 0
    sums: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty()
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task(name, total=stage.steps, completed=first)
        for step in range(first, stage.steps):
            factor = learning_rate_factor(stage, step)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            torch.manual_seed(run.config.seed * 1_000_003 + step)  # all noise of this step
            terms = losses(step)
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
            if torch.isfinite(norm):  # one bad batch must not end a run of hours
                optimizer.step()
                if step == stage.warmup_steps:  # forget the untrained start
                    ema.n_averaged.zero_()
                ema.update_parameters(module)
            window_steps += 1
            for key, value in {**terms, "gradient_norm": norm}.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            progress.advance(task)
            completed = step + 1
            if completed % stage.log_every == 0 or completed == stage.steps:
                elapsed = time.monotonic() - window_start
                row = {key: value / window_steps for key, value in sums.items()}
                row["crops_per_second"] = window_steps * crops_per_step / elapsed
                run.log(name, completed, row)
                if quiet:
                    print(name, completed, *(f"{k}={v:.4g}" for k, v in row.items()), file=sys.stderr, flush=True)
                window_start, window_steps, sums = time.monotonic(), 0, {}
            if completed % stage.validate_every == 0 or completed == stage.steps:
                averaged = ema.module.eval()
                with torch.no_grad():
                    row = {f"validation/{k}": v for k, v in validate(averaged, completed).items()}
                run.log(name, completed, row)
                if quiet:
                    print(name, completed, *(f"{k}={v:.4g}" for k, v in row.items()), file=sys.stderr, flush=True)
            if run.out_of_time:
                save(completed)
                raise TimeIsUp(f"{run.config.output}: stopped after {completed} of {stage.steps} steps")
            if time.monotonic() - last_save > 60 * run.config.checkpoint_minutes:
                save(completed)
                last_save = time.monotonic()
    module.load_state_dict(ema.module.state_dict())
    save(stage.steps, finished=True)
