"""Whole runs on a mixture: resumed, killed, reported, compared."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from faults import kills, runs
from lisatune.compare import slices
from lisatune.compare.arms import read_comparison
from lisatune.report.run_page import make_runs_page
from lisatune.train import load_recipe, train
from lisatune.train.check import check
from lisatune.train.resume import RunState


def write_sources(folder: Path) -> tuple[Path, str]:
    """Write model, two files and a recipe; return the recipe and an override with the mixture."""
    pairs = tiny_run.write_rows(folder / "pairs.jsonl", 14)
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"line {row} of a text"}) + "\n" for row in range(12)))
    recipe = tiny_run.write_recipe(folder, tiny_run.write_model(folder / "tiny"), pairs)
    return recipe, f"data.train=[{{path: {pairs}, weight: 3}}, {{path: {texts}, weight: 1}}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run on a mixture: its folder and its summary."""
    folder = tmp_path_factory.mktemp("mixture")
    recipe, mixture = write_sources(folder)
    summary = train(load_recipe(recipe, [mixture, "run.steps=6", "run.eval_every=3"]))
    return {"folder": folder / "run", "summary": summary, "recipe": recipe, "mixture": mixture}


def test_losses_of_the_sources_are_logged_and_make_up_the_loss(run: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (run["folder"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    names = {name for line in steps for name in line["loss_by_source"]}
    assert names == {"pairs.jsonl", "texts.jsonl"}
    for line in steps:
        values = line["loss_by_source"].values()
        assert min(values) - 1e-4 <= line["loss"] <= max(values) + 1e-4
    held_out = [line["held_out_loss_by_source"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 3
    assert all(losses.keys() == names for losses in held_out)
    assert run["summary"]["held_out_loss_by_source_after"] == held_out[-1]
    assert run["summary"]["held_out_loss_by_source_before"] == held_out[0]


def test_the_report_shows_the_loss_of_each_source(run: dict[str, Any]) -> None:
    page = make_runs_page([run["folder"]], weights=False)
    tables = {figure.title: [row[0] for row in figure.table.rows] for figure in page.figures}
    for title in ("Training loss by source", "Held-out loss by source"):
        assert tables[title] == ["run, pairs.jsonl", "run, texts.jsonl"]
    assert "pairs.jsonl + " in page.intro[0]
    assert "pairs.jsonl`, `texts.jsonl`" in (run["folder"] / "model" / "README.md").read_text()


def test_check_outlines_the_shares_of_the_sources(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = check(load_recipe(run["recipe"], [run["mixture"], "run.output=elsewhere"]))
    assert report.problems == []
    assert report.outline is not None
    shares = {source.name: source.row_share for source in report.outline.sources}
    assert shares == {
        "pairs.jsonl": pytest.approx(0.75, abs=0.02),
        "texts.jsonl": pytest.approx(0.25, abs=0.02),
    }


def test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_equal(
    run: dict[str, Any], tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(state: RunState) -> None:
        if state.step == 5:
            raise StopError

    given = [
        run["mixture"],
        "run.steps=6",
        "run.eval_every=3",
        "run.save_every=2",
        f"run.output={tmp_path}/run",
    ]
    with pytest.raises(StopError):
        train(load_recipe(run["recipe"], given), after_step=stop)
    train(load_recipe(run["recipe"], given), resume=True)
    written = [folder / "run" / "model" / "model.safetensors" for folder in (tmp_path, run["folder"].parent)]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_other_weights_are_refused_on_resume(run: dict[str, Any]) -> None:
    other = run["mixture"].replace("weight: 3", "weight: 4")
    with pytest.raises(ValueError, match=r"data\.train: .*weight: 3.* → .*weight: 4"):
        train(load_recipe(run["recipe"], [other, "run.steps=8", "run.eval_every=3"]), resume=True)


def test_killed_runs_on_a_mixture_end_bit_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mixture = write_sources(tmp_path)
    variant = ("{active: 2, period: 2}", [mixture, "data.packing=true", "run.eval_every=3"])
    monkeypatch.setitem(runs.VARIANTS, "mixture", variant)
    series = kills.Series(tmp_path / "killed", "mixture")
    tally = series.kill_and_compare(random.Random(1), [*kills.KINDS, "before a file"])
    assert tally.mismatches == []
    assert tally.finished == 1


def test_a_comparison_gives_every_run_the_same_slice_of_each_source(
    run: dict[str, Any], tmp_path: Path
) -> None:
    comparison = read_comparison(run["recipe"], [run["mixture"]], methods="lisa,full", lr="1e-3")
    slices.write_slices(comparison, tmp_path / "data")
    config = slices.use_slices(comparison.recipe.data, tmp_path / "data")
    assert [(Path(source.path).name, source.weight) for source in config.sources] == [
        *(("train-1-pairs.jsonl", 3), ("train-2-texts.jsonl", 1))
    ]
    counts = slices.read_slices(tmp_path / "data")
    assert counts["train"] + counts["validation"] + counts["test"] == 14 + 12
