"""What `lisatune plan --gpu` says could train beside what is asked for."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from lisatune.cli.app import main
from lisatune.memory import fit as searches
from lisatune.memory.fit import Changes, Fit, Room, apply_changes, find_fit, find_room
from lisatune.memory.plan import MemoryPlan
from lisatune.methods import METHODS
from lisatune.optim import codecs
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig
from plans import PlansOnce

BLOCKS = 5
EIGHT_BIT: Changes = {"optimizer.moments": "8bit"}
STOCHASTIC: Changes = {"optimizer.rounding": "stochastic"}
INT8: Changes = {"method.frozen_weights": "int8"}


PLANS = PlansOnce()


@pytest.fixture(autouse=True, scope="module")
def _plan_each_recipe_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searches, "plan_memory", PLANS)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """LISA with one of five blocks, for a model folder without weights."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=1024,
    ).save_pretrained(folder)
    return Recipe(
        model=ModelConfig(name=str(folder)),
        data=DataConfig(train="none", max_length=256),
        method=METHODS["lisa"](active=1),
        run=RunConfig(precision="bf16", batch_size=1, device="cuda"),
    )


def needed(recipe: Recipe, changes: Changes) -> int:
    return PLANS(apply_changes(recipe, changes)).needed_bytes


def room_in(recipe: Recipe, size: int) -> Room | None:
    return find_room(recipe, find_fit(recipe, size))


def test_all_blocks_train_where_there_is_room_for_them(recipe: Recipe) -> None:
    every: Changes = {"method.active": BLOCKS}
    room = room_in(recipe, needed(recipe, every))
    assert room is not None
    assert room.changes == every
    assert room.overrides == f"method.active={BLOCKS}"


@pytest.mark.parametrize("is_just_short_of_more", [False, True])
def test_one_block_more_than_is_found_does_not_fit(recipe: Recipe, is_just_short_of_more: bool) -> None:
    lean = EIGHT_BIT | STOCHASTIC | INT8
    three, four = (needed(recipe, lean | {"method.active": active}) for active in (3, 4))
    room = room_in(recipe, four - 1 if is_just_short_of_more else three)
    assert room is not None
    assert room.changes == lean | {"method.active": 3}
    assert room.plan.needed_bytes == three


def test_state_becomes_no_coarser_than_all_blocks_need(recipe: Recipe) -> None:
    most = EIGHT_BIT | {"method.active": BLOCKS}
    room = room_in(recipe, needed(recipe, most))
    assert room is not None
    assert room.changes == most


def test_a_search_plans_nothing_twice(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    size = needed(recipe, EIGHT_BIT | STOCHASTIC | {"method.active": 3})
    fit = find_fit(recipe, size)
    assert fit.changes  # so that the search for room starts from changes
    planned: list[Recipe] = []

    def plan(changed: Recipe, **options: Any) -> MemoryPlan:
        planned.append(changed)
        return PLANS(changed, **options)

    monkeypatch.setattr("lisatune.memory.fit.plan_memory", plan)
    assert find_room(recipe, fit) is not None
    assert apply_changes(recipe, fit.changes) not in planned
    assert len(set(planned)) == len(planned) > 1


def test_without_bitsandbytes_moments_stay_as_they_are(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANS.forget()

    def missing() -> None:
        raise ImportError("no bitsandbytes")

    monkeypatch.setattr(codecs, "_bitsandbytes", missing)
    most = STOCHASTIC | INT8 | {"method.active": 3}
    room = room_in(recipe, needed(recipe, most))
    assert room is not None
    assert room.changes == most


def test_nothing_is_offered_where_there_is_no_room_or_no_more_to_train(recipe: Recipe) -> None:
    large = 10**12
    independent = METHODS["lisa"](sampler="independent", probabilities=(0.5,) * BLOCKS)
    for method in (METHODS["lora"](), METHODS["full"](), METHODS["lisa"](active=BLOCKS), independent):
        assert room_in(replace(recipe, method=method), large) is None
    assert room_in(recipe, needed(recipe, EIGHT_BIT | STOCHASTIC)) is None
    does_not_fit = Fit(large, False, {}, (), PLANS(recipe))
    assert find_room(recipe, does_not_fit) is None


def test_nothing_is_offered_where_the_recipe_had_to_shrink(recipe: Recipe) -> None:
    recipe = replace(recipe, run=replace(recipe.run, batch_size=2))
    fit = find_fit(recipe, needed(recipe, EIGHT_BIT | {"run.batch_size": 1, "run.accumulation": 2}))
    assert fit.fits
    assert "run.batch_size" in fit.changes
    assert find_room(recipe, fit) is None


def test_command_says_how_many_blocks(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--model", recipe.model.name, "--length", "256", "--gpu", "1TB", "method.active=1"]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert f"for {BLOCKS} of {BLOCKS} blocks" in text
    assert f"method.active={BLOCKS} needs" in text
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["room"]["overrides"] == f"method.active={BLOCKS}"
    assert main([*options, f"method.active={BLOCKS}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["room"] is None
