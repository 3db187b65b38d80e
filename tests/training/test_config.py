"""Recipes: what is read, what is refused, and with which words."""

import importlib
import sys
from pathlib import Path

import pytest

import pqmim.training
from pqmim.config import (
    AutoencoderConfig,
    EntropyModelConfig,
    QualityRange,
    QuantizerConfig,
    TokenizerConfig,
)
from pqmim.errors import ConfigError, MissingExtraError
from pqmim.training.recipes import (
    AnalysisTraining,
    Config,
    DecoderTraining,
    EntropyTraining,
    TokenizerTraining,
    load_config,
)

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "data: {path: photos}\nrun: {output: runs/x}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_shipped_recipes_load() -> None:
    found = sorted(RECIPES.rglob("*.yaml"))
    assert any(path.parent.name == "photo" for path in found)
    parts: dict[str, type[Config]] = {
        "tokenizer": TokenizerTraining,
        "entropy": EntropyTraining,
        "analysis": AnalysisTraining,
    }
    for path in found:
        load_config(parts.get(path.stem, DecoderTraining), path)


def test_defaults_and_overrides(recipe: Path) -> None:
    overrides = ["run.seed=3", "transform.learning_rate=1e-4", "run.seed=4", "run.max_minutes=null"]
    config = load_config(TokenizerTraining, recipe, overrides)
    assert config.run.seed == 4  # the last one wins
    assert config.transform.learning_rate == 1e-4
    assert config.run.max_minutes is None
    assert config.data.path == Path("photos")
    assert config.model == TokenizerConfig()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.sed=3", "run.sed"),
        ("transform.learning_rate=-1", "transform.learning_rate"),
        ("transform.steps=many", "transform.steps"),
        ("data.crop=40", "data.crop"),
        ("model.quantizer.num_codewords=1", "model.quantizer: num_codewords must be at least 2"),
        ("model.quantizer.codewords=1", "model.quantizer.codewords"),
        ("run=5", "run"),
        ("run.seed=[", "recipe.yaml"),
    ],
)
def test_bad_settings_are_named(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TokenizerTraining, recipe, [override])
    assert words in str(caught.value)
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "\tx", "- 1\n- 2\n", "run: {output: ${nowhere}}\n", ""])
def test_bad_files_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(TokenizerTraining, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "photo.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError):
        load_config(TokenizerTraining, path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(TokenizerTraining, tmp_path / "none.yaml")


def test_sizes_that_the_exact_model_cannot_hold_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="1040"):
        EntropyModelConfig(width=512, mlp_ratio=4)
    with pytest.raises(ValueError, match="multiple"):
        EntropyModelConfig(width=200)
    with pytest.raises(ValueError, match="1040"):
        TokenizerConfig(
            autoencoder=AutoencoderConfig(latent_channels=768),
            quantizer=QuantizerConfig(num_subquantizers=267),
        )


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        AutoencoderConfig().latent_channels = 3  # type: ignore[misc]


def test_quality_is_log_linear_in_w() -> None:
    quality = QualityRange(w_at_0=40, w_at_100=0.4)
    assert quality.w(0) == 40
    assert quality.w(100) == pytest.approx(0.4)
    assert quality.w(50) == pytest.approx(4)
    assert quality.w(62.5) > quality.w(62.6)
    for bad in (-0.1, 100.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 100"):
            quality.w(bad)


@pytest.mark.parametrize("package", ["torch", "onnx", "pydantic", "omegaconf"])
def test_training_without_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; run: pip install 'pqmim\[train\]'"):
        importlib.reload(pqmim.training)
