"""What the README shows works as it stands there."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tiny
from lisatune.train.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_drop_in_trains_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    before = tiny.weights(model)
    asked: dict[str, object] = {}

    def from_pretrained(name: str, **options: object) -> LlamaForCausalLM:
        asked.update(options)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    loader = [{"input_ids": tiny.tokens(step), "labels": tiny.tokens(step)} for step in range(30)]
    (loop,) = blocks("python")
    names: dict[str, object] = {"loader": loader}
    exec(compile(loop, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert asked == {"dtype": torch.float32}
    assert names["lisa"].periods_proven == 3
    assert tiny.moved(before, model) == before.keys()


def test_recipe_loads(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path, ["run.epochs=3"])
    assert (recipe.method.active, recipe.run.epochs) == (2, 3)


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from lisatune.cli.app import main

    start = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    texts = [*blocks("sh"), *re.findall(r"```sh\n(.*?)```", start, flags=re.DOTALL)]
    commands = [shlex.split(line, comments=True) for text in texts for line in text.splitlines()]
    names = {words[1] for words in commands if words[0] == "lisatune"}
    known = "check compare evaluate export train generate init layers plan report"
    assert names == set(known.split())
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)


def test_linked_files_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_on_pypi_has_no_link_to_a_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    page = README
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(each["pattern"], each["replacement"], page)
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert targets
    assert [target for target in targets if not target.startswith("http")] == []
    assert "Start · Tutorials · Concepts" in page
    assert "badges" not in page
