"""Weights that break the argument of exactness are refused, whoever made the file."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from exact_model import CONFIG, NUM_CODEWORDS, RUNS, exact_tensors, model_file
from numpy.typing import NDArray

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
    check_entropy_weights(tensors, CONFIG, RUNS, NUM_CODEWORDS)


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
        ("first_frequencies", lambda t: t - t.min(-1, keepdims=True)),
        ("first_frequencies", lambda t: t + 1),
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
        ("embed.0.bias", -bias_room(1 + 1 + 3), bias_room(1 + 1 + 3)),
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
            check_entropy_weights(tensors, CONFIG, RUNS, NUM_CODEWORDS)


def test_weights_of_another_type_or_shape_are_named() -> None:
    weight = exact_tensors()["head.weight"]
    for wrong in (weight.astype(np.int32), weight[:-1], weight.T, weight[None], weight[:0]):
        with pytest.raises(ModelError, match=r"weights lack head.weight as int8 \(30, 96\)"):
            check(**{"head.weight": wrong})
    bias = exact_tensors()["token_bias"]
    with pytest.raises(ModelError, match=r"token_bias as int32 \(3, 5, 24\)"):  # as many levels as token_values
        check(token_bias=np.concatenate([bias, bias]))
    with pytest.raises(ModelError, match="token_values"):
        check(token_values=exact_tensors()["token_values"][:0])


def test_inner_dimensions_that_could_be_inexact_are_refused() -> None:
    num_kept = MAX_INNER - 3  # one less with the flags of a token and of the three levels
    runs = [slice(0, num_kept), *(slice(num_kept + m, num_kept + m + 1) for m in range(4))]
    tensors = {f"entropy.{name}": tensor for name, tensor in exact_tensors().items()}
    tensors["entropy.token_values"] = np.zeros((3, NUM_CODEWORDS, runs[-1].stop), np.int8)
    with pytest.raises(ModelError, match=r"inner dimension 1041 of embed\.0 is above 1040"):
        check_entropy_weights(tensors, CONFIG, runs, NUM_CODEWORDS)
