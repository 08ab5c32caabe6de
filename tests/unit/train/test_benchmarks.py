"""Benchmark tasks after training: in the summary, in tables, and refused before a run begins."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_run
import tiny_tasks
from lisatune.cli.app import main
from lisatune.compare.gains import gain_text, gains, mean_gains
from lisatune.compare.measure import Job, Measured, measure_model
from lisatune.compare.results import TaskGain
from lisatune.train import load_recipe, train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_tasks.write_data(tmp_path / "questions")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tiny_run.write_model(tmp_path / "model")
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"))


def test_a_run_asks_the_model_that_it_has_written(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    overrides = ["run.evaluate=arc_easy:limit=4", f"run.evaluate_data={data}"]
    summary = train(load_recipe(recipe, overrides))
    score = summary["scores"]["arc_easy"]
    assert (score["metric"], score["items"]) == ("acc", 4)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]["arc_easy"] == score
    assert "arc_easy" in capsys.readouterr().out
    line = ["evaluate", str(tmp_path / "run"), "--tasks", "arc_easy", "--limit", "4", "--data", str(data)]
    assert main(line) == 0, "the command goes on in the same folder"
    train(load_recipe(recipe, [*overrides, "run.steps=5"]), overwrite=True)
    assert main(line) == 0, "another model of the run has taken the place of its scores"
    train(load_recipe(recipe, overrides), overwrite=True)
    job = Job(
        recipe=str(recipe),
        model=str(tmp_path / "run" / "model"),
        slices={"test": str(tmp_path / "rows.jsonl")},
        evaluate="arc_easy:limit=4",
        evaluate_data=str(data),
        with_memory=False,
        output="",
    )
    tuned, base = measure_model(job), measure_model(job | {"model": None})  # type: ignore[arg-type]
    assert tuned["scores"]["arc_easy"] == score, "the same as of the model on disk"
    assert gains(base, Measured())["arc_easy"]["gain"] is None
    gain = gains(tuned, base)["arc_easy"]
    assert gain["gain"] == pytest.approx(score["value"] - base["scores"]["arc_easy"]["value"])
    assert gain["gain_stderr"] is not None


def test_tasks_that_cannot_be_asked_are_refused_before_anything_is_written(
    recipe: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(FileNotFoundError, match="no folder gsm8k"):
        train(load_recipe(recipe, ["run.evaluate=gsm8k", f"run.evaluate_data={data}"]))
    assert not (tmp_path / "run").exists()


def test_questions_without_a_task_are_refused(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"run.evaluate names no task"):
        load_recipe(recipe, ["run.evaluate_data=questions"])


def test_errors_are_averaged_over_seeds_because_all_answer_the_same_questions() -> None:
    def run(value: float, gain: float) -> dict[str, Any]:
        figures = {"metric": "acc", "value": value, "stderr": 0.035, "items": 200}
        return {"arc_easy": figures | {"gain": gain, "gain_stderr": 0.02}}

    mean = mean_gains([run(0.5, 0.01), run(0.52, 0.03), {}])["arc_easy"]
    assert gain_text(mean) == "51.0 ± 3.5 (+2.0 ± 2.0)"
    assert mean_gains([]) == {}
    ppl = {"metric": "word_perplexity", "value": 25.2, "stderr": 0.5, "gain": -1.25, "gain_stderr": None}
    assert gain_text(TaskGain(**ppl, items=9)) == "25.2 ± 0.5 (-1.25)"  # type: ignore[typeddict-item]


def test_a_run_that_had_ended_says_that_its_tasks_are_not_asked(recipe: Path, data: Path) -> None:
    pytest.importorskip("lm_eval")
    train(load_recipe(recipe))
    overrides = ["run.evaluate=arc_easy", f"run.evaluate_data={data}"]
    with pytest.warns(
        UserWarning, match="had ended, so run.evaluate=arc_easy is not asked; use `lisatune eval"
    ):
        train(load_recipe(recipe, overrides), resume=True)
