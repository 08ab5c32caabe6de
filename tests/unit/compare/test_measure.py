"""What is measured of a model that a run wrote."""

import json
from pathlib import Path
from typing import Any

import tiny_run
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
