"""Train a whole model in the minutes that one GPU is lent for: `recipes/one_gpu.sh DATA MINUTES OUT`.

Stages share the minutes; each stage's learning rate follows its own share, whatever the machine's speed. A run may be
cut into calls: what a call did not finish, the next one goes on with, from the checkpoint or, on another machine, from
its half-precision copy in OUT. How much time each stage has had is in its checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pqmim.errors import PqmimError
from pqmim.model_files import SUFFIX
from pqmim.training import train_decoder, train_entropy_model, train_tokenizer
from pqmim.training.recipes import DecoderTraining, EntropyTraining, TokenizerTraining, load_config
from pqmim.training.training_run import TimeIsUp

RECIPES = Path("recipes/one_gpu")
COPIES = "checkpoints"
"""Folder in OUT for copies of checkpoints."""
FINISHED = "model"
"""Folder in OUT for the token model and its decoders, as `--model` takes it."""
TOKENIZER_FILE = "tokenizer.safetensors"


@dataclass(frozen=True)
class Part:
    """A network that is trained by a recipe of its own.

    Attributes:
        name: of the recipe's file and of the run folder.
        shares: stage -> share of the minutes.
    """

    name: str
    shares: dict[str, float]


PARTS = (
    Part("tokenizer", {"transform": 0.35}),
    Part("entropy", {"stage": 0.27}),
    Part("fine", {"distortion": 0.15}),
    Part("fast", {"distortion": 0.05}),
    Part("vivid", {"perceptual": 0.06, "adversarial": 0.08}),
)
"""In the order of training. What is left of the minutes is for photos, codebooks, validation and files."""


class OneGpu:
    """All parts of a model, one after another, within a number of minutes.

    Args:
        data: photos.
        minutes: of training in all, over all calls.
        output: run folders, copies of checkpoints, finished files.
        recipes: folder with a recipe for each of `PARTS`.
        max_file_mb: most megabytes of a file of a copy.
        call_minutes: of this call; None = no limit.
        changes: `a.b=c` for every recipe.
    """

    def __init__(
        self,
        data: Path,
        minutes: float,
        output: Path,
        *,
        recipes: Path,
        max_file_mb: float = 16.0,
        call_minutes: float | None = None,
        changes: tuple[str, ...] = (),
    ) -> None:
        self._started = time.monotonic()
        self._minutes, self._output, self._recipes = minutes, output, recipes
        self._call_minutes = call_minutes
        self._changes = [
            f"data.path={data}",
            f"run.copies={output / COPIES}",
            f"run.copies_mb={max_file_mb}",
            *changes,
        ]

    def train(self) -> Path:
        """Go on with what is not finished; returns the folder of the finished token model and its decoders.

        Raises:
            PqmimError: unusable data, recipes or folder.
            TimeIsUp: this call's minutes are over.
        """
        files = [self._train(part) for part in PARTS]
        folder = self._output / FINISHED
        folder.mkdir(exist_ok=True)
        for part, file in zip(PARTS, files, strict=True):
            if part.name != "tokenizer":
                shutil.copyfile(file, folder / file.name)
        return folder

    def _train(self, part: Part) -> Path:
        """Train one part to its end, or find that it is there; returns its file."""
        recipe, folder = self._recipes / f"{part.name}.yaml", self._output / part.name
        changes = [*self._changes, f"run.output={folder}"]
        changes += [f"{stage}.minutes={share * self._minutes:.4g}" for stage, share in part.shares.items()]
        if self._call_minutes is not None:
            left = self._call_minutes - (time.monotonic() - self._started) / 60
            if left <= 0:
                raise TimeIsUp(f"{self._output}: stopped before {part.name}")
            changes.append(f"run.max_minutes={left:.4g}")
        tokenizer = self._output / "tokenizer" / TOKENIZER_FILE
        if part.name == "tokenizer":
            return train_tokenizer.train(load_config(TokenizerTraining, recipe, changes), resume="auto")
        if part.name == "entropy":
            changes.append(f"tokenizer={tokenizer}")
            return train_entropy_model.train(load_config(EntropyTraining, recipe, changes), resume="auto")
        start = self._output / "fine" / f"fine{SUFFIX}" if part.name == "vivid" else tokenizer
        changes += [f"token_model={self._output / 'entropy'}", f"start_from={start}"]
        return train_decoder.train(load_config(DecoderTraining, recipe, changes), resume="auto")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="one_gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of photos or tar shards")
    parser.add_argument("minutes", type=float, help="of training in all, all calls together")
    parser.add_argument("output", type=Path, help="folder for runs, copies of checkpoints, finished files")
    parser.add_argument("--max-file-mb", type=float, default=16.0, metavar="N", help="of each file of a copy (16)")
    parser.add_argument("--call-minutes", type=float, metavar="N", help="end this call after so many minutes")
    parser.add_argument("--recipes", type=Path, default=RECIPES, metavar="FOLDER")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change a setting of all recipes")
    options = parser.parse_args(arguments)
    if not (options.minutes > 0 and options.max_file_mb > 0):
        parser.error("minutes and --max-file-mb must be above 0")
    job = OneGpu(
        options.data,
        options.minutes,
        options.output,
        recipes=options.recipes,
        max_file_mb=options.max_file_mb,
        call_minutes=options.call_minutes,
        changes=tuple(options.set),
    )
    try:
        print(job.train())
    except TimeIsUp as stop:
        print(f"{stop}; the same command goes on")
    except PqmimError as error:
        print(f"one_gpu.sh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
