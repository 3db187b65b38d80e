"""The shape of a model: sizes of its networks, schedule, range of rates. Plain data, as model files hold it."""

from __future__ import annotations

import math
import types
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from pqmim.alphabets import MAX_CODEWORDS
from pqmim.fixed_point import MAX_INNER
from pqmim.schedule import Schedule

STRIDE = 16
"""Pixels per side of a position."""
MAX_LEVELS = 64
"""Most levels of a model: what a file has room for."""


def _check(
    name: str, value: float, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """Refuse a number that is out of range."""
    if not (least <= value <= most and value > above and math.isfinite(value)):
        lower = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise ValueError(f"{name} must be {lower}" + (f" and at most {most:g}" if most < math.inf else ""))


class Shape:
    """Base of the settings below: immutable, and strict about what it is read from."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # for recipes, which pydantic reads

    @classmethod
    def from_dict(cls, settings: object) -> Self:
        """Read what `as_dict` gave, after JSON.

        Raises:
            ValueError: a setting is unknown, missing, of the wrong type or out of range; the message names it.
        """
        return _read(cls, settings, "")  # type: ignore[no-any-return]

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of numbers, tuples and None, each number of its setting's type."""
        values = asdict(self)  # type: ignore[call-overload]  # all that derive from this class are data classes
        return asdict(self.from_dict(values))  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class TransformConfig(Shape):
    """One transform, analysis or synthesis.

    Attributes:
        latent_channels: D, channels of the latent.
        channels: width of the convolutional path at strides 4, 8 and 16.
        blocks: residual blocks at strides 4, 8 and 16.
        latent_unit: grey levels (of 255) of an orthonormal basis function that make one unit of the latent.
    """

    latent_channels: int = 256
    channels: tuple[int, int, int] = (64, 128, 192)
    blocks: tuple[int, int, int] = (1, 1, 2)
    latent_unit: float = 20.0

    def __post_init__(self) -> None:
        _check("latent_channels", self.latent_channels, 1)
        for size in self.channels:
            _check("channels", size, 1)
        for size in self.blocks:
            _check("blocks", size, 0)
        _check("latent_unit", self.latent_unit, above=0)

    @property
    def margin(self) -> int:
        """Positions beyond which no input matters to an output: two 3 x 3 convolutions a block, and one more at stride
        4."""
        n4, n8, n16 = self.blocks
        return math.ceil(2 * n16 + 2 * n8 / 2 + (2 * n4 + 1) / 4 + 1)


@dataclass(frozen=True)
class SynthesisConfig(TransformConfig):
    """A synthesis transform.

    Attributes:
        integer_blocks: True = the convolutions of its residual blocks multiply 8-bit integers.
    """

    integer_blocks: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """As of every shape, but None is left out: the ids of decoders that were made without it stay."""
        values = super().as_dict()
        if self.integer_blocks is None:
            del values["integer_blocks"]
        return values


@dataclass(frozen=True)
class AutoencoderConfig(Shape):
    """Analysis and synthesis that are trained together.

    Attributes:
        latent_channels: D, channels of the latent.
        channels: width of the convolutional path at strides 4, 8 and 16.
        blocks: residual blocks at strides 4, 8 and 16.
        synthesis_channels: width of the synthesis where it differs from that of the analysis; None = `channels`.
        synthesis_blocks: residual blocks of the synthesis where they differ; None = `blocks`.
        latent_unit: grey levels (of 255) of an orthonormal basis function that make one unit of the latent.
        integer_blocks: of the synthesis, see `SynthesisConfig`.
    """

    latent_channels: int = 256
    channels: tuple[int, int, int] = (64, 128, 192)
    blocks: tuple[int, int, int] = (1, 1, 2)
    synthesis_channels: tuple[int, int, int] | None = None
    synthesis_blocks: tuple[int, int, int] | None = None
    latent_unit: float = 20.0
    integer_blocks: bool | None = None

    def __post_init__(self) -> None:
        assert self.analysis.latent_channels == self.synthesis.latent_channels  # each checks its own sizes

    @property
    def analysis(self) -> TransformConfig:
        """The analysis alone."""
        return TransformConfig(self.latent_channels, self.channels, self.blocks, self.latent_unit)

    @property
    def synthesis(self) -> SynthesisConfig:
        """The synthesis alone."""
        channels, blocks = self.synthesis_channels or self.channels, self.synthesis_blocks or self.blocks
        return SynthesisConfig(self.latent_channels, channels, blocks, self.latent_unit, self.integer_blocks)

    @classmethod
    def of(cls, analysis: TransformConfig, synthesis: SynthesisConfig) -> Self:
        """The two together.

        Raises:
            ValueError: they have another latent.
        """
        pair = cls(
            analysis.latent_channels,
            analysis.channels,
            analysis.blocks,
            None if synthesis.channels == analysis.channels else synthesis.channels,
            None if synthesis.blocks == analysis.blocks else synthesis.blocks,
            analysis.latent_unit,
            synthesis.integer_blocks,
        )
        if pair.synthesis != synthesis:
            raise ValueError("analysis and synthesis have another latent")
        return pair


@dataclass(frozen=True)
class QuantizerConfig(Shape):
    """Product quantizer.

    Attributes:
        num_subquantizers: M.
        num_codewords: K, most codewords of a sub-quantizer; each level has as many as it needs.
        num_levels: L, trade-offs between rate and distortion that have codebooks and static priors of their own.
        min_channel_rate: channels that cost fewer bits per position than this are dropped and decoded as their mean.
    """

    num_subquantizers: int = 32
    num_codewords: int = 256
    num_levels: int = 6
    min_channel_rate: float = 0.002

    def __post_init__(self) -> None:
        _check("num_subquantizers", self.num_subquantizers, 1)
        _check("num_codewords", self.num_codewords, 2, MAX_CODEWORDS)
        _check("num_levels", self.num_levels, 1, MAX_LEVELS)


@dataclass(frozen=True)
class TokenizerConfig(Shape):
    """A tokenizer in training: transforms and quantizer."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    quantizer: QuantizerConfig = QuantizerConfig()

    def __post_init__(self) -> None:
        _check_channels(self.autoencoder.latent_channels, self.quantizer)


@dataclass(frozen=True)
class TokensConfig(Shape):
    """What makes tokens of a picture: analysis and quantizer."""

    analysis: TransformConfig = TransformConfig()
    quantizer: QuantizerConfig = QuantizerConfig()

    def __post_init__(self) -> None:
        _check_channels(self.analysis.latent_channels, self.quantizer)


def _check_channels(latent_channels: int, sizes: QuantizerConfig) -> None:
    """Each sub-quantizer has a channel; the first layer of the entropy model sees all channels, and a flag for each
    sub-quantizer and level."""
    if sizes.num_subquantizers > latent_channels:
        raise ValueError(f"num_subquantizers must be at most latent_channels, {latent_channels}")
    if latent_channels + sizes.num_subquantizers + sizes.num_levels > MAX_INNER:
        raise ValueError(f"latent_channels + num_subquantizers + num_levels must be at most {MAX_INNER}")


@dataclass(frozen=True)
class EntropyModelConfig(Shape):
    """The masked transformer.

    Its layers are numbered through: those of the first group of sub-quantizers, then those of each later group.

    Attributes:
        width: channels of the residual stream; a multiple of `head_width` and of 16.
        num_layers: transformer layers of the first group.
        later_layers: those of each later group.
        attention_every: layers 0, n, 2n, ... of a group have attention; the others mix neighbors by shifted channels
            alone.
        head_width: channels of an attention head.
        mlp_ratio: hidden channels of the feed-forward part, in widths.
        window: side of the attention windows, positions, a multiple of 4; every other attention is shifted by half.
        token_rank: inner dimension between a head output and the factors of the codewords.
        group_steps: groups of sub-quantizers in the schedule, and the steps of each (`schedule.Schedule`).
        group_sizes: sub-quantizers of each group but the last, which has the rest; None = dealt evenly.
    """

    width: int = 192
    num_layers: int = 5
    later_layers: int = 2
    attention_every: int = 2
    head_width: int = 32
    mlp_ratio: int = 4
    window: int = 8
    token_rank: int = 24
    group_steps: tuple[int, ...] = (5, 2, 1)
    group_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("width", "num_layers", "later_layers", "attention_every", "head_width", "mlp_ratio", "window")
        for name in (*sizes, "token_rank"):
            _check(name, getattr(self, name), 1)
        if self.width % self.head_width or self.width % 16:
            raise ValueError("width must be a multiple of head_width and of 16")
        if self.window % 4:
            raise ValueError("window must be a multiple of 4")
        if max(self.width * self.mlp_ratio, self.window**2, self.token_rank) > MAX_INNER:
            raise ValueError(f"width * mlp_ratio, window^2 and token_rank must be at most {MAX_INNER}")
        if self.group_sizes is not None and len(self.group_sizes) != len(self.group_steps) - 1:
            raise ValueError("group_sizes must name all groups of group_steps but the last")

    def schedule(self, num_subquantizers: int) -> Schedule:
        """The steps in which the tokens of M sub-quantizers are coded.

        Raises:
            ValueError: more groups than sub-quantizers, or groups without any.
        """
        return Schedule(num_subquantizers, self.group_steps, self.group_sizes)

    @property
    def total_layers(self) -> int:
        """Layers of all groups."""
        return self.num_layers + self.later_layers * (len(self.group_steps) - 1)

    def layers_of(self, group: int) -> range:
        """Numbers of the layers of a group."""
        first = self.num_layers + self.later_layers * (group - 1)
        return range(first, first + self.later_layers) if group else range(self.num_layers)

    def has_attention(self, layer: int) -> bool:
        """Whether a layer attends."""
        return self._place(layer)[1] % self.attention_every == 0

    def is_shifted(self, layer: int) -> bool:
        """Whether the windows of a layer's attention are shifted by half."""
        group, index = self._place(layer)
        return (index // self.attention_every + group) % 2 == 1

    def is_last(self, layer: int) -> bool:
        """Whether it is the last layer of its group, whose feed-forward part sees its own position alone."""
        group, index = self._place(layer)
        return index == len(self.layers_of(group)) - 1

    def _place(self, layer: int) -> tuple[int, int]:
        """Group of a layer, and its number there."""
        if layer < self.num_layers:
            return 0, layer
        group, index = divmod(layer - self.num_layers, self.later_layers)
        return group + 1, index


@dataclass(frozen=True)
class QualityRange(Shape):
    """What quality 0 and 100 mean; between them the logarithm of the w that is asked for is linear in quality.

    Attributes:
        w_at_0: squared latent units per bit at quality 0.
        w_at_100: the same at quality 100.
    """

    w_at_0: float = 30.0
    w_at_100: float = 0.3

    def __post_init__(self) -> None:
        _check("w_at_0", self.w_at_0, above=0)
        _check("w_at_100", self.w_at_100, above=0)

    def w(self, quality: float) -> float:
        """Squared latent units per bit at a quality in [0, 100].

        Raises:
            ValueError: quality is outside.
        """
        if not 0 <= quality <= 100:
            raise ValueError(f"quality must be 0 to 100, not {quality:g}")
        return float(self.w_at_0 * (self.w_at_100 / self.w_at_0) ** (quality / 100))


@dataclass(frozen=True)
class ModelConfig(Shape):
    """A token model."""

    tokenizer: TokensConfig
    entropy: EntropyModelConfig
    quality: QualityRange

    def __post_init__(self) -> None:
        self.entropy.schedule(self.tokenizer.quantizer.num_subquantizers)


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value of type `kind` from what JSON gives; `name` is for the message."""
    if isinstance(kind, type) and issubclass(kind, Shape):
        if not isinstance(value, dict):
            raise ValueError(f"{name or kind.__name__} must be settings by name")
        types_of = get_type_hints(kind)
        known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
        prefix = name + "." if name else ""
        if unknown := sorted(map(str, value.keys() - known.keys())):
            raise ValueError(f"{prefix}{unknown[0]} is not a known setting")
        # A default of None belongs to a setting that earlier models were made without.
        missing = [field for field in known.values() if field.name not in value and field.default is not None]
        if missing:
            raise ValueError(f"{prefix}{missing[0].name} is missing")
        return kind(**{key: _read(types_of[key], entry, prefix + key) for key, entry in value.items()})
    if get_origin(kind) in (Union, types.UnionType):  # with None
        return None if value is None else _read(get_args(kind)[0], value, name)
    if get_origin(kind) is tuple:
        wanted = get_args(kind)
        if isinstance(value, list | tuple) and (wanted[-1] is ... or len(value) == len(wanted)):
            return tuple(_read(wanted[0], entry, name) for entry in value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, bool) and type(value) is kind:
        return value
    raise ValueError(f"{name} is of the wrong type")
