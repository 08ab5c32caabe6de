import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from lisatune import LISA
from lisatune.lisa.samplers import make_sampler
from reference.lisa_reference import train_by_flags, train_reference

STEPS = 11
PERIOD = 3


@pytest.mark.parametrize("sampler", ["permutation", "uniform"])
@pytest.mark.parametrize("active", [0, 1, 2, 6])
def test_lisa_is_a_fresh_adamw_per_period_bit_for_bit(active: int, sampler: str) -> None:
    model = tiny.llama(tied=sampler == "uniform")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options: dict[str, Any] = {"seed": 3, "state": "reset", "lr_scaling": "none"}
    LISA(model, optimizer, active=active, period=PERIOD, sampler=sampler, **options)
    tiny.fit(model, optimizer, STEPS)

    draws = make_sampler(sampler, active, 6)
    drawn = [draws.draw(period, seed=3) for period in range(-(-STEPS // PERIOD))]
    train_reference(twin, drawn, period=PERIOD, steps=STEPS, lr=1e-2, weight_decay=0.1)
    tiny.assert_same_weights(model, twin)


@pytest.mark.parametrize("active", [0, 1, 2, 6])
def test_kept_state_is_what_callbacks_that_toggle_requires_grad_do(active: int) -> None:
    """docs/from-callbacks.md says so to who comes from one of them."""
    model = tiny.llama(tied=active == 1)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options: dict[str, Any] = {"sampler": "uniform", "seed": 3, "state": "keep", "lr_scaling": "none"}
    LISA(model, optimizer, active=active, period=PERIOD, **options)
    tiny.fit(model, optimizer, 2 * STEPS)

    draws = make_sampler("uniform", active, 6)
    drawn = [draws.draw(period, seed=3) for period in range(-(-2 * STEPS // PERIOD))]
    train_by_flags(twin, drawn, period=PERIOD, steps=2 * STEPS, lr=1e-2, weight_decay=0.1)
    tiny.assert_same_weights(model, twin)


def test_reference_tells_other_draws_apart(tiny_llama: LlamaForCausalLM) -> None:
    """The comparison above would fail for a draw one step late or one block off."""
    twin = copy.deepcopy(tiny_llama)
    for model, drawn in ((tiny_llama, [(0,), (1,)]), (twin, [(0,), (2,)])):
        train_reference(model, drawn, period=2, steps=4, lr=1e-2, weight_decay=0.1)
    assert tiny.moved(tiny.weights(twin), tiny_llama)
