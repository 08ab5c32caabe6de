"""Blocks that are left out of a trace are counted as if they had run, to the byte."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

from lisatune.memory import equal_blocks, plan, trace
from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 2}
LLAMA = LlamaConfig(
    **SIZES, num_hidden_layers=7, vocab_size=200, num_key_value_heads=1, tie_word_embeddings=False
)
GPT2 = GPT2Config(vocab_size=200, n_embd=32, n_layer=7, n_head=2, n_positions=64)
SLIDING = Gemma3TextConfig(
    **SIZES, num_hidden_layers=6, vocab_size=200, num_key_value_heads=1, head_dim=16, sliding_window=8
)
"""The sixth block attends to everything, the five before it to their neighbours."""


def make_recipe(method: str = "lisa", optimizer: Any = None, **options: Any) -> Recipe:
    run = {"precision": "fp32", "batch_size": 2, "steps": 400, "device": "cpu"}
    run |= {key: value for key, value in options.items() if key in RunConfig.__dataclass_fields__}
    own = {key: value for key, value in options.items() if key not in run}
    return Recipe(
        model=ModelConfig(name="x"),
        data=DataConfig(train="x", max_length=24),
        method=METHODS[method](**own),
        optimizer=OptimizerConfig(**(optimizer or {})),
        run=RunConfig(**run),
    )


def plan_in_full(recipe: Recipe, config: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> MemoryPlan:
    """Plan with every block and every update traced."""
    with monkeypatch.context() as patch:
        patch.setattr(equal_blocks, "TRACED", 99)
        patch.setattr(trace, "set_aside", lambda optimizer: [])
        return plan_memory(recipe, config=config, **options)


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each trace left out."""
    counts: list[int] = []
    end_step = equal_blocks.FewerBlocks.end_step

    def count(self: equal_blocks.FewerBlocks) -> Any:
        counts.append(sum(each.left_out for each in self._passes))
        return end_step(self)

    monkeypatch.setattr(equal_blocks.FewerBlocks, "end_step", count)
    return counts


@pytest.mark.parametrize(
    ("config", "recipe", "blocks"),
    [
        (LLAMA, make_recipe(accumulation=2), (0, 6)),
        (LLAMA, make_recipe(precision="bf16", activation_checkpointing="frozen"), (0, 6)),
        (LLAMA, make_recipe(ends="frozen", activation_checkpointing=True), (5, 6)),
        (
            LLAMA,
            make_recipe(precision="bf16", optimizer={"moments": "8bit", "rounding": "stochastic"}),
            (0, 1),
        ),
        (GPT2, make_recipe("badam"), (0,)),
        (SLIDING, make_recipe("ends"), None),
    ],
    ids=["fp32", "bf16", "frozen ends", "8bit", "gpt2", "sliding"],
)
def test_a_short_trace_gives_the_bytes_of_the_full_one(
    config: Any,
    recipe: Recipe,
    blocks: tuple[int, ...] | None,
    left_out: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = plan_memory(recipe, config=config, blocks=blocks)
    assert min(left_out) > 0
    full = plan_in_full(recipe, config, monkeypatch, blocks=blocks)
    assert replace(short, seconds=0.0) == replace(full, seconds=0.0)
    assert short.kind == "traced"


def widen(model: nn.Module, block: int) -> nn.Module:
    """Make the MLP of one block four times as wide."""
    mlp = model.get_submodule(f"model.layers.{block}.mlp")
    for name, shape in {"gate_proj": (32, 384), "up_proj": (32, 384), "down_proj": (384, 32)}.items():
        setattr(mlp, name, nn.Linear(*shape, bias=False, device="meta"))
    return model


def test_a_block_of_another_shape_runs(left_out: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    build = plan._build_meta_model
    monkeypatch.setattr(plan, "_build_meta_model", lambda *args: widen(build(*args), 5))
    recipe = make_recipe("ends")
    short = plan_memory(recipe, config=LLAMA)
    assert left_out == [1]
    full = plan_in_full(recipe, LLAMA, monkeypatch)
    assert replace(short, seconds=0.0) == replace(full, seconds=0.0)


def test_blocks_that_only_seem_equal_are_all_traced(
    left_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = plan._build_meta_model
    monkeypatch.setattr(plan, "_build_meta_model", lambda *args: widen(build(*args), 1))
    monkeypatch.setattr(equal_blocks, "_describe", lambda block: "equal")
    recipe = make_recipe("ends")
    short = plan_memory(recipe, config=LLAMA)
    assert left_out == [3, 0]
    full = plan_in_full(recipe, LLAMA, monkeypatch)
    assert replace(short, seconds=0.0) == replace(full, seconds=0.0)


def test_blocks_have_their_own_forward_back_afterwards() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).requires_grad_(False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with equal_blocks.FewerBlocks(model, optimizer, list(model)):
        assert "forward" in vars(model[0])
    assert not any("forward" in vars(block) for block in model)
