"""Blocks divided into the modules that hold their matrices."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

import tiny
from lisatune import find_layers
from lisatune.nn.units import UnitMap, divide_blocks

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def units_of(model: nn.Module) -> UnitMap:
    return divide_blocks(find_layers(model), model)


def test_the_units_of_a_llama_are_its_seven_matrices_and_norms_go_with_the_first() -> None:
    model = tiny.llama(tied=True)
    units = units_of(model)
    assert units.blocks == tuple(f"model.layers.{block}.{path}" for block in range(6) for path in LLAMA)
    assert units.of_block == tuple(block for block in range(6) for _ in LLAMA)
    first, *others = units.block_parameters(model)[:7]
    norms = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert first.keys() == {"model.layers.0.self_attn.q_proj.weight"} | norms
    assert all(len(unit) == 1 for unit in others)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64),
        MixtralConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            num_local_experts=4,
        ),
    ],
    ids=["gpt2", "mixtral"],
)
def test_units_hold_each_parameter_of_the_blocks_once(config: object) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, units = find_layers(model), units_of(model)
    names = [name for block in layers.block_parameters(model) for name in block]
    assert sorted(names) == sorted(name for unit in units.block_parameters(model) for name in unit)
    assert all(any(p.ndim >= 2 for p in unit.values()) for unit in units.block_parameters(model))
    assert units.num_blocks > 2 * layers.num_blocks
    assert (units.ends, units.frozen, units.head) == (layers.ends, layers.frozen, layers.head)


def test_a_matrix_that_does_not_require_grad_is_no_unit() -> None:
    model = tiny.llama()
    model.get_submodule("model.layers.1.mlp.up_proj").requires_grad_(False)
    units = units_of(model)
    assert "model.layers.1.mlp.up_proj" not in units.blocks
    of_query = units.block_parameters(model)[units.blocks.index("model.layers.1.self_attn.q_proj")]
    assert "model.layers.1.mlp.up_proj.weight" in of_query


def test_a_block_without_a_matrix_is_one_unit() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    units = divide_blocks(find_layers(model, blocks=""), model)
    assert units.blocks == ("0", "1.1")
    assert [len(unit) for unit in units.block_parameters(model)] == [2, 4]
