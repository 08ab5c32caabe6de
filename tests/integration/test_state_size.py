"""What LISA keeps in memory, counted to the element on the shape of SmolLM2-135M."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA, LayerMap, build_adamw, find_layers

ENDS = 49_152 * 576 + 576  # tied embedding and head, final norm
BLOCK = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536 + 2 * 576  # q k v o, gate up down, two norms


@pytest.fixture
def model() -> LlamaForCausalLM:
    """134,515,008 parameters without their memory: on the meta device steps are shapes only."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def count_state(optimizer: torch.optim.Optimizer) -> int:
    """Elements of both moments."""
    return sum(state[key].numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


def take_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Train one step and count the gradients' elements just before it."""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    model(ids, labels=ids).loss.backward()
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def layers_of(model: LlamaForCausalLM) -> LayerMap:
    layers = find_layers(model)
    assert ENDS + 30 * BLOCK == model.num_parameters() == 134_515_008
    return layers


def test_state_and_gradients_are_those_of_ends_and_two_blocks_to_the_element(model: LlamaForCausalLM) -> None:
    optimizer = build_adamw(model, layers_of(model), lr=1e-5)
    peaks: list[int] = []
    optimizer.register_step_post_hook(lambda *_: peaks.append(count_state(optimizer)))  # before LISA's own
    lisa = LISA(model, optimizer, active=2, period=2, verify="off")
    gradients = [take_step(model, optimizer) for _ in range(12)]
    assert gradients == [ENDS + 2 * BLOCK] * 12
    assert peaks == [2 * (ENDS + 2 * BLOCK)] * 12
    assert sorted(lisa.visits) == [0] * 18 + [1] * 12


def test_frozen_ends_cost_no_state(model: LlamaForCausalLM) -> None:
    optimizer = build_adamw(model, layers_of(model), lr=1e-5)
    LISA(model, optimizer, active=2, period=2, ends="frozen", verify="off")
    assert take_step(model, optimizer) == 2 * BLOCK
    assert count_state(optimizer) == 2 * 2 * BLOCK
