"""What is measured of a model that a run wrote."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from lisatune.compare import measure as measure_module
from lisatune.compare.measure import Job, Measured, measure_model


def measure(folder: Path, loss_on: str, **slices: list[dict[str, Any]]) -> Measured:
    """Measure the model that a run of the recipe begins with."""
    files = {name: folder / f"{name}.jsonl" for name in slices}
    for name, rows in slices.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_run.write_recipe(folder, tiny_run.write_model(folder / "model"), files["test"])
    recipe.write_text(recipe.read_text().replace("data: {", f"data: {{loss_on: {loss_on}, "))
    paths = {name: str(file) for name, file in files.items()}
    return measure_model(
        Job(recipe=str(recipe), model=None, slices=paths, with_memory=False, output=str(folder / "out.json"))
    )


def test_general_text_need_not_have_the_roles_that_carry_loss(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    plain = [{"prompt": "2 + 2 =", "completion": " 4"}]
    of_roles = measure(tmp_path, "[user]", test=chats, general=plain)
    of_answers = measure(tmp_path, "answers", test=chats, general=plain)
    assert of_roles["general_loss"] == of_answers["general_loss"] > 0
    assert of_roles["test_loss"] != of_answers["test_loss"]


def test_losses_that_are_not_finite_do_not_reach_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"test": 2.0, "general": math.inf}
    monkeypatch.setattr(measure_module, "_measure_loss", lambda recipe, model, name, *rest: losses[name])
    rows = [{"prompt": "2 + 2 =", "completion": " 4"}]
    assert measure(tmp_path, "answers", test=rows, general=rows) == {"test_loss": 2.0}
    losses["test"] = math.nan
    with pytest.raises(RuntimeError, match="its loss on the test slice is nan"):
        measure(tmp_path, "answers", test=rows, general=rows)
