"""What every way to fine-tune promises, whatever its name: each test runs over all of METHODS.

On a GPU: LISATUNE_TEST_DEVICE=cuda pytest tests/conformance
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lisatune.train.loop
import tiny
import tiny_run
from lisatune.lisa.correction import find_correction
from lisatune.methods import METHODS, Method
from lisatune.models.load import load_model
from lisatune.runs.summary import Summary
from lisatune.train.assemble import Parts, assemble
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState

STEPS, BREAK = 14, 7  # the break is inside a period, a draw comes after it
OPTIONS = ("optimizer.schedule=constant",)
AGAIN = (*OPTIONS, "run.check_memory=false", "run.samples=0", "run.save_every=null")
"""The same training without what comes before and after it. It changes nothing in the weights."""
IDS_BT = torch.arange(24).view(2, 12)


@dataclass
class Run:
    """A finished run, and what was seen while it went."""

    method: type[Method]
    recipe: Path
    output: Path
    summary: Summary
    model: nn.Module
    before: dict[str, Tensor]
    """Weights before the first step."""
    trainable: list[set[str]]
    """Names of what requires grad, at each step."""
    with_state: list[set[str]]
    """Names of what has optimizer state, at the beginning of each step."""
    beside: list[int]
    """How many numbers train beside the model's own, in adapters of a correction, at each step."""
    stateless: list[int]
    """How many of the model's own train without state, because a correction moves them, at each step."""


def watched(patch: pytest.MonkeyPatch, recipe: Path, output: Path, *overrides: str, **flags: Any) -> Run:
    """Train, and note at each step what trains and what has state."""
    seen: dict[str, Any] = {}
    trainable: list[set[str]] = []
    with_state: list[set[str]] = []
    beside: list[int] = []
    stateless: list[int] = []

    def watch(*args: Any) -> Parts:
        parts = assemble(*args)
        seen["model"], seen["before"] = parts.built.model, tiny.weights(parts.built.model)
        names = {p: name for name, p in parts.built.model.named_parameters()}

        def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            trainable.append({name for p, name in names.items() if p.requires_grad})
            with_state.append({names[p] for p in optimizer.state})
            correction = find_correction(parts.built.model)
            own = [] if correction is None else correction.parameters()
            beside.append(sum(p.numel() for p in own))
            stateless.append(sum(p.numel() for p in names if correction and correction.is_stateless(p)))

        parts.built.step.optimizer.register_step_pre_hook(note)
        return parts

    patch.setattr(lisatune.train.loop, "assemble", watch)
    summary = train(load_recipe(recipe, [f"run.output={output}", *overrides]), **flags)
    method = type(load_recipe(recipe).method)
    noted = (trainable, with_state, beside, stateless)
    return Run(method, recipe, output, summary, seen["model"], seen["before"], *noted)


SETTINGS = [
    *METHODS,
    "galore, rank: 4, gap: 5",  # the default rank is above every side of the tiny model
    "lisa, frozen_weights: int8, ends: frozen, master: disk",
    "lisa, correction: lora",
    "lisa, correction: lora, correction_blocks: above, ends: frozen, lr_scaling: none",
    "lisa, correction: sign | max_grad_norm: null",
    "lisa, unit: module, sampler: misa",
    "autofreeze, intervals: 4, percentile: 90",  # a run breaks off inside an interval
    "smartfrz, intervals: 4, confidence: 0.01",
    "badam, switch_every: 3",  # by default it does not switch in so few steps
]

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


@pytest.fixture(scope="module", params=SETTINGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with the method's own defaults, or with settings that bring out what it does.

    What comes after a bar are settings of the optimizer.
    """
    method, _, optimizer = request.param.partition(" | ")
    folder = tmp_path_factory.mktemp(request.param.partition(",")[0])
    recipe = tiny_run.write_recipe(
        folder,
        tiny_run.write_model(folder / "tiny"),
        tiny_run.write_rows(folder / "rows.jsonl", 14),
        f"method: {{name: {method}}}\n",
        plans=True,
    )
    lr = 1e-2 * METHODS[request.param.partition(",")[0]].lr_scale
    text = recipe.read_text().replace("steps: 4", f"steps: {STEPS}")
    recipe.write_text(text.replace("lr: 1e-3", f"lr: {lr}" + f", {optimizer}" * bool(optimizer)))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):

        def keep(state: RunState) -> None:
            """Keep the folder as a kill would leave it a step after a checkpoint."""
            if state.step == BREAK + 1:
                shutil.copytree(folder / "run", folder / "killed")

        yield watched(patch, recipe, folder / "run", *OPTIONS, f"run.save_every={BREAK}", after_step=keep)


def refusal_of(recipe: Path, overrides: tuple[str, ...]) -> str | None:
    """What a recipe with overrides is refused with before anything loads; None where it isn't."""
    try:
        load_recipe(recipe, overrides)
    except ValueError as error:
        return str(error)
    return None


def metrics(output: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    timed = {"tokens_per_second", "seconds", "resident_bytes"}
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS_BT.to(tiny_run.DEVICE)).logits
    return found


def test_held_out_loss_falls(run: Run) -> None:
    assert run.summary["held_out_loss_after"] < run.summary["held_out_loss_before"] - 0.01


def test_what_trains_moves_and_nothing_else_does(run: Run) -> None:
    trained = set().union(*run.trainable)
    assert trained
    assert tiny.moved(run.before, run.model) == trained


def test_only_what_trains_has_gradients_and_state(run: Run) -> None:
    assert run.with_state[0] == set()
    for with_state, before, trainable in zip(
        run.with_state[1:], run.trainable, run.trainable[1:], strict=False
    ):
        is_stateless = trainable != before or not run.method.num_moments
        assert with_state or is_stateless, "state may be cleared where something else begins to train"
        assert with_state <= trainable
    last = {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert last == set(), "gradients are released after the step"


def test_summary_counts_what_trained_and_its_moments(run: Run) -> None:
    sizes = {name: weight.numel() for name, weight in run.before.items()}
    most = max(
        sum(sizes[name] for name in names) + more
        for names, more in zip(run.trainable, run.beside, strict=True)
    )
    assert run.summary["peak_trainable"] == most
    projected = "rank: 4" in run.recipe.read_text()  # moments of a lower rank than what trains
    elements, with_moments = run.summary["peak_state_elements"], most - max(run.stateless)
    moments = run.method.num_moments
    assert 0 < elements < moments * most if projected else elements == moments * with_moments


def test_resume_is_bit_equal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(12345)  # what ran before must not matter
    resumed = watched(monkeypatch, run.recipe, run.output.with_name("killed"), *AGAIN, resume=True)
    assert len(resumed.trainable) == STEPS - BREAK
    assert resumed.trainable == run.trainable[BREAK:]
    tiny.assert_same_weights(resumed.model, run.model)
    assert metrics(resumed.output) == metrics(run.output)


def test_the_same_recipe_gives_the_same_weights_and_so_do_recomputed_activations_or_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that recomputes and ends in the same weights is also the same recipe made again."""
    options = (*AGAIN, "run.activation_checkpointing=true")
    if (refusal := refusal_of(run.recipe, options)) is not None:
        assert "run.activation_checkpointing cannot work with method" in refusal
        options = AGAIN
    torch.manual_seed(12345)  # what ran before must not matter
    again = watched(monkeypatch, run.recipe, tmp_path / "run", *options)
    tiny.assert_same_weights(again.model, run.model)


def test_written_model_loads_with_equal_logits(run: Run) -> None:
    loaded = load_model(str(run.output / "model")).to(tiny_run.DEVICE)
    assert torch.equal(logits(loaded.eval()), logits(run.model.eval()))
    untrained = load_model(str(run.recipe.parent / "tiny")).to(tiny_run.DEVICE)
    assert not torch.equal(logits(untrained), logits(loaded))
