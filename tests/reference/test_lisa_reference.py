import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from lisatune import LISA
from lisatune.lisa.samplers import make_sampler
from reference.lisa_reference import train_reference

STEPS = 11
PERIOD = 3


@pytest.mark.parametrize("sampler", ["permutation", "uniform"])
@pytest.mark.parametrize("active", [0, 1, 2, 6])
def test_lisa_is_a_fresh_adamw_per_period_bit_for_bit(
    tiny_llama: LlamaForCausalLM, active: int, sampler: str
) -> None:
    twin = copy.deepcopy(tiny_llama)
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2, weight_decay=0.1)
    options: dict[str, Any] = {"seed": 3, "state": "reset", "lr_scaling": "none"}
    LISA(tiny_llama, optimizer, active=active, period=PERIOD, sampler=sampler, **options)
    tiny.fit(tiny_llama, optimizer, STEPS)

    draws = make_sampler(sampler, active, 6)
    drawn = [draws.draw(period, seed=3) for period in range(-(-STEPS // PERIOD))]
    train_reference(twin, drawn, period=PERIOD, steps=STEPS, lr=1e-2, weight_decay=0.1)
    tiny.assert_same_weights(tiny_llama, twin)


def test_reference_tells_other_draws_apart(tiny_llama: LlamaForCausalLM) -> None:
    """The comparison above would fail for a draw one step late or one block off."""
    twin = copy.deepcopy(tiny_llama)
    for model, drawn in ((tiny_llama, [(0,), (1,)]), (twin, [(0,), (2,)])):
        train_reference(model, drawn, period=2, steps=4, lr=1e-2, weight_decay=0.1)
    assert tiny.moved(tiny.weights(twin), tiny_llama)
