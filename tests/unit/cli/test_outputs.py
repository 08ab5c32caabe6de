"""An output that cannot be written is one sentence, before any work whose result would go there."""

from pathlib import Path

import pytest

import tiny_run
from lisatune.cli.app import main

COMMANDS = {
    "compare": "compare RECIPE --methods full --lr 1e-4",
    "evaluate": "evaluate MODEL --tasks arc_easy",
    "evaluate --mt-bench": "evaluate MODEL --mt-bench answers",
    "export": "export MODEL --base MODEL --delta",
    "export --apply": "export MODEL --apply",
    "generate": "generate MODEL --prompt hi",
    "init": "init",
    "report": "report MODEL",
    "study norms": "study norms RECIPE",
    "study outliers": "study outliers RECIPE",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    model = tiny_run.write_model(folder / "model")
    recipe = tiny_run.write_recipe(folder, model, tiny_run.write_rows(folder / "rows.jsonl"))
    return {"MODEL": str(model), "RECIPE": str(recipe)}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_is_one_sentence(
    name: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    command = [places.get(word, word) for word in COMMANDS[name].split()]
    reasons = {tmp_path / "file": "Not a directory", Path("/proc"): "No such file or directory"}
    for folder, reason in reasons.items():
        output = folder / "lisatune.json"
        assert main([*command, "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert said == f"lisatune: error: cannot write {output}: {reason}; name another --output\n"
