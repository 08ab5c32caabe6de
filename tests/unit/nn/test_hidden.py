"""Prompt and prefix tuning: the loss with virtual tokens is PEFT's, and what can't work is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import tiny
import tiny_run
from lisatune.cli.app import main
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import plan_memory
from lisatune.methods import Method, Prefix, Prompt
from lisatune.nn.hidden import max_positions, num_virtual_tokens
from lisatune.train.recipe_file import load_recipe

METHODS = [
    Prompt(tokens=3),
    Prompt(tokens=3, init="random"),
    Prefix(tokens=3),
    Prefix(tokens=3, projection=8),
]
SIZES: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "llama": tiny.llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **SIZES)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SIZES
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loss_and_gradient_are_those_of_pefts_own_logits(method: Method, name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    loss = CausalLMLoss(model)
    peft_model: Any = method.prepare(model).eval()
    loss.follow(peft_model)
    ids_BT = tiny.tokens(0)
    batch = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": torch.arange(8).expand(2, -1)}
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    total, _ = loss(batch)
    logits_BTV = peft_model(input_ids=ids_BT).logits[:, -8:]
    wanted = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, wanted)
    ours, theirs = torch.autograd.grad(total, trained), torch.autograd.grad(wanted, trained)
    torch.testing.assert_close(ours, theirs)
    assert max(float(g.abs().max()) for g in ours) > 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_start_of_a_run_proves_that_the_prompt_reaches_the_loss(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama()
    loss = CausalLMLoss(model)
    prepared = method.prepare(model)
    with torch.no_grad():
        for p in prepared.parameters():
            p.mul_(20 if p.requires_grad else 5)  # so that the virtual tokens tell on the logits
    monkeypatch.setattr(
        "lisatune.nn.hidden._with_prompt",
        lambda model, config, ids_BT, positions_BT: ({"input_ids": ids_BT}, positions_BT),
    )
    with pytest.raises(ValueError, match="virtual tokens do not work with this model"):
        loss.follow(prepared)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_virtual_tokens_take_room_of_the_longest_sequence(method: Method) -> None:
    model = tiny.llama()
    longest = max_positions(model)
    assert longest is not None
    assert num_virtual_tokens(model) == 0
    prepared = method.prepare(model)
    assert num_virtual_tokens(prepared) == 3
    assert max_positions(prepared) == longest - 3


def write_recipe(folder: Path) -> Path:
    model = tiny_run.write_model(folder / "tiny")
    return tiny_run.write_recipe(folder, model, tiny_run.write_rows(folder / "rows.jsonl"), "method: {}\n")


def test_plan_counts_what_trains(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    prompt = plan_memory(load_recipe(recipe, ["method.name=prompt", "method.tokens=5"]))
    prefix = plan_memory(load_recipe(recipe, ["method.name=prefix", "method.tokens=5"]))
    assert (prompt.kind, prefix.kind) == ("traced", "traced")
    assert prompt.trainable == 5 * 16
    assert prefix.trainable == 5 * 2 * tiny_run.BLOCKS * 8  # one key head of width 8
    more = plan_memory(load_recipe(recipe, ["method.name=prompt", "method.tokens=50"]))
    assert more.at_peak["activations"] > 1.3 * prompt.at_peak["activations"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=prompt", "method.tokens=0"], "method.tokens must be >= 1, got 0"),
        (["method.name=prefix", "method.projection=0"], "method.projection must be >= 1, got 0"),
        (["method.name=prompt", "method.init=text"], "method.init must be vocabulary or random, got 'text'"),
        (
            ["method.name=prompt", "data.packing=true"],
            "data.packing cannot work with method prompt: only the",
        ),
        (
            ["method.name=prefix", "data.packing=true"],
            "data.packing cannot work with method prefix: only the",
        ),
        (["method.name=prefix", "run.compile=true"], "run.compile cannot work with method prefix: compiled"),
        (
            ["method.name=prefix", "run.activation_checkpointing=frozen"],
            "run.activation_checkpointing cannot work with method prefix: blocks that run again",
        ),
        (["method.name=prompt", "method.tokens=230"], "the model reads at most 26; set data.max_length=26"),
        (["method.name=promt"], "Did you mean 'prompt'?"),
    ],
)
def test_bad_input_is_one_sentence(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(tmp_path)), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
