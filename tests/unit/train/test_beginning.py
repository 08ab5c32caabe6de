"""What a resumed run keeps from its beginning."""

import datetime
import json
from pathlib import Path

import pytest

import tiny_run
from lisatune.files import yaml
from lisatune.train.beginning import fix_date
from lisatune.train.recipe_file import load_recipe


@pytest.mark.parametrize(
    ("asked", "saved", "expected"),
    [
        ([], {"date": "2020-03-04"}, "2020-03-04"),
        ([], {}, "2020-03-01"),  # saved before the key existed: the day it began
        (["data.date=2021-01-01"], {"date": "2020-03-04"}, "2021-01-01"),
    ],
)
def test_a_resumed_run_renders_templates_on_its_first_day(
    asked: list[str], saved: dict[str, str], expected: str, tmp_path: Path
) -> None:
    path = tiny_run.write_recipe(tmp_path, tmp_path / "model", tmp_path / "rows.jsonl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.dump({"data": saved}))
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"time": "2020-03-01T23:59:59+0100"}))
    recipe = load_recipe(path, asked)
    assert fix_date(recipe, resume=True).data.date == expected
    today = datetime.date.today()  # may change until the next line
    anew = fix_date(recipe, resume=False).data.date
    assert anew in ([expected] if asked else [str(today), str(datetime.date.today())])
