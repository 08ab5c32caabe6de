"""Settings that do nothing beside the other ones are said."""

from pathlib import Path

import pytest

import tiny_run
from lisatune.train.check import check
from lisatune.train.recipe_file import load_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idle")
    model = tiny_run.write_model(folder / "model")
    return tiny_run.write_recipe(folder, model, tiny_run.write_rows(folder / "rows.jsonl"), "method: {}\n")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.revision=main"], "model.revision=main does nothing: "),
        (["data.split=test"], "data.split=test does nothing: only data sets on the hub have splits"),
        (["data.train=[{path: ROWS, split: test}]"], "split=test does nothing: only data sets on the hub"),
        (["optimizer.rounding=stochastic"], "optimizer.rounding=stochastic does nothing: "),
        (
            ["run.steps=8", "run.eval_every=8"],
            "run.eval_every=8 does nothing: the run has 8 steps, and the last one is evalu",
        ),
        (
            ["run.steps=8", "run.eval_every=9", "run.keep_best=true", "run.stop_after=1"],
            "run.eval_every=9 with run.stop_after=1 and run.keep_best does nothing: ",
        ),
        (
            ["run.steps=8", "run.eval_every=3", "run.stop_after=3"],
            "run.stop_after=3 does nothing: run.eval_every=3 evaluates 2 times before the last step",
        ),
        (["run.steps=8", "run.eval_every=7", "run.stop_after=2"], "evaluates once before the last step"),
        (
            ["run.activation_checkpointing=frozen", "method.name=full"],
            "run.activation_checkpointing=frozen does nothing: method full trains something in every block",
        ),
        (
            ["run.activation_checkpointing=frozen", "method.name=lora"],
            "run.activation_checkpointing=frozen does nothing: method lora trains something in every block",
        ),
    ],
)
def test_a_setting_that_does_nothing_is_a_warning(overrides: list[str], says: str, recipe: Path) -> None:
    rows = str(recipe.parent / "rows.jsonl")
    report = check(load_recipe(recipe, [each.replace("ROWS", rows) for each in overrides]))
    assert report.problems == []
    assert sum(says in text for text in report.warnings) == 1


@pytest.mark.filterwarnings("ignore:this CPU has no AVX-512:UserWarning")
@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.rounding=stochastic", "run.precision=bf16"],
        ["run.activation_checkpointing=frozen"],
        ["run.steps=8", "run.eval_every=7", "run.keep_best=true", "run.stop_after=1"],
        ["run.activation_checkpointing=frozen", "method.name=ends"],
        ["run.activation_checkpointing=frozen", "method.name=freezeout"],
    ],
)
def test_the_same_setting_where_it_does_something_is_none(overrides: list[str], recipe: Path) -> None:
    report = check(load_recipe(recipe, overrides))
    assert not any("does nothing" in text for text in report.warnings)
