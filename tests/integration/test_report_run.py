"""`lisatune report` of a real run with LISA."""

from pathlib import Path

import pytest
import torch

from lisatune.cli import app
from lisatune.models.load import load_model, load_tokenizer, save_model
from lisatune.report.run_page import make_runs_page
from tiny_run import write_model, write_recipe, write_rows


def test_a_run_with_lisa_has_every_chart_it_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 24)
    recipe = write_recipe(tmp_path, model, rows, plans=True)
    assert app.main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert app.main(["report", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert said.err == ""

    page = make_runs_page([tmp_path / "run"])
    figures = {figure.title: figure for figure in page.figures}
    assert list(figures) == [
        "Training loss",
        "Learning rates",
        "Gradient norm",
        "Held-out loss against tokens",
        "Held-out loss against wall time",
        "Memory by category",
        "Active blocks: run",
        "Weight movement by block",
    ]
    assert {"weights", "optimizer state", "activations"} < set(figures["Memory by category"].table.heads)
    visits = [int(row[1]) for row in figures["Active blocks: run"].table.rows]
    movement = [float(row[1]) for row in figures["Weight movement by block"].table.rows]
    assert sum(visits) == 4  # 2 periods of 2 blocks
    assert [each > 0 for each in movement] == [each > 0 for each in visits]
    assert len(page.samples) == 1

    assert not [
        each for each in make_runs_page([tmp_path / "run"], weights=False).figures if "movement" in each.title
    ]
    (model / "model.safetensors").write_bytes(b"not weights")
    damaged = make_runs_page([tmp_path / "run"])
    assert "Weight movement by block" not in [figure.title for figure in damaged.figures]
    assert any("weight movement is left out" in problem for problem in damaged.problems)


def test_rounding_to_the_written_dtype_is_no_movement(tmp_path: Path) -> None:
    base = write_model(tmp_path / "model")  # in float32
    recipe = write_recipe(tmp_path, base, write_rows(tmp_path / "rows.jsonl", 24))
    assert app.main(["train", str(recipe)]) == 0
    written = tmp_path / "run" / "model"
    save_model(load_model(str(base), dtype=torch.bfloat16), load_tokenizer(str(base)), written)
    (figure,) = [each for each in make_runs_page([tmp_path / "run"]).figures if "movement" in each.title]
    assert [float(row[1]) for row in figure.table.rows] == [0, 0, 0, 0]
