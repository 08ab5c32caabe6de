"""The design's invariants, by number, on the bundled real model: 134.5 M parameters, 30 blocks."""

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tiny
from lisatune import LISA, build_adamw, find_layers
from lisatune.models.load import load_model
from lisatune.runs.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.smollm2

BLOCKS = 30
ENDS = 49_152 * 576 + 576  # tied embedding and head, final norm
BLOCK = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576  # q k v o, gate up down, two norms
TEXT = list(range(1000, 1016))


@pytest.fixture(scope="module")
def loaded() -> nn.Module:
    """The model as it was published; tests get copies."""
    return load_model("smollm2-135m").eval()


@pytest.fixture
def model(loaded: nn.Module) -> nn.Module:
    return copy.deepcopy(loaded)


def backward(model: nn.Module, step: int) -> None:
    """One sequence of 16 tokens, another one for every step."""
    ids_BT = torch.tensor([TEXT[step:] + TEXT[:step]])
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()


def fit(
    model: nn.Module, optimizer: Optimizer, steps: range, *, after: Callable[[int], Any] = lambda step: None
) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return build_adamw(model, find_layers(model), lr=1e-4, **options)


# ---- 2 and 3: what trains, and what the rest costs


@dataclass
class Watched:
    """What a run over three periods with γ = 2 and K = 2 showed."""

    drawn: list[tuple[int, ...]] = field(default_factory=list)
    moved: list[set[str]] = field(default_factory=list)
    with_gradient: list[set[str]] = field(default_factory=list)
    with_state: list[set[str]] = field(default_factory=list)
    elements: list[tuple[int, int]] = field(default_factory=list)
    """Of gradients and of moments, just after the optimizer's step and before anything is released."""
    after_draw: list[bool] = field(default_factory=list)
    """Whether, after each step, nothing but the blocks drawn next and the ends had state."""
    lisa: LISA | None = None
    blocks: list[set[str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def watched(loaded: nn.Module) -> Watched:
    model = copy.deepcopy(loaded)
    optimizer = adamw(model, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = Watched()

    def look(*_: Any) -> None:
        gradients = {names[p]: p.grad.numel() for p in names if p.grad is not None}
        moments = [v for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
        seen.with_gradient.append(set(gradients))
        seen.with_state.append({names[p] for p in optimizer.state})
        seen.elements.append((sum(gradients.values()), sum(value.numel() for value in moments)))

    optimizer.register_step_post_hook(look)  # runs before LISA's own
    lisa = seen.lisa = LISA(model, optimizer, active=2, period=2, verify="full")
    seen.blocks = [set(block) for block in lisa.layers.block_parameters(model)]
    for period in range(3):
        seen.drawn.append(lisa.active_blocks)
        before = tiny.weights(model)
        fit(
            model,
            optimizer,
            range(2 * period, 2 * period + 2),
            after=lambda _: seen.after_draw.append(set(optimizer.state) <= set(lisa.trainable_parameters())),
        )
        seen.moved.append(tiny.moved(before, model))
    return seen


def trained(watched: Watched, period: int) -> set[str]:
    """Parameter names of the ends and of the period's blocks."""
    assert watched.lisa is not None
    return set(watched.lisa.layers.ends).union(*(watched.blocks[i] for i in watched.drawn[period]))


def test_2_ends_and_drawn_blocks_move_and_all_others_are_bit_identical(watched: Watched) -> None:
    assert watched.moved == [trained(watched, period) for period in range(3)]
    assert watched.lisa is not None
    assert watched.lisa.periods_proven == 3
    assert sum(watched.lisa.visits) == 6


def test_3_frozen_blocks_have_neither_gradient_nor_state(watched: Watched) -> None:
    expected = [trained(watched, step // 2) for step in range(6)]
    assert watched.with_gradient == expected
    assert watched.with_state == expected
    assert all(watched.after_draw)


def test_3_gradients_and_moments_are_those_of_ends_and_two_blocks_to_the_element(watched: Watched) -> None:
    trains = ENDS + 2 * BLOCK
    assert watched.elements == [(trains, 2 * trains)] * 6


# ---- 1 and 10: what is in the optimizer


def test_1_every_parameter_is_needed_in_the_optimizer(loaded: nn.Module) -> None:
    parameters = dict(loaded.named_parameters())
    missing = "model.layers.17.mlp.up_proj.weight"
    del parameters[missing]
    with pytest.raises(ValueError, match=rf"parameter '{missing}' is not in the optimizer"):
        LISA(loaded, torch.optim.AdamW(parameters.values()))


def test_10_the_tied_embedding_is_one_end_and_counts_once(loaded: nn.Module) -> None:
    layers = find_layers(loaded)
    assert layers.ends == ("model.embed_tokens.weight", "model.norm.weight")
    assert layers.is_tied
    assert layers.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    held = [p for group in adamw(loaded).param_groups for p in group["params"]]
    assert len(set(held)) == len(held)
    assert sum(p.numel() for p in held) == ENDS + BLOCKS * BLOCK == 134_515_008


# ---- 9: the two limits


@pytest.mark.parametrize("active", [0, BLOCKS])
def test_9_no_block_is_training_the_ends_and_all_blocks_are_full_fine_tuning(
    loaded: nn.Module, active: int
) -> None:
    plain, model = copy.deepcopy(loaded), copy.deepcopy(loaded)
    optimizer = adamw(plain)
    if active == 0:
        for block in plain.model.layers:
            block.requires_grad_(False)
    fit(plain, optimizer, range(1))
    del optimizer
    optimizer = adamw(model)
    lisa = LISA(model, optimizer, active=active, period=1)
    fit(model, optimizer, range(1))
    assert lisa.periods_proven == 1
    tiny.assert_same_weights(model, plain)
    assert len(tiny.moved(tiny.weights(loaded), model)) == 2 + 9 * active


# ---- 6: resume


def test_6_resume_inside_a_period_is_bit_equal(loaded: nn.Module) -> None:
    def start() -> tuple[nn.Module, Optimizer, LISA]:
        model = copy.deepcopy(loaded)
        optimizer = adamw(model, weight_decay=0.1)
        return model, optimizer, LISA(model, optimizer, active=2, period=2, warmup=1, state="cpu")

    with tempfile.TemporaryDirectory() as folder:  # 0.8 GB: not in the tmp_path that pytest keeps
        model, optimizer, lisa = start()
        fit(model, optimizer, range(3))
        saved = save_checkpoint(folder, step=3, model=model, optimizer=optimizer)
        fit(model, optimizer, range(3, 5))
        resumed, its_optimizer, its_lisa = start()
        load_checkpoint(saved, model=resumed, optimizer=its_optimizer)
    assert (its_lisa.steps_done, its_lisa.active_blocks) == (3, lisa.sampler.draw(1, seed=0))
    fit(resumed, its_optimizer, range(3, 5))
    assert (its_lisa.active_blocks, its_lisa.visits) == (lisa.active_blocks, lisa.visits)
    tiny.assert_same_weights(resumed, model)
    mine, theirs = (states(*pair) for pair in ((resumed, its_optimizer), (model, optimizer)))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def states(model: nn.Module, optimizer: Optimizer) -> dict[tuple[str, str], Tensor]:
    """Every tensor of the optimizer's state by parameter and key."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {(names[p], key): value for p, state in optimizer.state.items() for key, value in state.items()}


# ---- 5 and 7: draws


def test_7_accumulated_micro_steps_do_not_count(model: nn.Module) -> None:
    optimizer = adamw(model)
    lisa = LISA(model, optimizer, active=2, period=1, ends="frozen")
    first = lisa.active_blocks
    for micro_step in range(3):
        backward(model, micro_step)
        assert (lisa.steps_done, lisa.active_blocks) == (0, first)
    optimizer.step()
    assert (lisa.steps_done, lisa.visits) == (1, [int(i in first) for i in range(BLOCKS)])
    assert lisa.active_blocks == lisa.sampler.draw(1, seed=0) != first


def test_5_draws_neither_read_nor_move_global_random_numbers(model: nn.Module) -> None:
    drawn = []
    for global_seed in (1, 2):
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        optimizer = adamw(model)
        lisa = LISA(model, optimizer, active=2, period=1, sampler="uniform", seed=5, ends="frozen")
        seen = [lisa.active_blocks]
        fit(model, optimizer, range(1), after=lambda _, lisa=lisa, seen=seen: seen.append(lisa.active_blocks))
        assert before == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
        drawn.append(seen)
        lisa.detach()
    assert drawn[0] == drawn[1]
