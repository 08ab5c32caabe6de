"""BAdam against a plain twin and the authors' package; `ends`, which is LISA too; what both refuse."""

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
import tiny_run
from lisatune.cli.app import main
from lisatune.lisa.groups import build_adamw
from lisatune.methods import BAdam, EndsOnly, Method
from lisatune.nn.layers import find_layers
from lisatune.train.assemble import rehearse
from lisatune.train.recipe_file import load_recipe

LR, EVERY, STEPS = 1e-2, 2, 9
ORDERS = {"ascending": [0, 1, 2, 0, 1], "descending": [2, 1, 0, 2, 1]}


def fit(method: Method) -> LlamaForCausalLM:
    model = tiny.llama(blocks=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    method.attach(model, optimizer, find_layers(model), total_steps=STEPS)
    tiny.fit(model, optimizer, STEPS)
    return model


@pytest.mark.parametrize("mode", ORDERS)
def test_each_switch_starts_a_new_adamw_over_the_next_block(mode: str) -> None:
    model = tiny.llama(blocks=3)
    for number, block in enumerate(ORDERS[mode]):
        model.requires_grad_(False)
        active = list(model.model.layers[block].requires_grad_(True).parameters())
        steps = range(number * EVERY, min((number + 1) * EVERY, STEPS))
        tiny.fit(model, torch.optim.AdamW(active, lr=LR, weight_decay=0.0), steps)
    ours = fit(BAdam(switch_every=EVERY, switch_mode=mode))  # type: ignore[arg-type]
    tiny.assert_same_weights(ours, model)


@pytest.mark.parametrize("mode", ORDERS)
def test_weights_are_those_of_the_authors_package(mode: str) -> None:
    badam = pytest.importorskip("badam", reason="pip install --no-deps badam==1.4")
    model = tiny.llama(blocks=3)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # that weights are float32
        optimizer = badam.BlockOptimizer(
            adamw, list(model.named_parameters()), switch_block_every=EVERY, switch_mode=mode, verbose=0
        )
        optimizer.global_step = -1  # else its first block has one step less than all others
        tiny.fit(model, optimizer, STEPS)
    ours = fit(BAdam(switch_every=EVERY, switch_mode=mode))  # type: ignore[arg-type]
    tiny.assert_same_weights(ours, model)


def test_random_order_is_a_shuffled_pass_and_follows_the_seed() -> None:
    passes = []
    for seed in range(8):
        model = tiny.llama(blocks=3)
        layers = find_layers(model)
        method = BAdam(switch_every=1, switch_mode="random", seed=seed)
        lisa = method.attach(model, build_adamw(model, layers, lr=LR), layers, total_steps=3)
        assert lisa is not None
        passes.append([lisa.sampler.draw(period, seed=seed)[0] for period in range(3)])
    assert all(sorted(blocks) == [0, 1, 2] for blocks in passes)
    assert len({tuple(blocks) for blocks in passes}) > 1


def test_no_end_moves_under_badam_and_no_block_under_ends() -> None:
    ends = set(find_layers(tiny.llama(blocks=3)).ends)
    before = tiny.weights(tiny.llama(blocks=3))
    assert tiny.moved(before, fit(EndsOnly())) == ends
    assert tiny.moved(before, fit(BAdam(switch_every=EVERY))) == before.keys() - ends


def test_ends_that_would_leave_nothing_to_train_are_not_proposed() -> None:
    assert EndsOnly().alternatives(4).cheaper_ends == (
        {"ends": "8bit"},
        {"ends": "factored"},
        {"ends": "head+factored"},
    )
    assert {"ends": "frozen"} in BAdam(ends="train").alternatives(4).cheaper_ends


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=badam", "method.switch_every=0"], "method.switch_every must be >= 1 or auto, got 0"),
        (["method.name=badam", "method.switch_mode=decending"], "Did you mean 'descending'?"),
        (["method.name=badam", "method.ends=frosen"], "there is no 'frosen'"),
        (["method.name=badam", "method.active=2"], "unknown key 'method.active' of method badam"),
        (["method.name=ends", "method.ends=frozen"], "'frozen' of method ends would leave steps in which"),
        (["method.name=ends", "method.ends=every:2"], "'every:2' of method ends would leave steps in which"),
        (["method.name=endz"], "Did you mean 'ends'?"),
    ],
)
def test_bad_input_is_one_sentence(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_run.write_model(tmp_path / "tiny")
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, model, rows, "method: {}\n")
    assert main(["train", str(recipe), *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["badam, switch_every: 1", "greedy, ends: frozen"])
def test_rows_of_new_tokens_train_alone_beside_frozen_ends(tmp_path: Path, method: str) -> None:
    model, rows = tiny_run.write_model(tmp_path / "model"), tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, model, rows, f"method: {{name: {method}}}\n")
    asked = load_recipe(recipe, ["model.new_tokens=[<new>]", "optimizer.ends_lr=1e-2"])
    prepared, layers, _ = rehearse(asked, steps=4)
    ends = [name for name, p in layers.end_parameters(prepared).items() if p.requires_grad]
    assert ends == ["model.embed_tokens.weight"]
