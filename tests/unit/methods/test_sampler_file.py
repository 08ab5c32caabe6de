"""Probabilities from files, and the keys of a recipe that name them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from lisatune import find_layers
from lisatune.lisa import LISA
from lisatune.lisa.samplers import Weighted
from lisatune.methods import Lisa
from lisatune.methods.sampler_file import describe_layers, read_sampler_file
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

CHANCES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def attach(**options: Any) -> LISA:
    model = tiny.llama()
    method, layers = Lisa(**options), find_layers(model)
    optimizer = method.build_optimizer(model, layers, OptimizerConfig(lr=1e-3))
    return method.attach(model, optimizer, layers, total_steps=2000)


def study(path: Path, name: str = "norms", blocks: int = 6, hidden: int = 32) -> Path:
    """A file as `lisatune study` writes it."""
    model = tiny.llama(blocks=blocks, hidden=hidden)
    layers = find_layers(model)
    sizes = [sum(p.numel() for p in block.values()) for block in layers.block_parameters(model)]
    content = {"study": name, "model": "tiny", "layers": describe_layers(layers.blocks, sizes)}
    path.write_text(json.dumps(content | {"probabilities": CHANCES[:blocks]}))
    return path


@pytest.mark.parametrize("kind", ["list", "dict", "safetensors", "study"])
def test_a_file_gives_the_chance_of_each_block(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("p.safetensors" if kind == "safetensors" else "p.json")
    if kind == "safetensors":
        save_file({"probabilities": torch.tensor(CHANCES)}, path)
    elif kind == "study":
        study(path)
    else:
        path.write_text(json.dumps(CHANCES if kind == "list" else {"probabilities": CHANCES}))
    lisa = attach(sampler="file", sampler_file=str(path))
    assert lisa.sampler == Weighted(tuple(CHANCES), 2)


@pytest.mark.parametrize(("sampler", "name"), [("weight-norm", "norms"), ("outlier", "outliers")])
def test_a_study_gives_the_chances_of_its_sampler(sampler: str, name: str, tmp_path: Path) -> None:
    path = study(tmp_path / "p.json", name)
    assert attach(sampler=sampler, sampler_file=str(path)).sampler == Weighted(tuple(CHANCES), 2)


def test_units_have_a_chance_each(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([1.0] * 42))
    lisa = attach(sampler="file", sampler_file=str(path), unit="module")
    assert lisa.sampler.num_blocks == 42


@pytest.mark.parametrize(
    ("sampler", "content", "message"),
    [
        ("file", "[1, 2", "is neither JSON nor .safetensors"),
        ("file", '{"p": [1]}', "must have a list of numbers >= 0.*got None"),
        ("file", "[1, -2]", "numbers >= 0"),
        ("file", "[0, 0]", "not all 0"),
        ("file", '[1, "a"]', "must have a list of numbers"),
        ("file", "[NaN]", "numbers >= 0"),
        ("weight-norm", "[1, 2]", "was made by no study, and method.sampler weight-norm reads that of"),
        ("outlier", '{"study": "norms", "probabilities": [1]}', "was made by lisatune study norms"),
    ],
)
def test_a_file_that_is_not_one_of_the_sampler_is_refused_as_the_recipe_is_read(
    sampler: str, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe(
            model=ModelConfig(name="x"),
            data=DataConfig(train="x"),
            method=Lisa(sampler=sampler, sampler_file=str(path)),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(),
            run=RunConfig(),
        )


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged"):
        read_sampler_file(path, "file")


def test_a_missing_file_is_refused_with_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*; lisatune study norms RECIPE writes"):
        read_sampler_file(tmp_path / "p.json", "weight-norm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 4}, "has 4 probabilities, measured on tiny, and this model has 6 blocks"),
        (
            {"blocks": 4, "unit": "module"},
            "has 4 probabilities, .* has 42 modules; make a file for this model with --unit module",
        ),
        ({"hidden": 64}, "was measured on tiny, whose model.layers.0 has"),
    ],
)
def test_the_file_of_another_model_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    unit = options.pop("unit", "block")
    path = study(tmp_path / "p.json", **options)
    with pytest.raises(ValueError, match=message):
        attach(sampler="weight-norm", sampler_file=str(path), unit=unit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "weight-norm"}, "needs method.sampler_file, which lisatune study norms writes"),
        ({"sampler": "file"}, "method.sampler file needs method.sampler_file"),
        ({"sampler": "misa", "sampler_file": "x"}, "sampler_file does nothing with method.sampler misa"),
        ({"sampler": "window", "unit": "module"}, "window draws neighbouring blocks"),
    ],
)
def test_keys_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lisa(**options)


def test_compiling_modules_is_refused_as_the_recipe_is_read() -> None:
    with pytest.raises(ValueError, match=r"run\.compile builds graphs of whole blocks"):
        Lisa(unit="module").check_mix(DataConfig(train="x"), RunConfig(compile=True))
