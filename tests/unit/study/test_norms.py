"""`lisatune study`: norms of layers under LoRA and full fine-tuning, and outliers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
import tiny_run
from lisatune.cli import main
from lisatune.methods import Lora
from lisatune.report.norms_page import make_norms_page
from lisatune.report.page import render
from lisatune.study import study_norms
from lisatune.study.norms import describe_skew, measure_adapter
from lisatune.study.outliers import measure_outliers, outlier_share
from lisatune.train.recipe_file import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    tiny_run.write_recipe(path, tiny_run.write_model(path / "tiny"), tiny_run.write_rows(path / "rows.jsonl"))
    return path


@pytest.fixture(scope="module")
def study(folder: Path) -> dict[str, Any]:
    """A study of a tiny model with tied ends, by the command."""
    keys = ["--rank", "4", f"run.output={folder / 'tiny'}"]
    assert main(["study", "norms", str(folder / "recipe.yaml"), *keys]) == 0
    output = (folder / "tiny-norms.json").rename(folder / "norms.json")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head"])
def test_norms_of_an_adapter_are_those_of_the_product_that_is_never_formed(path: str) -> None:
    model: Any = Lora(rank=4, alpha=12, ends=True).prepare(tiny.llama())
    module = model.get_base_model().get_submodule(path)
    torch.manual_seed(0)
    for p in module.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    weight, change = module.base_layer.weight.double(), module.get_delta_weight("default").double()
    found = measure_adapter(module)
    assert found["lora_change"] == pytest.approx(float(change.square().sum()), rel=1e-5)
    assert found["lora_weight"] == pytest.approx(float((weight + change).square().sum()), rel=1e-5)
    raw = sum(float(p.double().square().sum()) for p in module.parameters() if p.requires_grad)
    assert found["raw"] == pytest.approx(raw, rel=1e-5)


def test_the_file_says_what_the_formulas_say(study: dict[str, Any]) -> None:
    blocks = [path for path, _ in study["layers"]]
    assert blocks == [f"model.layers.{i}" for i in range(tiny_run.BLOCKS)]
    norms = study["norms"]
    expected = [norms["lora_change"][path] / norms["full_change"][path] for path in blocks]
    assert study["probabilities"] == pytest.approx(expected)
    mean = sum(expected) / len(expected)
    ratio = norms["lora_change"]["head"] / norms["full_change"]["head"]
    assert study["ends"]["head"] == pytest.approx(ratio / mean)
    assert norms["full_weight"]["embedding"] == norms["full_weight"]["head"], "one matrix"
    assert norms["lora_change"]["embedding"] != norms["lora_change"]["head"], "two adapters"
    assert all(norms[key][path] > 0 for key in norms for path in blocks)
    assert (study["steps"], study["measured_steps"]) == (4, 4)


def test_the_raw_norms_before_training_are_pefts_initialisation(study: dict[str, Any]) -> None:
    hidden, rank = 16, 4
    first = study["initial_raw"]
    assert first["embedding"] == pytest.approx(math.sqrt(hidden * rank), rel=0.3)
    assert first["model.layers.0"] == pytest.approx(math.sqrt(7 * rank / 3), rel=0.3)
    said = " ".join(describe_skew(study))
    assert f"was {first['embedding'] / (sum(first[p] for p, _ in study['layers']) / 4):.3g} times" in said
    assert "Embedding and head are one matrix" in said


def test_the_page_shows_each_quantity_of_each_layer(study: dict[str, Any]) -> None:
    page = make_norms_page(study)
    assert len(page.overview.rows) == tiny_run.BLOCKS + 2
    html = render(page)
    assert html.count("<svg") == len(page.figures) == 8
    assert "‖W_t - W_0‖" in html


def test_the_sampler_weight_norm_trains_with_the_file(folder: Path, study: dict[str, Any]) -> None:
    keys = ["run.steps=40", "method.sampler=weight-norm", f"method.sampler_file={folder / 'norms.json'}"]
    code = main(["train", str(folder / "recipe.yaml"), *keys, f"run.output={folder / 'drawn'}"])
    assert code == 0
    assert "weight-norm" in (folder / "drawn" / "recipe.yaml").read_text()


def test_a_study_of_modules_and_fewer_measurements(folder: Path) -> None:
    found = study_norms(load_recipe(folder / "recipe.yaml"), rank=2, every=3, unit="module")
    assert len(found["probabilities"]) == 7 * tiny_run.BLOCKS
    assert found["measured_steps"] == 2


def test_outliers_are_counted_and_trained_with(folder: Path) -> None:
    recipe, output = str(folder / "recipe.yaml"), folder / "outliers.json"
    assert main(["study", "outliers", recipe, "--threshold", "3", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert len(found["probabilities"]) == tiny_run.BLOCKS
    assert all(p > 0 for p in found["probabilities"])
    keys = ["run.steps=40", "method.sampler=outlier", f"method.sampler_file={output}"]
    keys.append(f"run.output={folder / 'outliers'}")
    assert main(["train", recipe, *keys]) == 0


def test_a_study_stands_beside_run_output(folder: Path) -> None:
    keys = [str(folder / "recipe.yaml"), f"run.output={folder / 'other'}/", "--threshold", "3"]
    assert main(["study", "outliers", *keys]) == 0
    assert (folder / "other-outliers.json").is_file()


def test_an_outlier_is_an_entry_far_above_the_mean_of_its_layer() -> None:
    weight = torch.ones(10, 10)
    weight[0, 0] = -100
    assert outlier_share(weight, torch.ones(10), 13) == pytest.approx(0.01)
    norms = torch.ones(10)
    norms[3] = 200
    assert outlier_share(torch.ones(10, 10), norms, 9) == pytest.approx(0.1)
    assert outlier_share(torch.ones(10, 10), torch.ones(10), 13) == 0


def test_outliers_of_gpt2_are_found_in_its_transposed_weights() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)).eval()
    path = "transformer.h.0.mlp.c_fc"
    with torch.no_grad():
        model.get_submodule(path).weight.fill_(1)[3, 5] = 1000
    shares = measure_outliers(model, [path], [torch.arange(8)[None]], 13)
    assert shares == {path: pytest.approx(1 / (16 * 64))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["norms", "--every", "0"], "--every must be >= 1, got 0"),
        (["norms", "--lora-lr", "0"], "--lora-lr must be a positive number, got 0.0"),
        (["norms", "--rank", "0"], "--rank must be >= 1, got 0"),
        (["norms", "--output", "x.txt"], "--output x.txt must be a file that ends in .json"),
        (["outliers", "--rows", "0"], "--rows must be >= 1"),
        (["outliers", "--threshold", "1e9"], "is 1e+09 times the mean of its layer"),
        (["norms", "optimizer.lr=1e-30"], "full fine-tuning has not changed embedding"),
    ],
)
def test_what_cannot_be_studied_is_one_sentence(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", arguments[0], str(folder / "recipe.yaml"), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
