"""`lisatune init` writes a recipe that loads, says what the data holds, and never replaces a file."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_run
from lisatune.cli import init as module
from lisatune.cli.app import main
from lisatune.memory import process
from lisatune.train.recipe_file import load_recipe
from tiny_text import CHATML, byte_tokenizer

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose free memory is unknown."""
    monkeypatch.setattr(process, "available_bytes", lambda device: None)


@pytest.mark.usefixtures("unplanned")
def test_the_recipe_fits_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "x" * 300, "output": "y" * 300}] * 60
    (tmp_path / "null").write_text("")
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "--data", "my rows.jsonl", "--model", "null"]) == 0
    said = capsys.readouterr().out
    assert said == "recipe.yaml: 60 records of alpaca\nnext: lisatune check recipe.yaml\n"
    assert main(["init", "--data", "my rows.jsonl", "--model", "null", "--output", "my recipe.yaml"]) == 0
    assert capsys.readouterr().out.endswith("\nnext: lisatune check 'my recipe.yaml'\n")
    recipe = load_recipe("recipe.yaml")
    assert (recipe.model.name, recipe.data.train) == ("null", "my rows.jsonl")
    assert recipe.data.max_length == 256  # of about 220 tokens
    assert (recipe.run.epochs, recipe.method.period) == (3, "auto")
    text = Path("recipe.yaml").read_text()
    assert "60 records of alpaca" in text
    assert ", a guess at 3 bytes a token: no tokenizer could be read" in text
    assert text.count("#") > 8
    assert main(["init"]) == 2
    assert "recipe.yaml already exists; name another file with --output" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == text


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("merges", "tokens"), [(None, 699), ([("x", "x"), ("y", "y")], 399)])
def test_tokens_are_those_of_the_models_tokenizer(
    merges: list[tuple[str, str]] | None, tokens: int, tmp_path: Path
) -> None:
    rows = [{"instruction": "x" * 300, "output": "y" * 300}] * 99
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_run.write_model(tmp_path / "bytes")
    byte_tokenizer(CHATML, merges=merges).save_pretrained(tmp_path / "bytes")
    assert main(["init", "--data", "rows.jsonl", "--model", "bytes"]) == 0
    assert f"99 of 100 records have fewer than about {tokens} tokens\n" in Path("recipe.yaml").read_text()
    assert load_recipe("recipe.yaml").data.max_length == -(-tokens // 64) * 64


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("instructions", "precision"), [("AVX2", "fp32"), ("AVX512", "bf16-mixed")])
def test_the_precision_is_one_in_which_this_cpu_is_fast(
    instructions: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: instructions)
    monkeypatch.setattr("lisatune.distributed.ranks.pick_device", lambda name: torch.device("cpu"))
    assert main(["init", "--model", "null"]) == 0
    assert load_recipe("recipe.yaml").run.precision == precision


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("prompt", "name", "lr"), [({"prompt": "z"}, "dpo", 1e-6), ({}, "reward", 1e-5)])
def test_pairs_of_answers_get_a_loss_of_pairs(
    prompt: dict[str, str], name: str, lr: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [prompt | {"chosen": "x" * 600, "rejected": "y" * 600}] * 20 + [{"chosen": "x"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert main(["init", "--data", "pairs.jsonl", "--model", "null"]) == 0
    assert "recipe.yaml: 20 records of pairs, 1 that cannot be used\n" in capsys.readouterr().out
    recipe = load_recipe("recipe.yaml")
    assert (recipe.loss.name, recipe.optimizer.lr) == (name, lr)
    assert recipe.data.max_length == 256  # of about 210 tokens, the longer of two answers


@pytest.mark.usefixtures("unplanned")
def test_without_data_there_is_a_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr("lisatune.models.gguf.find_smollm2", absent)
    assert main(["init", "--output", "new/mine.yaml"]) == 0
    recipe = load_recipe("new/mine.yaml")
    assert (recipe.model.name, recipe.data.train) == (module.HUB_MODEL, "rows.jsonl")


def test_the_recipe_fits_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optimizer.moments": "8bit", "run.batch_size": 2, "run.accumulation": 2}
    reasons = ("moments take a quarter of the memory", "in parts", "in parts")
    fit = SimpleNamespace(
        fits=True,
        changes=changes,
        reasons=reasons,
        plan=SimpleNamespace(needed_bytes=2**30, num_blocks=30),
    )
    monkeypatch.setattr("lisatune.memory.fit.find_fit", lambda recipe, free: fit)
    monkeypatch.setattr(process, "available_bytes", lambda device: 2**31)
    assert main(["init", "--model", "smollm2-135m"]) == 0
    assert "recipe.yaml; needs 1.00 GiB of 2.00 GiB free on " in capsys.readouterr().out
    assert "so that it fits: moments take a quarter of the memory" in Path("recipe.yaml").read_text()
    recipe = load_recipe("recipe.yaml")
    assert recipe.optimizer.moments == "8bit"
    assert (recipe.run.batch_size, recipe.run.accumulation) == (2, 2)


def test_it_says_how_many_blocks_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_run.write_model(tmp_path / "model")
    monkeypatch.setattr(process, "available_bytes", lambda device: 2**33)
    assert main(["init", "--model", str(model)]) == 0
    text = Path("recipe.yaml").read_text()
    assert "active: 2" in text
    assert "4 of 4 fit, and the more, the more it learns" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_can_be_copied(path: Path) -> None:
    assert main(["init", "--from", path.stem]) == 0
    assert Path(path.name).read_bytes() == path.read_bytes()


def test_recipes_are_in_the_wheel() -> None:
    import tomllib

    project = tomllib.loads((SHIPPED[0].parents[1] / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "lisatune/recipes"}


def test_a_wrong_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--from", "dmo"]) == 2
    assert "--from: unknown recipe 'dmo'. Did you mean 'demo'? Known: " in capsys.readouterr().err
    assert main(["init", "--from", "demo", "--data", "x.jsonl"]) == 2
    assert "--from copies a recipe as it is" in capsys.readouterr().err
