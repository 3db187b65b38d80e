"""Options: what is out of range is refused with its name, before any network is there."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from pqmim.options import (
    DEFAULT_EFFORT,
    MAX_EFFORT,
    Device,
    EncodeOptions,
    Fill,
    FillOptions,
    Region,
    Tune,
)


def test_defaults() -> None:
    options = EncodeOptions()
    assert (options.effort, options.tune, options.keep, options.scale) == (DEFAULT_EFFORT, Tune.PSNR, 1.0, None)
    assert not options.strict
    assert FillOptions() == FillOptions(Fill.LIKELY, 0, 1.0, None)
    assert MAX_EFFORT == 3
    assert options.max_seconds == math.inf


def test_names_are_values() -> None:
    assert [str(value) for kind in (Device, Tune, Fill) for value in kind] == [
        *("auto", "cpu", "cuda"),
        *("psnr", "ms-ssim", "vivid"),
        *("likely", "sample", "none"),
    ]


@pytest.mark.parametrize("effort", [0, MAX_EFFORT + 1, -1])
def test_effort_is_checked(effort: int) -> None:
    with pytest.raises(ValueError, match=f"effort must be 1 to {MAX_EFFORT}, not {effort}"):
        EncodeOptions(effort=effort)


def test_tune_vivid_looks_at_pictures() -> None:
    assert [EncodeOptions(tune=Tune.VIVID, effort=effort).effort for effort in (2, 3)] == [2, 3]
    with pytest.raises(ValueError, match="tune vivid needs effort 2 or 3"):
        EncodeOptions(tune=Tune.VIVID, effort=1)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_keep_is_checked(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be above 0"):
        EncodeOptions(keep=keep)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 3},
        {"scale": 0},
        {"effort": 9},
        {"keep": 0.0},
        {"keep": 1.5},
        {"keep": float("nan")},
        {"tune": "no tune"},
    ],
)
def test_options_are_checked(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="|".join(arguments)):
        EncodeOptions(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"num_steps": 0},
        {"fill": "no seed"},
    ],
)
def test_fill_options_are_checked(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"seed|temperature|steps"):
        FillOptions(**arguments)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_of_regions_are_checked(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Region(0, 0, 1, 1, weight)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 1)])
def test_sizes_of_regions_are_checked(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 x 1"):
        Region(0, 0, *size)


def test_regions_of_a_smaller_picture_cover_what_they_did() -> None:
    regions = (Region(15, -3, 2, 4, 3.0), Region(8, 16, 8, 8))
    assert tuple(region.scaled_down(1) for region in regions) == regions
    assert tuple(region.scaled_down(2) for region in regions) == (Region(7, -2, 2, 3, 3.0), Region(4, 8, 4, 4))


def test_options_are_there_in_no_time() -> None:
    """A command that only parses its arguments imports neither NumPy nor a network."""
    code = "import sys, pqmim.options; sys.exit(bool({'numpy', 'onnxruntime', 'PIL'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2] / "src")
