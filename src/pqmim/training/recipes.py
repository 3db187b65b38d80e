"""Settings of the data and the training runs; read from YAML with `a.b=c` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from pqmim.config import EntropyModelConfig, QualityRange, TokenizerConfig
from pqmim.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Config):
    """Training photos."""

    path: Path
    """Folder of images, tar shard, or folder of tar shards."""
    cache: Path | None = None
    """Folder that keeps the decoded pixels for the next start; null decodes anew."""
    crop: int = Field(256, ge=32, multiple_of=16)
    """Side of the square crops, pixels."""
    min_scale: float = Field(0.5, gt=0, le=1)
    """Photos are scaled down by a random factor in [min_scale, 1], so that crops look like larger photographs."""
    validation_photos: int = Field(64, ge=1)
    """Photos held out, evenly spread over the list and never trained on; models are chosen on them."""
    exclude: list[str] = []
    """Patterns of file names (`imagenet*`) of photos not to train on, for instance for their licence. What is held out
    stays the same, so that models with and without them can be compared."""
    stream: bool = False
    """Read tar shards all the time instead of holding all photos in memory (`streaming`)."""
    stream_lanes: int = Field(8, ge=1)
    """Streams that the shards are dealt to: at most one per shard, a multiple of the number of processes. With seed and
    batch size it fixes what is drawn."""
    stream_readers: int = Field(2, ge=0)
    """Processes that read and decode for each training process; 0 = none beside it."""
    shuffle_buffer: int = Field(200, ge=1)
    """Encoded photos that each lane holds to draw from."""


class StageConfig(Config):
    """One training loop."""

    steps: int = Field(10_000, ge=0)
    minutes: float | None = Field(None, gt=0)
    """End after so much training, all sittings together; the schedule follows the clock then, and `steps` is a bound.
    null = steps alone count."""
    batch_size: int = Field(8, ge=1)
    """Samples of a step, over all processes and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches whose gradients are added up before a step; saves memory, changes nothing else."""
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    final_learning_rate: float = Field(0.02, ge=0, le=1)
    """Share of the learning rate left at the end of the cosine."""
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    log_every: int = Field(50, ge=1)
    validate_every: int = Field(1000, ge=1)


class RunConfig(Config):
    """What every training run needs."""

    output: Path
    """Folder of the run: checkpoint, log.csv, TensorBoard events, sample pictures, weights."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bf16: bool | Literal["auto"] = "auto"
    """bfloat16 autocast in the networks; auto = where a short trial shows it to be faster."""
    compile: bool = False
    """`torch.compile` for the networks; worth its minutes of compiling on a GPU."""
    checkpoint_minutes: float = Field(3.0, gt=0)
    copies: Path | None = None
    """Folder that gets a half-precision copy of every checkpoint, without the optimizer's state; `--resume auto` goes
    on from it where the checkpoint is gone. null = none."""
    copies_mb: float = Field(16.0, gt=0)
    """Most megabytes of a file of such a copy; a larger one is cut into parts."""
    max_minutes: float | None = None
    """Write a checkpoint and stop after this long; `--resume auto` goes on. null = no limit."""


class RateRange(Config):
    """Range of the trade-off, on the scale lambda * 255^2 * MSE + bpp used by learned codecs."""

    lambda_min: float = Field(0.0004, gt=0)
    lambda_max: float = Field(0.018, gt=0)


class CodebookConfig(Config):
    """Lattices for the latents of the first stage."""

    crops: int = Field(1500, ge=1)
    """Crops whose latents the codebooks are fitted to."""
    w: float = Field(0.2, gt=0)
    """Squared latent units per bit that the finest level is made for."""


class TokenizerTraining(Config):
    """`pqmim train tokenizer`: transforms, then codebooks."""

    start_from: Path | None = None
    """`tokenizer.safetensors` or model file of an earlier run, or a decoder beside its token model, whose transforms
    are trained on (wider and deeper ones begin as the same functions); null starts anew."""
    model: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    run: RunConfig
    rate: RateRange = RateRange()
    rate_emphasis: float = Field(1.0, ge=1)
    """1 draws trade-offs evenly (in logarithms); 2 makes the coarsest twice as frequent as on average, the finest
    rare."""
    transform: StageConfig = StageConfig()
    codebooks: CodebookConfig = CodebookConfig()


class EntropyTraining(Config):
    """`pqmim train entropy`: the masked transformer on the tokens of a trained tokenizer."""

    name: str = "custom"
    """Name the finished model carries."""
    description: str = ""
    """One line shown by `pqmim models`."""
    tokenizer: Path
    """`tokenizer.safetensors` of a tokenizer run."""
    start_from: Path | None = None
    """`entropy_model_float.pt` of an earlier run, or a token model (its file or folder), whose weights are taken over
    where they fit (more layers begin as the same function); null starts anew."""
    model: EntropyModelConfig = EntropyModelConfig()
    data: DataConfig
    run: RunConfig
    stage: StageConfig = StageConfig(batch_size=16)
    quality: QualityRange = QualityRange()
    quantize_after: float = Field(0.7, ge=0, le=1)
    """Share of the steps in float; the rest simulates the integer arithmetic that codes files."""


class PerceptualConfig(Config):
    """What a decoder is trained by beside the squared error. Each term is added to sqrt(lambda * lambda_max) * MSE, the
    MSE in grey levels squared, so that the squared error has about the same say at all rates."""

    kept_layers: int = Field(2, ge=0)
    """Leading layers of the convolutional path that stay as they are, like the linear path: they read what was sent,
    and what stays takes no room in a decoder's file."""
    weight: float = Field(20.0, ge=0)
    """Of the distance of features, in the stage `perceptual`."""
    weight_with_adversary: float = Field(6.5, ge=0)
    """The same in the stage `adversarial`."""
    texture_weight: float = Field(0.0, ge=0)
    """Of the distance of textures."""
    chroma_weight: float = Field(4.0, ge=0)
    """Of the squared error of mean colors, in multiples of that of MSE."""
    pattern_weight: float = Field(40.0, ge=0)
    """Of the squared error that repeats every 16 pixels, in multiples of that of MSE, which it is a small part of."""
    excess_weight: float = Field(2.0, ge=0)
    """Of the squared excess of the amplitude of detail, in multiples of that of MSE."""
    adversary: Literal["hinge", "labels"] = "hinge"
    """How the discriminator knows what was sent (`discriminator`)."""
    adversary_weight: float = Field(5.0, ge=0)
    """Of being taken for real."""
    adversary_rate: float = Field(2.0, gt=0)
    """Learning rate of the discriminator, in multiples of the stage's."""
    adversary_delay: int = Field(200, ge=1)
    """Steps over which the weight rises from zero, while the discriminator learns."""
    labels: int = Field(1000, ge=2)
    """Kinds of content that it tells."""
    label_subquantizers: int = Field(16, ge=1)
    """Leading sub-quantizers that make a kind."""
    label_crops: int = Field(1500, ge=1)
    """Crops whose positions the kinds are found in."""


class RateDraws(Config):
    """At what trade-offs the tokens of a trained model are made for what is trained on them."""

    rate: RateRange = RateRange()
    rate_emphasis: float = Field(1.0, ge=1)
    """1 draws trade-offs evenly (in logarithms) over all that the codebooks serve; 2 makes the coarsest, which need a
    decoder's imagination most, twice as frequent as on average, the finest rare."""
    nested_share: float = Field(0.2, ge=0, le=1)
    """Share of the samples that keep only a random number of leading sub-quantizers."""


class AnalysisTraining(RateDraws):
    """`pqmim train analysis`: an analysis transform for the tokens of a finished model, whose id stays."""

    token_model: Path
    """Folder or file of the token model, whose analysis is trained on."""
    decoder: Path
    """File of the decoder that pictures are made by."""
    decoder_learns: bool = True
    """Train it, too; else it stays as it is."""
    channels: tuple[int, int, int] | None = None
    """Of the analysis, at strides 4, 8 and 16; null = as they are."""
    blocks: tuple[int, int, int] | None = None
    bits: Literal["masked", "static"] = "masked"
    """What counts as rate: bits under the masked model, or under the static priors."""
    data: DataConfig
    run: RunConfig
    stage: StageConfig = StageConfig(learning_rate=4e-4)


class DecoderTraining(RateDraws):
    """`pqmim train decoder`: a synthesis transform for the tokens of a trained model, which stay as they are."""

    name: str = "custom"
    """Name the decoder carries."""
    description: str = ""
    """One line shown by `pqmim models`."""
    token_model: Path
    """Folder or file of a token model; or `tokenizer.safetensors`, if the entropy model is still to be trained: then a
    file of that kind is written, which `python -m pqmim.training.export` makes a decoder of."""
    start_from: Path
    """The decoder that this one starts as, of at most its size: its file, or one of the above."""
    channels: tuple[int, int, int] | None = None
    """At strides 4, 8 and 16; null = as `start_from`."""
    blocks: tuple[int, int, int] | None = None
    integer_blocks: bool | None = None
    """Whether the residual blocks multiply 8-bit integers; null = as `start_from`."""
    data: DataConfig
    run: RunConfig
    distortion: StageConfig = StageConfig(steps=0, learning_rate=8e-4)
    perceptual: StageConfig = StageConfig(steps=0, learning_rate=3e-4)
    adversarial: StageConfig = StageConfig(steps=0, learning_rate=2e-4)
    terms: PerceptualConfig = PerceptualConfig()


ConfigType = TypeVar("ConfigType", bound=Config)


def load_config(kind: type[ConfigType], path: Path, overrides: Sequence[str] = ()) -> ConfigType:
    """Read a recipe.

    Args:
        kind: which settings it must hold.
        path: YAML file.
        overrides: `a.b=c` strings, later ones win; values are YAML.

    Raises:
        ConfigError: no such file, not YAML, unknown or ill-typed setting; the message names the setting.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return kind.model_validate(OmegaConf.to_container(merged, resolve=True))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {setting}: {message[0].lower()}{message[1:]}") from error
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:  # the last two: a list, no text
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
