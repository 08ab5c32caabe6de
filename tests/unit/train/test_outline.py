"""The outline of a run: counted from the model itself, the same with and without weights."""

import dataclasses
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from lisatune.data.batches import Order
from lisatune.methods import Full, Lisa, Method
from lisatune.nn.layers import find_layers
from lisatune.recipe import DataConfig, LossConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.train.outline import Outline, make_outline, print_outline

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    tie_word_embeddings=True,
)
ENDS = 128 * 32 + 32
BLOCK = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32 + 2 * 32


def outline_of(
    method: Method,
    device: str = "meta",
    start_step: int = 0,
    loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    **run: Any,
) -> Outline:
    recipe = Recipe(
        loss=loss,
        model=ModelConfig(name="tiny"),
        data=DataConfig(train="rows.jsonl", max_length=64),
        method=method,
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=5),
        run=RunConfig(output="runs/tiny", **run),
    )
    counts = {"num_cut": 3, "num_without_loss": 1, "num_split": 0, "num_dropped": 0, "lost_share": 0.014}
    examples: Any = SimpleNamespace(rows=[0] * 1200, num_tokens=50_000, num_loss_tokens=20_000, **counts)
    data: Any = SimpleNamespace(
        train=examples,
        validation=examples,
        steps=30,
        skipped=2,
        num_media=5,
        duplicates=0,
        records="alpaca",
        rows_per_record=1,
        sources=(),
        stream=None,
        order=Order(1200, run.get("batch_size", RunConfig.batch_size), 0),
        mark=lambda row: (("Why\x1b[31m?\n" + "so " * 50, False), ("Because", True)),
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIG)
    layers = find_layers(model)
    optimizer = method.build_optimizer(model, layers, OptimizerConfig(lr=1e-4))
    lisa = method.attach(model, optimizer, layers, total_steps=data.steps)
    return make_outline(recipe, model, layers, lisa, data, device="cpu", start_step=start_step)


def shown(outline: Outline) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_outline(outline, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_parameters_are_counted_once_and_by_kind() -> None:
    outline = outline_of(Lisa(active=2))
    assert (outline.end_parameters, outline.block_parameters, outline.num_blocks) == (ENDS, 6 * BLOCK, 6)
    assert outline.num_parameters == ENDS + 6 * BLOCK
    assert outline.trainable == ENDS + 2 * BLOCK
    assert outline.is_tied
    assert outline.active_blocks is not None
    assert len(outline.active_blocks) == 2


@pytest.mark.parametrize("method", [Lisa(period=4), Full()], ids=["lisa", "full"])
def test_the_outline_is_the_same_without_weights(method: Method) -> None:
    assert outline_of(method, "meta") == outline_of(method, "cpu")


def test_visits_say_how_often_each_block_will_train() -> None:
    outline = outline_of(Lisa(active=2, period=5))
    assert (outline.period, outline.visits) == (5, (2,) * 6)
    out = shown(outline)
    assert "30 in 6 periods of 5" in out
    assert "██████ each block trains in 2 periods" in out


def test_blocks_that_never_train_are_a_dot() -> None:
    with pytest.warns(UserWarning, match="will never train"):
        outline = outline_of(Lisa(active=1, period=15))
    assert "0 to 1 period" in shown(outline)
    assert shown(outline).count("·") == 4


def test_rates_that_differ_between_blocks_are_a_range() -> None:
    outline = outline_of(Lisa(period=1, sampler="independent", probabilities=(1, 0.25, 0.25, 0.5, 1, 1)))
    assert outline.lr.startswith("0.0001 (blocks 0.0001 to 0.0002), ")


def test_the_outline_reads_well_in_100_columns() -> None:
    out = shown(outline_of(Lisa(active=3, period=5, state="reset"), start_step=10, accumulation=2))
    for part in (
        "tiny, 59.8k parameters: ends 4.1k (embedding = head) + 6 blocks 55.7k",
        "lisa, active 3, period 5, state reset",
        "32.0k parameters at a time, 53.5%; now blocks",
        "30 in 6 periods of 5, 10 done already; each 2 × 4 rows of up to 64 tokens",
        "0.0001 (blocks 0.000141), cosine after 5 warm-up steps",
        "1,200 rows, 50.0k tokens, 20.0k with loss; 3 cut at max_length; 1 dropped: no answer",
        "5 without images, sound or videos",
        "Why�[31m?↵so so so",
        "⟦Because⟧",
        "cpu, bf16-mixed",
        "runs/tiny",
    ):
        assert part in out, out
    assert max(map(len, out.splitlines())) <= 100


def test_lists_of_names_are_shown_and_lists_of_numbers_are_counted() -> None:
    named = outline_of(Lisa(period=5, correction="lora", correction_matrices=("o_proj", "q_proj")))
    assert "correction_matrices o_proj q_proj" in shown(named)
    numbers = outline_of(Lisa(period=5, sampler="weighted", probabilities=(1, 1, 1, 1, 1, 1)))
    assert "probabilities 6 numbers" in shown(numbers)


def test_the_limit_of_held_out_rows_is_named_where_it_counts() -> None:
    outline = outline_of(Full())
    assert "(data.validation_limit)" not in shown(outline)
    limited = dataclasses.replace(outline, validation_limit=outline.validation_rows)
    assert f"{outline.validation_rows:,} rows (data.validation_limit), " in shown(limited)


def test_full_fine_tuning_has_no_periods() -> None:
    out = shown(outline_of(Full()))
    assert "100.0%" in out
    assert "period" not in out
    assert "blocks " in out


def test_a_reward_model_without_the_samples_of_the_recipe_is_said() -> None:
    reward = LossConfig(name="reward")
    said = "samples   none, because a reward model writes no text"
    assert said in shown(outline_of(Full(), loss=reward))
    assert "samples" not in shown(outline_of(Full(), loss=reward, samples=0)) + shown(outline_of(Full()))


def test_a_batch_larger_than_an_epoch_shows_the_rows_that_a_step_has() -> None:
    assert outline_of(Full(), batch_size=1200).batch == "1200 rows of up to 64 tokens"
    more = outline_of(Full(), batch_size=1201, accumulation=2).batch
    assert more == "2 × 1,200 rows, all that an epoch has, of up to 64 tokens"
