"""What is added from outside the package trains, resumes, is planned and is reported like what is inside."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
import tiny_run
import toy_members
from lisatune.lisa.lisa import LISA
from lisatune.memory import plan_memory
from lisatune.methods import METHODS, OPTIMIZERS
from lisatune.models.load import load_model
from lisatune.train.assemble import assemble
from lisatune.train.loop import train
from lisatune.train.outline import make_outline
from lisatune.train.recipe_file import load_recipe

STEPS = 9

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a recipe, while METHODS has the members."""
    folder = tmp_path_factory.mktemp("doors")
    model = tiny_run.write_model(folder / "model")
    rows = tiny_run.write_rows(folder / "rows.jsonl", 16)
    tiny_run.write_recipe(folder, model, rows, "method: {name: full}\n")
    with pytest.MonkeyPatch.context() as patch:
        for kind in (toy_members.FreezeMethod, toy_members.ForwardMethod, toy_members.SamplerMethod):
            patch.setitem(METHODS, kind.name, kind)
        patch.setitem(
            OPTIMIZERS, "sgd", lambda groups, config: torch.optim.SGD(groups, config.lr, momentum=0.9)
        )
        yield folder


def run(folder: Path, name: str, *overrides: str, resume: bool = False) -> Path:
    """Train `STEPS` steps into a folder of this name."""
    keys = [f"run.output={folder / name}", f"run.steps={STEPS}", "run.save_every=5", "run.keep_checkpoints=9"]
    train(load_recipe(folder / "recipe.yaml", [*keys, *overrides]), resume=resume)
    return folder / name


def metrics(output: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    pairs = (tiny.weights(load_model(str(each / "model"))) for each in (one, other))
    first, second = pairs
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["freeze_upwards", "largest_gradient"])
def test_a_run_interrupted_inside_a_period_resumes_bit_for_bit(folder: Path, name: str) -> None:
    method = f"method.name={name}"
    whole = run(folder, f"{name}-whole", method)
    run(folder, f"{name}-again", method)
    broken = folder / f"{name}-again"
    for late in ("checkpoints/step-00000009", "model", "summary.json"):
        path = broken / late
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    run(folder, f"{name}-again", method, resume=True)
    assert same_weights(whole, broken)
    assert [line["active_blocks"] for line in metrics(whole)] == [
        line["active_blocks"] for line in metrics(broken)
    ]


def test_a_schedule_freezes_reports_and_is_planned(folder: Path) -> None:
    output = run(folder, "freeze", "method.name=freeze_upwards")
    active = [tuple(line["active_blocks"]) for line in metrics(output)]  # type: ignore[arg-type]
    assert active == [(0, 1, 2, 3)] * 3 + [(1, 2, 3)] * 3 + [(2, 3)] * 3
    summary = json.loads((output / "summary.json").read_text())
    assert summary["proof"] == "9 steps: frozen from below"
    asked = load_recipe(folder / "recipe.yaml", ["method.name=freeze_upwards", f"run.steps={STEPS}"])
    plan = plan_memory(asked)
    assert (plan.kind, plan.active_blocks) == ("traced", (0, 1, 2, 3))
    few = plan_memory(asked, blocks=(2, 3))
    assert few.trainable < plan.trainable
    assert few.peak_bytes < plan.peak_bytes


def test_a_step_without_backward_trains_and_is_planned_without_activations(folder: Path) -> None:
    output = run(folder, "forward", "method.name=two_forwards", "optimizer.schedule=constant")
    assert len(metrics(output)) == STEPS
    before, after = load_model(str(folder / "model")), load_model(str(output / "model"))
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    plans = {
        name: plan_memory(load_recipe(folder / "recipe.yaml", [f"method.name={name}", "run.steps=9"]))
        for name in ("two_forwards", "full")
    }
    assert plans["two_forwards"].kind == "traced"
    assert "backward" not in plans["two_forwards"].by_phase
    assert plans["two_forwards"].at_peak["activations"] < plans["full"].at_peak["activations"]


def test_a_sampler_that_reads_draws_by_what_training_measured(folder: Path) -> None:
    output = run(folder, "reads", "method.name=largest_gradient")
    active = [tuple(line["active_blocks"]) for line in metrics(output)]  # type: ignore[arg-type]
    assert active[0] == (0, 1)
    assert active[2] == (2, 3)  # those that had not been tried
    assert sum(json.loads((output / "summary.json").read_text())["visits"]) == 10


def test_the_plan_of_a_sampler_that_reads_takes_the_costliest_blocks(folder: Path) -> None:
    asked = load_recipe(folder / "recipe.yaml", ["method.name=largest_gradient", "run.steps=9"])
    costliest = max(plan_memory(asked, blocks=blocks).peak_bytes for blocks in ((0, 1), (2, 3), (0, 3)))
    assert plan_memory(asked).peak_bytes == costliest


def test_coverage_of_a_sampler_that_reads_is_marked_as_simulated(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", ["method.name=largest_gradient", "run.steps=9"])
    parts = assemble(recipe)
    built = parts.built
    assert isinstance(built.schedule, LISA)
    outline = make_outline(recipe, built.model, built.layers, built.schedule, parts.data, device="cpu")
    assert (sum(outline.visits), outline.visits_are_exact) == (10, False)


def test_an_optimizer_is_picked_by_name(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", ["optimizer.name=sgd", "method.name=lisa"])
    optimizer = assemble(recipe).built.step.optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert len(optimizer.param_groups) == 1 + tiny_run.BLOCKS
    assert len(metrics(run(folder, "sgd", "optimizer.name=sgd", "method.name=lisa"))) == STEPS


def test_an_unknown_optimizer_is_refused_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer.name: unknown optimizer 'adam'. Did you mean 'adamw'"):
        load_recipe(folder / "recipe.yaml", ["optimizer.name=adam"])
