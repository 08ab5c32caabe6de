"""Whole runs with bf16 weights, compact moments and update in backward."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from lisatune.methods.optimizers import build_optimizer
from lisatune.models.load import load_model
from lisatune.nn.layers import find_layers
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.train.check import check
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe

KINDS = ["{}", "{rounding: stochastic}", "{moments: bf16}", "{moments: factored}"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_run.write_model(tmp_path / "model")


def recipe(tmp_path: Path, model: Path, optimizer: str = "{}", **overrides: Any) -> Recipe:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    path = tiny_run.write_recipe(tmp_path, model, rows)
    keys = {"run.precision": "bf16", **overrides}
    options = dict(part.split(": ") for part in optimizer.strip("{}").split(", ") if part)
    keys |= {f"optimizer.{key}": value for key, value in options.items()}
    return load_recipe(path, [f"{key}={value}" for key, value in keys.items()])


@pytest.mark.parametrize("optimizer", [*KINDS, "{in_backward: true, max_grad_norm: null}"])
def test_a_run_in_bf16_learns_and_saves_bf16(tmp_path: Path, model: Path, optimizer: str) -> None:
    summary = train(recipe(tmp_path, model, optimizer))
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:.*blocks will never train")
@pytest.mark.parametrize("optimizer", [*KINDS, "{in_backward: true, max_grad_norm: null}"])
def test_resume_inside_a_period_is_bit_exact(tmp_path: Path, model: Path, optimizer: str) -> None:
    keys = {"method.period": 3, "run.save_every": 2, "optimizer.schedule": "constant"}
    results = []
    for name, stops in (("straight", [6]), ("resumed", [2, 6])):
        for i, steps in enumerate(stops):
            output = {"run.output": tmp_path / name, "run.steps": steps}
            train(recipe(tmp_path, model, optimizer, **keys, **output), resume=i > 0)
        results.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    straight, resumed = results
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_state_in_host_memory_is_asked_of_every_group(tmp_path: Path, model: Path) -> None:
    asked = recipe(tmp_path, model, "{state_device: cpu}").optimizer
    network = load_model(str(model), dtype=torch.bfloat16)
    optimizer = build_optimizer(network, find_layers(network), asked)
    assert {group["state_device"] for group in optimizer.param_groups} == {"cpu"}
    with pytest.raises(ValueError, match=r"optimizer\.state_device.*disk"):
        recipe(tmp_path, model, "{state_device: disk}")


def test_an_infinite_loss_stops_before_the_weights_take_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lisatune.losses.causal_lm import CausalLMLoss

    plain = CausalLMLoss.__call__

    def infinite(self: Any, batch: Any) -> Any:
        total, count = plain(self, batch)
        return (total * math.inf if total.requires_grad else total), count

    monkeypatch.setattr(CausalLMLoss, "__call__", infinite)
    options = "{in_backward: true, max_grad_norm: null}"
    with pytest.raises(RuntimeError, match="loss inf, gradient norm 0; weights are as before this step"):
        train(recipe(tmp_path, model, options))


def test_16_bit_models_loaded_wide_are_noticed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for precision in ("fp32", "bf16-mixed"):
        found = check(recipe(tmp_path, model, **{"run.precision": precision})).warnings
        assert len([w for w in found if "bytes more; run.precision: bf16" in w]) == 1
    assert not [w for w in check(recipe(tmp_path, model)).warnings if "bytes more" in w]


@pytest.mark.parametrize(
    ("optimizer", "run", "message"),
    [
        ({"in_backward": True}, {}, "optimizer.max_grad_norm=1.0; set it to null"),
        ({"in_backward": True, "max_grad_norm": None}, {"accumulation": 2}, "accumulation=2 is impossible"),
        ({"rounding": "up"}, {}, "optimizer.rounding must be one of exact, stochastic, nearest, got 'up'"),
        ({"moments": "fp8"}, {}, "optimizer.moments must be one of fp32, bf16, 8bit, factored, got 'fp8'"),
    ],
)
def test_what_cannot_work_is_refused(optimizer: Any, run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(
            model=ModelConfig(name="m"),
            data=DataConfig(train="d"),
            method=None,
            optimizer=OptimizerConfig(**optimizer),
            run=RunConfig(**run),
        )
