"""What the training loops share: data, steps, learning-rate schedule, EMA, logs, checkpoints, exact resume.

A loop is one call of `fit`. Everything random in a step is drawn from generators seeded with (seed, step), so a run
that was interrupted and resumed follows the curve of one that was not, and several processes or micro-batches that
share a batch follow the curve of one that has it all.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from pqmim.errors import ConfigError, OutputError
from pqmim.training.checkpoint_copies import read_copy, write_copy
from pqmim.training.data import ALL, CropSampler, Sampler, load_photos, split_photos, validation_crops, without
from pqmim.training.distributed import Workers
from pqmim.training.recipes import DataConfig, RunConfig, StageConfig
from pqmim.training.run_log import RunLog
from pqmim.training.streaming import ShardSampler, ShardSet, StreamSettings
from pqmim.training.throughput import is_bf16_faster, peak_rate

CHECKPOINT = "checkpoint.pt"


class Draws:
    """Random numbers of one step, the same for a sample whoever computes it.

    Args:
        seed, step: what they depend on.
        batch_size: B, samples of the whole step.
        part: the samples wanted here, n of them.
        device: where the numbers are wanted.

    Attributes:
        generator: on the CPU, for numbers drawn for the whole batch and then cut down by `mine`.
        progress: share of the stage that is past, [0, 1).
    """

    def __init__(
        self, seed: int, step: int, batch_size: int, part: slice, device: torch.device, progress: float = 0.0
    ) -> None:
        self.batch_size = batch_size
        self.part = part
        self.device = device
        self.progress = progress
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self._first_sample_seed = ((seed * 1_000_003 + step) << 20) % (1 << 62)

    def mine(self, values: Tensor) -> Tensor:
        """The samples wanted here of something drawn for all: (B, ...) -> (n, ...)."""
        return values[self.part].to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """(n, *shape) float32, uniform in [0, 1)."""
        return self.mine(torch.rand(self.batch_size, *shape, generator=self.generator))

    def noise(self, *shape: int) -> Tensor:
        """The same for large shapes: a generator per sample, on the device, so that only what is wanted is drawn."""
        generator = torch.Generator(self.device)
        rows = []
        for sample in range(self.batch_size)[self.part]:
            generator.manual_seed(self._first_sample_seed + sample)
            rows.append(torch.rand(shape, generator=generator, device=self.device))
        return torch.stack(rows)


class TimeIsUp(Exception):
    """`run.max_minutes` is over; the checkpoint is written and `--resume auto` goes on."""


def stage_progress(stage: StageConfig, step: int, seconds: float) -> float:
    """Share of a stage that is past, [0, 1]: by the clock if the stage is given minutes, else by steps."""
    if step >= stage.steps:
        return 1.0
    return step / stage.steps if stage.minutes is None else min(1.0, seconds / (60 * stage.minutes))


def learning_rate_factor(stage: StageConfig, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate`; 1 at its height."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.minutes is None:
        progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    floor = stage.final_learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class TrainingRun:
    """One run folder: clock, log and checkpoint of a sequence of stages. Only the main process writes to it.

    Attributes:
        workers: the processes that train together.
        resumed: content of the checkpoint to go on from, or None.
        bf16: whether the networks compute in bfloat16.
        numbers: its log; None in processes that do not write.
    """

    config: RunConfig
    workers: Workers
    resumed: dict[str, Any] | None
    started: float
    bf16: bool
    numbers: RunLog | None

    @classmethod
    def open(cls, config: RunConfig, resume: str | Path | None) -> TrainingRun:
        """Create or re-open the run folder.

        Args:
            resume: None = start anew (refused if the folder holds a checkpoint), "auto" = go on if there is a
                checkpoint or else a copy of one, a path = go on from that checkpoint.

        Raises:
            OutputError: the folder cannot be written, or holds a run that would be lost.
            ConfigError: the checkpoint to resume from is missing.
        """
        workers = Workers.join(config.device)
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
        elif resume == "auto" and config.copies is not None:
            resumed = read_copy(config.copies, config.output.name)
        elif resume not in (None, "auto"):
            raise ConfigError(f"{source}: no such checkpoint")
        workers.wait()  # none writes before all have looked
        numbers = RunLog(config.output) if workers.is_main else None
        wanted = config.bf16
        bf16 = workers.from_main(lambda: is_bf16_faster(workers.device)) if wanted == "auto" else wanted
        return cls(config, workers, resumed, time.monotonic(), bf16, numbers)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.workers.device

    def autocast(self) -> torch.autocast:
        """Region in which networks compute in bfloat16, if they do at all."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @property
    def out_of_time(self) -> bool:
        """Whether `max_minutes` is over."""
        limit = self.config.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def is_done(self, stage: str) -> bool:
        """Whether the checkpoint resumed from is already past `stage`."""
        return self.resumed is not None and stage in self.resumed["done"]

    def save(self, stage: str, done: Sequence[str], step: int, **states: Any) -> None:
        """Write the checkpoint, all or nothing, and its copy where one is wanted."""
        if not self.workers.is_main:
            return
        state = {"stage": stage, "done": list(done), "step": step, **states}
        temporary = self.config.output / (CHECKPOINT + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.config.output / CHECKPOINT)
        if self.config.copies is not None:
            write_copy(self.config.copies, self.config.output.name, state, int(self.config.copies_mb * 1e6))

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append to the log (`RunLog.add`)."""
        if self.numbers is not None:
            self.numbers.add(stage, step, values)


@dataclass(frozen=True)
class Photos:
    """The photos of a run.

    Attributes:
        sampler: crops to train on.
        held_out: (n, 3, crop, crop) float32 in [0, 1], crops to validate on.
        facts: what a model says of the data it was made from.
    """

    sampler: Sampler
    held_out: Tensor
    facts: dict[str, Any]


def open_photos(run: TrainingRun, data: DataConfig) -> Photos:
    """Load or index the photos, and hold some out.

    Raises:
        ConfigError, MissingExtraError: unusable data or settings.
    """
    if data.stream:
        shards = ShardSet.scan(data.path)
        training_shards, validation = shards.hold_out(data.validation_photos, data.crop)
        training_shards = training_shards.without(data.exclude)
        settings = StreamSettings(
            lanes=data.stream_lanes,
            readers=data.stream_readers,
            shuffle_buffer=data.shuffle_buffer,
            crop=data.crop,
            min_scale=data.min_scale,
            seed=run.config.seed,
        )
        sampler: Sampler = ShardSampler(training_shards, settings, run.device)
        facts = {"data_hash": shards.manifest_hash, "photos": len(shards)}
    else:
        with run.workers.main_first():  # it writes the cache
            photos = load_photos(data.path, min_side=data.crop, cache=data.cache)
        training, validation = split_photos(photos.on(run.device), data.validation_photos)
        training = without(training, data.exclude)
        sampler = CropSampler(
            training, crop=data.crop, min_scale=data.min_scale, seed=run.config.seed, device=run.device
        )
        facts = {"data_hash": photos.manifest_hash, "photos": len(photos)}
    return Photos(sampler, validation_crops(validation, data.crop, run.device), facts)


def micro_batches(batch_size: int, count: int, part: slice = ALL) -> list[slice]:
    """The samples of each micro-batch of a process that has the samples `part`.

    Raises:
        ConfigError: they cannot be dealt evenly.
    """
    first, stride = part.start or 0, part.step or 1
    if batch_size % (stride * count):
        raise ConfigError(f"batch_size {batch_size} must be a multiple of accumulate x processes, {count} x {stride}")
    return [slice(first + stride * index, None, stride * count) for index in range(count)]


def fit(
    run: TrainingRun,
    name: str,
    stage: StageConfig,
    module: nn.Module,
    parameter_groups: list[dict[str, Any]],
    *,
    crops: Callable[[int, slice], Tensor],
    losses: Callable[[int, Tensor, Draws], dict[str, Tensor]],
    validate: Callable[[nn.Module, int], dict[str, float]],
    done: Sequence[str] = (),
    compiled: Sequence[nn.Module] = (),
) -> None:
    """Train `module` for `stage.steps` steps or `stage.minutes`, and leave the EMA weights in it.

    Args:
        run: run folder; if its checkpoint is inside this stage, training goes on from there.
        name: stage name in logs and checkpoint.
        module: everything that is trained and averaged.
        parameter_groups: optimizer groups; `lr` in each is a multiple of `stage.learning_rate`.
        crops: (step, part of its batch) -> (n, 3, crop, crop).
        losses: (step, some crops of its batch, random numbers for them) -> named terms; "loss" is minimized, the others
            are logged. The terms of the parts of a batch add up to those of the batch: a mean is a sum over the part,
            divided by the count in the whole batch.
        validate: (EMA copy of the module, step) -> named numbers for the log; called in the main process alone.
        done: stages finished before this one, recorded in the checkpoint.
        compiled: what `run.compile` compiles.

    Raises:
        ConfigError: the batch cannot be dealt to the processes.
        TimeIsUp: `max_minutes` is over; a checkpoint was written.
    """
    ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(stage.ema_decay), use_buffers=True)
    groups = [{**group, "lr": group.get("lr", 1.0) * stage.learning_rate} for group in parameter_groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    base_rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first, seconds = 0, 0.0
    if run.resumed is not None and run.resumed["stage"] == name and not run.is_done(name):
        module.load_state_dict(run.resumed["module"])
        if "optimizer" in run.resumed:
            ema.load_state_dict(run.resumed["ema"])
            optimizer.load_state_dict(run.resumed["optimizer"])
        else:  # a copy
            ema.module.load_state_dict(run.resumed["module"])
        first, seconds = run.resumed["step"], run.resumed.get("seconds", 0.0)
    seconds_before, started = seconds, time.monotonic()

    def save(step: int, finished: bool = False) -> None:
        run.save(
            name,
            [*done, name] if finished else done,
            step,
            seconds=seconds,
            module=module.state_dict(),
            ema=ema.state_dict(),
            optimizer=optimizer.state_dict(),
        )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty()

    def log(step: int, row: dict[str, float]) -> None:
        run.log(name, step, row)
        if quiet and run.workers.is_main:
            print(name, step, *(f"{k}={v:.4g}" for k, v in row.items()), file=sys.stderr, flush=True)

    mine = run.workers.part(stage.batch_size)
    parts = micro_batches(stage.batch_size, stage.accumulate, mine)
    progress = stage_progress(stage, first, seconds)
    if progress < 1:
        peak = peak_rate(run.device, torch.bfloat16 if run.bf16 else torch.float32)
        batch = crops(first, mine)
    operations = 0  # floating-point operations of a step in this process, counted in the first one
    sums: dict[str, Tensor] = {}
    num_summed, num_timed, timer = 0, 0, time.monotonic()
    last_save = time.monotonic()
    step = first
    with Progress(*columns, disable=quiet or not run.workers.is_main) as bar:
        task = bar.add_task(name, total=1.0, completed=0)
        while progress < 1:
            factor = learning_rate_factor(stage, step, progress)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
            terms: dict[str, Tensor] = {}
            counter = FlopCounterMode(display=False)
            with counter if step == first else nullcontext():
                for index, part in enumerate(parts):
                    draws = Draws(run.config.seed, step, stage.batch_size, part, run.device, progress)
                    shares = losses(step, batch[index :: len(parts)], draws)
                    shares["loss"].backward()
                    for key, value in shares.items():
                        terms[key] = value.detach() + terms.get(key, 0.0)
            if step + 1 < stage.steps:
                batch = crops(step + 1, mine)  # prepared while a GPU still works on this step
            # One process may be out of time before the others, and the main one has the clock, so these are summed too.
            # Which gradients exist depends on the step alone, so they are the same in all processes.
            clock = seconds_before + time.monotonic() - started if run.workers.is_main else 0.0
            times = torch.tensor([float(run.out_of_time), clock], device=run.device)
            run.workers.sum([times, *terms.values(), *(p.grad for p in parameters if p.grad is not None)])
            norm = nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
            if torch.isfinite(norm):  # one bad batch must not end a run of hours
                optimizer.step()
                if step == stage.warmup_steps:  # forget the untrained start
                    ema.n_averaged.zero_()
                ema.update_parameters(module)
            for key, value in {**terms, "gradient_norm": norm}.items():
                sums[key] = value + sums.get(key, 0.0)
            num_summed += 1
            num_timed += 1
            if step == first:
                operations = counter.get_total_flops()
                if run.config.compile:
                    for network in compiled:
                        network.compile()
                num_timed, timer = 0, time.monotonic()  # the first step is slower than the rest
            step += 1
            overtime, seconds = times.tolist()
            progress = stage_progress(stage, step, seconds)
            bar.update(task, description=f"{name}, step {step}", completed=progress)
            if step % stage.log_every == 0 or progress == 1:
                row = {key: float(value) / num_summed for key, value in sums.items()}
                if num_timed:
                    steps_per_second = num_timed / (time.monotonic() - timer)
                    row["crops_per_second"] = steps_per_second * stage.batch_size
                    row["peak_share"] = steps_per_second * operations / peak
                log(step, row)
                sums, num_summed, num_timed, timer = {}, 0, 0, time.monotonic()
            if run.workers.is_main and (step % stage.validate_every == 0 or progress == 1):
                averaged = ema.module.eval()
                with torch.no_grad():
                    log(step, {f"validation/{k}": v for k, v in validate(averaged, step).items()})
                num_timed, timer = 0, time.monotonic()
            if overtime > 0:
                save(step)
                of_steps = "" if stage.minutes else f" of {stage.steps}"
                raise TimeIsUp(f"{run.config.output}: stopped after {step}{of_steps} steps")
            if time.monotonic() - last_save > 60 * run.config.checkpoint_minutes:
                save(step)
                last_save = time.monotonic()
    module.load_state_dict(ema.module.state_dict())
    save(step, finished=True)
