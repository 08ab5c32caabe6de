"""Folders of bottleneck adapters: what is in them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tiny_run
from lisatune.cli.app import main
from lisatune.models.load import adapter_base, load_config, load_model, load_tokenizer, save_model
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run."""
    folder = tmp_path_factory.mktemp("bottleneck")
    model = tiny_run.write_model(folder / "tiny")
    rows = tiny_run.write_rows(folder / "rows.jsonl")
    recipe = tiny_run.write_recipe(folder, model, rows, "method: {name: bottleneck, size: 4}\n")
    train(load_recipe(recipe, ["optimizer.lr=1e-2"]))
    return folder / "run" / "model"


def test_a_folder_holds_what_trained_and_names_its_model(folder: Path) -> None:
    assert json.loads((folder / "bottleneck.json").read_text())["size"] == 4
    assert adapter_base(str(folder)) == (str(folder.parent.parent / "tiny"), None)
    with safe_open(folder / "bottleneck.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len(names) == tiny_run.BLOCKS * (2 * 4 + 2)
    assert all(".bottleneck." in name or "layernorm" in name for name in names)
    assert not (folder / "model.safetensors").exists()


def test_a_loaded_model_is_saved_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder))
    save_model(model, load_tokenizer(str(folder)), tmp_path / "again")
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(load_model(str(tmp_path / "again"))(ids).logits, model(ids).logits)


def test_a_run_answers_with_its_adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder.parent), "--prompt", "Count to 3.", "--max-new-tokens", "4"]) in (
        0,
        None,
    )


def test_what_would_need_merged_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="bottleneck adapters, which cannot be merged into weights"):
        load_config(str(folder))


def damage(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_folder_that_lost_a_file_or_was_cut_off_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = damage(folder, tmp_path)
    weights = copy / "bottleneck.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="are damaged"):
        load_model(str(copy))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no bottleneck.safetensors"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layers", ["model.layers.9.mlp.down_proj"], "no layer model.layers.9"),
        ("size", 5, "is not as in the"),
    ],
)
def test_adapters_of_another_model_are_refused(
    folder: Path, tmp_path: Path, key: str, value: object, said: str
) -> None:
    copy = damage(folder, tmp_path)
    settings = json.loads((copy / "bottleneck.json").read_text())
    (copy / "bottleneck.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(ValueError, match=said):
        load_model(str(copy))
