"""The records that all runs of a comparison share, written once."""

import json
from pathlib import Path

import pytest

from lisatune.compare.arms import read_comparison
from lisatune.compare.slices import write_slices


def test_text_is_taken_alone_from_the_general_file_too(tmp_path: Path) -> None:
    pairs = [{"prompt": f"Is {number} even?", "completion": "Perhaps."} for number in range(40)]
    seen = {"prompt": "<image>What is it?", "completion": "A cat.", "images": ["cat.png"]}
    for name, rows in (("rows", pairs), ("general", [seen])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: smollm2-135m}}\ndata: {{train: {tmp_path}/rows.jsonl}}\n")
    options = {"methods": "full", "general": f"{tmp_path}/general.jsonl"}
    with pytest.raises(ValueError, match=r"set data\.text_only"):
        write_slices(read_comparison(recipe, **options), tmp_path / "refused")
    overrides = ["data.text_only=true", "data.validation_share=0.5"]
    write_slices(read_comparison(recipe, overrides, **options), tmp_path / "data")
    written = (tmp_path / "data" / "general.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in written] == ["What is it?"]
