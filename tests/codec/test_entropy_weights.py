"""Weights that break the argument of exactness are refused, whoever made the file."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from exact_model import ALPHABETS, CONFIG, SIZES, exact_tensors, model_file
from numpy.typing import NDArray

from pqmim.alphabets import Alphabets
from pqmim.entropy_weights import check_entropy_weights
from pqmim.errors import ModelError
from pqmim.exact_entropy import ExactEntropyModel
from pqmim.fixed_point import (
    EXPONENTIAL_ONE,
    MAX_INNER,
    POSITION_BIAS_MAX,
    SCALE_MAX,
    TOKEN_BIAS_MAX,
    bias_room,
)
from pqmim.model_files import ShippedModel, load_model, shipped_models
from pqmim.runtime import Workers

Array = NDArray[np.generic]


def check(**changed: Array) -> None:
    """Check the weights of the formula model with others in the place of some."""
    tensors = {f"entropy.{name}": tensor for name, tensor in (exact_tensors() | changed).items()}
    check_entropy_weights(tensors, CONFIG, ALPHABETS)


def filled(name: str, value: float) -> Array:
    return np.full_like(exact_tensors()[name], value)


def test_good_weights_are_accepted() -> None:
    check()


@pytest.mark.parametrize("model", shipped_models(), ids=lambda model: model.name)
def test_shipped_weights_are_within_bounds(model: ShippedModel) -> None:
    ExactEntropyModel(load_model(model.path), Workers(1), kernel="numpy")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.feed_forward.expand.weight", lambda t: np.full_like(t, -128)),
        ("token_values", lambda t: np.full_like(t, -128)),
        ("token_factors.weight", lambda t: np.full_like(t, -128)),
        ("layers.0.feed_forward.expand.bias", lambda t: t + (1 << 24)),
        ("embed.0.bias", lambda t: t - (1 << 24)),
        ("embed.1.scale", lambda t: t * np.float32(np.nan)),
        ("head.scale", lambda t: t * np.float32(np.inf)),
        ("token_factors.scale", lambda t: -t),
        ("layers.0.attention.position_bias", lambda t: t + (1 << 20)),
        ("layers.6.feed_forward.expand.bias", lambda t: t + (1 << 24)),
        ("layers.4.attention.sink", lambda t: t - (1 << 20)),
        ("static_frequencies", lambda t: t - t.min()),
        ("static_frequencies", lambda t: t + 1),
        ("static_frequencies", lambda t: np.roll(t, 1)),  # across sub-quantizers
        ("token_bias", lambda t: t - (1 << 22)),
        ("score_table", lambda t: t * 2),
        ("score_table", lambda t: t * 0),
        ("logit_table", lambda t: t - 1),
        ("logit_table", lambda t: t + EXPONENTIAL_ONE),
    ],
)
def test_weights_out_of_bounds_are_refused(name: str, change: Callable[[Array], Array]) -> None:
    tensor = change(exact_tensors()[name])
    with pytest.raises(ModelError, match=rf"weights of {name} are out of bounds"):
        check(**{name: tensor})
    model = replace(model_file(), tensors=model_file().tensors | {f"entropy.{name}": tensor})
    with pytest.raises(ModelError, match=name):
        ExactEntropyModel(model, Workers(1))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("embed.2.weight", -127, 127),
        ("embed.0.bias", -bias_room(2 + 2 + 3), bias_room(2 + 2 + 3)),
        ("head.bias", -bias_room(CONFIG.width), bias_room(CONFIG.width)),
        ("layers.2.feed_forward.project.scale", 0, SCALE_MAX),
        ("layers.2.attention.position_bias", -POSITION_BIAS_MAX, POSITION_BIAS_MAX),
        ("layers.2.attention.sink", -POSITION_BIAS_MAX, POSITION_BIAS_MAX),
        ("token_bias", -TOKEN_BIAS_MAX, TOKEN_BIAS_MAX),
        ("score_table", 1, 127),
        ("logit_table", 1, EXPONENTIAL_ONE),
    ],
)
def test_the_bounds_themselves_are_allowed_and_no_step_more(name: str, least: float, most: float) -> None:
    dtype = exact_tensors()[name].dtype
    for bound, sign in ((least, -1), (most, 1)):
        check(**{name: filled(name, bound)})
        beyond = np.nextafter(np.float32(bound), np.float32(sign * np.inf)) if dtype == np.float32 else bound + sign
        if dtype == np.int8 and sign > 0:
            continue  # there are no larger ones
        changed = filled(name, bound)
        changed.flat[0] = beyond  # a table begins above zero
        with pytest.raises(ModelError, match=name):
            check(**{name: changed})


def test_missing_weights_are_named() -> None:
    for name in exact_tensors():
        tensors = {f"entropy.{key}": tensor for key, tensor in exact_tensors().items() if key != name}
        with pytest.raises(ModelError, match=f"weights lack {name} as"):
            check_entropy_weights(tensors, CONFIG, ALPHABETS)


def test_weights_of_another_type_or_shape_are_named() -> None:
    weight = exact_tensors()["head.weight"]
    for wrong in (weight.astype(np.int32), weight[:-1], weight.T, weight[None], weight[:0]):
        with pytest.raises(ModelError, match=r"weights lack head.weight as int8 \(30, 96\)"):
            check(**{"head.weight": wrong})
    bias = exact_tensors()["token_bias"]
    count = sum(map(sum, SIZES))
    with pytest.raises(ModelError, match=rf"token_bias as int32 \({count},\)"):  # as many as the alphabets have
        check(token_bias=np.concatenate([bias, bias]))
    for name in ("token_values", "token_factors.weight", "token_bias", "static_frequencies"):
        for wrong in (exact_tensors()[name][:-1], exact_tensors()[name][:0]):
            with pytest.raises(ModelError, match=f"weights lack {name} as"):
                check(**{name: wrong})


def test_weights_of_other_alphabets_are_refused() -> None:
    """Also of as many codewords: the values of a codeword are as many as its sub-quantizer has channels."""
    tensors = {f"entropy.{name}": tensor for name, tensor in exact_tensors().items()}
    for sizes in (ALPHABETS.sizes + 1, ALPHABETS.sizes[:2], ALPHABETS.sizes[:, ::-1]):
        with pytest.raises(ModelError, match="weights lack token_values as"):
            check_entropy_weights(tensors, CONFIG, Alphabets(sizes, ALPHABETS.channels))
    swapped = Alphabets(ALPHABETS.sizes[:, [1, 0, 2, 3, 4]], ALPHABETS.channels)  # of one channel, both
    with pytest.raises(ModelError, match="weights of static_frequencies are out of bounds"):
        check_entropy_weights(tensors, CONFIG, swapped)


def test_inner_dimensions_that_could_be_inexact_are_refused() -> None:
    channels = ALPHABETS.channels.copy()
    channels[0] = MAX_INNER - 5  # one less with the other channel, the flags of two tokens and of the three levels
    alphabets = Alphabets(ALPHABETS.sizes, channels)
    tensors = {f"entropy.{name}": tensor for name, tensor in exact_tensors().items()}
    tensors["entropy.token_values"] = np.zeros(alphabets.num_values, np.int8)
    with pytest.raises(ModelError, match=r"inner dimension 1041 of embed\.0 is above 1040"):
        check_entropy_weights(tensors, CONFIG, alphabets)
