"""`run.compile: auto`: who compiles, from which length of a run on, that a resumed run does as before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lisatune.train.compiling
import tiny_run
from lisatune.nn.layers import find_layers
from lisatune.train.compiling import USUAL_SPEED, WORTH_SECONDS, CompileChoice, choose_compile
from lisatune.train.flops import needed_flops
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe, recipe_without_file
from lisatune.train.resume import RunState

PEAK = 1e9
CARD = torch.device("cuda")
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True)
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisatune.train.compiling, "peak_flops", lambda device: PEAK)
    monkeypatch.setattr(lisatune.train.compiling, "_has_triton", lambda: True)


def decide(steps: int, *keys: str, device: torch.device = CARD) -> CompileChoice:
    """Decide for rows of 10 and 30 tokens, two in each step."""
    recipe = recipe_without_file(["model.name=tiny", "data.train=rows.jsonl", "run.batch_size=2", *keys])
    model = AutoModelForCausalLM.from_config(CONFIG)
    data: Any = SimpleNamespace(
        steps=steps, rows_per_record=1, train=SimpleNamespace(rows=[0, 0], num_tokens=40)
    )
    return choose_compile(recipe, device, model, find_layers(model), data)


def steps_that_pay() -> int:
    model = AutoModelForCausalLM.from_config(CONFIG)
    flops = needed_flops(model, find_layers(model), [20, 20])
    assert flops is not None
    return -(-int(WORTH_SECONDS * USUAL_SPEED * PEAK) // flops)


def test_a_run_compiles_from_the_length_on_that_pays() -> None:
    steps = steps_that_pay()
    assert decide(steps).compiles
    assert not decide(steps - 1).compiles
    assert decide(steps).why.startswith("compiled: about 20:00 of steps")
    assert decide(steps // 2).why.startswith("not compiled: about 10:00 of steps")


def test_what_the_recipe_says_is_done() -> None:
    assert decide(1, "run.compile=true") == CompileChoice(True, "compiled")
    assert decide(10**6, "run.compile=false") == CompileChoice(False, "")


@pytest.mark.parametrize("keys", [["method.name=prefix"], ["method.unit=module"], ["method.name=mezo"]])
def test_a_method_that_cannot_run_compiled_is_left_as_it_is(keys: list[str]) -> None:
    choice = decide(10**6, *keys)
    assert not choice.compiles
    assert "cannot run compiled" in choice.why


def test_a_cpu_and_an_unknown_card_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(10**6, device=torch.device("cpu")) == CompileChoice(False, "")
    monkeypatch.setattr(lisatune.train.compiling, "peak_flops", lambda device: None)
    assert "not known" in decide(10**6).why


def test_a_resumed_run_keeps_the_answer_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_run.write_model(tmp_path / "model")
    recipe = tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl", 8))
    keys = [f"run.output={tmp_path / 'run'}", "run.samples=0", "run.check_memory=false", "method.active=4"]
    keys += ["run.steps=3", "run.save_every=1"]

    def stop(state: RunState) -> None:
        if state.step == 2:
            raise LookupError

    with pytest.raises(LookupError):
        train(load_recipe(recipe, keys), after_step=stop)
    assert "compile: false" in (tmp_path / "run" / "recipe.yaml").read_text()
    asked = []

    def choose_and_note(recipe: Any, *args: Any) -> CompileChoice:
        asked.append(recipe.run.compile)
        return CompileChoice(recipe.run.compile)

    monkeypatch.setattr("lisatune.train.assemble.choose_compile", choose_and_note)
    train(load_recipe(recipe, keys), resume=True)
    assert asked == [False]
