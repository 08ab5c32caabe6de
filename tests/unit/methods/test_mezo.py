"""MeZO: what its two passes and its steps leave behind, what it takes, and what it refuses."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
import tiny_run
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.memory.tracker import measure
from lisatune.methods import METHODS, MeZO
from lisatune.methods.build import build
from lisatune.methods.mezo import MeZOStep, perturb, perturbed_layers
from lisatune.models.load import load_model
from lisatune.nn.layers import find_layers
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState

CPU = torch.device("cpu")


def make_step(model: nn.Module, clip: float | None = None, **options: Any) -> MeZOStep:
    method = MeZO(epsilon=1e-3)
    optimizer = method.build_optimizer(model, find_layers(model), OptimizerConfig(**options))
    step = method.build_step(
        model, CausalLMLoss(model), optimizer, device=CPU, autocast=None, max_grad_norm=clip
    )
    assert isinstance(step, MeZOStep)
    return step


def batch(step: int = 0, **sizes: int) -> dict[str, Tensor]:
    ids = tiny.tokens(step, **sizes)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def make_recipe(**options: Any) -> Recipe:
    method = {key: value for key, value in options.items() if key in MeZO.__dataclass_fields__}
    run = {key: value for key, value in options.items() if key in RunConfig.__dataclass_fields__}
    optimizer = {key: value for key, value in options.items() if key in OptimizerConfig.__dataclass_fields__}
    data = {key: value for key, value in options.items() if key in DataConfig.__dataclass_fields__}
    return Recipe(
        model=ModelConfig(name="x"),
        data=DataConfig(**{"train": "x", "max_length": 96} | data),
        method=MeZO(**method),
        optimizer=OptimizerConfig(**optimizer),
        run=RunConfig(**{"device": "cpu", "batch_size": 2, "steps": 9} | run),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_leave_every_weight_bit_identical_and_no_gradient(dtype: torch.dtype) -> None:
    model = tiny.llama(tied=True).to(dtype)
    before, step = tiny.weights(model), make_step(model)
    training = {module: module.training for module in model.modules()}
    for number in range(3):
        step.backward([batch(number)])
        assert not tiny.moved(before, model)
    assert all(p.grad is None for p in model.parameters())
    assert {module: module.training for module in model.modules()} == training


def test_a_pass_that_fails_leaves_every_weight_as_it_was() -> None:
    model = tiny.llama()
    before, step = tiny.weights(model), make_step(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        step.backward([batch()])
    assert not tiny.moved(before, model)
    assert not model.model.layers[2]._forward_pre_hooks


def test_only_one_block_is_moved_at_a_time_and_ends_throughout() -> None:
    model = tiny.llama(blocks=3)
    before, step = tiny.weights(model), make_step(model)
    seen: list[set[str]] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_: seen.append(tiny.moved(before, model)))
    with perturbed_layers(model, step.layers, step.optimizer.keys(), 1e-2):
        assert tiny.moved(before, model) == set(step.layers.ends)
        model(input_ids=tiny.tokens(0))
    names = [set(block) for block in step.layers.block_parameters(model)]
    assert seen == [set(step.layers.ends) | block for block in names]


def test_the_projected_gradient_is_that_of_the_loss_along_the_noise_and_is_clipped() -> None:
    model = tiny.llama().double()
    step = make_step(model, clip=0.5, lr=1.0)
    step.backward([batch(), batch(1)])
    projected_grad = step.optimizer.projected_grad
    assert projected_grad is not None
    noise = {p: perturb(p, key, 1.0) - p.detach() for p, key in step.optimizer.keys().items()}
    ids = torch.cat([tiny.tokens(0), tiny.tokens(1)])
    model(input_ids=ids, labels=ids).loss.backward()
    along = sum(float((p.grad * z).sum()) for p, z in noise.items() if p.grad is not None)
    assert abs(along) > 0.5
    assert float(projected_grad) == pytest.approx(along, rel=1e-2)

    before = tiny.weights(model)
    assert float(step.clip()) == pytest.approx(abs(along), rel=1e-2)
    step.update()
    name = "model.norm.weight"
    gone = before[name] - dict(model.named_parameters())[name].detach()
    torch.testing.assert_close(gone, noise[model.model.norm.weight] * (0.5 if along > 0 else -0.5))


def test_bf16_weights_that_are_too_large_to_round_to_nearest_still_move_along_the_noise() -> None:
    ones = nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    noise = perturb(nn.Parameter(torch.zeros(1 << 16)), 7, 1.0)
    went = perturb(ones, 7, 1e-3).float() - 1
    assert float(went @ noise / (noise @ noise)) == pytest.approx(1e-3, rel=0.05)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, rel=0.02)


def test_noise_differs_between_steps_parameters_and_seeds() -> None:
    model = tiny.llama(blocks=2)
    step = make_step(model)
    first = step.optimizer.keys()
    step.backward([batch()])
    step.update()
    other = MeZO(seed=1).build_optimizer(model, step.layers, OptimizerConfig())
    keys = [*first.values(), *step.optimizer.keys().values(), *other.keys().values()]  # type: ignore[attr-defined]
    assert len(set(keys)) == len(keys)


CONFIG = LlamaConfig(
    vocab_size=600,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    max_position_embeddings=128,
)


@pytest.mark.parametrize("over", ["full", "lora", "prefix"])
def test_the_plan_is_what_is_measured(over: str) -> None:
    recipe = make_recipe(precision="bf16", rounding="stochastic", over=over)
    planned = plan_memory(recipe, config=CONFIG)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    built = build(recipe, model, CausalLMLoss(model), steps=9, device=CPU)
    with measure(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            built.step.backward([make_batch(recipe, model, 96)])
            built.step.clip()
            built.step.update()
            measured = tracker.end_step()
    assert planned.kind == "traced"
    assert planned.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_the_plan_is_close_to_inference() -> None:
    recipe = make_recipe(precision="bf16", rounding="stochastic")
    planned = plan_memory(recipe, config=CONFIG)
    assert "backward" not in planned.by_phase
    assert planned.at_peak["gradients"] == planned.at_peak["optimizer state"] == 0
    weights = planned.at_peak["weights"]
    full = plan_memory(Recipe(**vars(recipe) | {"method": METHODS["full"]()}), config=CONFIG)
    assert planned.peak_bytes - weights < 0.3 * (full.peak_bytes - weights)


def run(folder: Path, *overrides: str, **flags: Any) -> Path:
    output = folder / "run"
    train(load_recipe(folder / "recipe.yaml", [f"run.output={output}", *overrides]), **flags)
    return output / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_run.write_model(tmp_path / "tiny")
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    tiny_run.write_recipe(tmp_path, model, rows, "method: {name: mezo}\n")
    return tmp_path


@pytest.mark.parametrize("over", ["lora", "prefix"])
def test_adapters_train_and_load(folder: Path, over: str) -> None:
    model = load_model(str(run(folder, f"method.over={over}", "optimizer.lr=1e-2")))
    moved = [
        name for name, p in model.named_parameters() if ("lora_B" in name or "prompt" in name) and p.any()
    ]
    assert moved


def test_bf16_runs_with_exact_rounding_resume_bit_for_bit(folder: Path) -> None:
    options = ("run.precision=bf16", "run.steps=8", "optimizer.lr=1e-4")
    whole = tiny.weights(load_model(str(run(folder, *options)), dtype=torch.bfloat16))

    def press_ctrl_c(state: RunState) -> None:
        if state.step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(folder, *options, overwrite=True, after_step=press_ctrl_c)
    again = load_model(str(run(folder, *options, resume=True)), dtype=torch.bfloat16)
    assert not tiny.moved(whole, again)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"over": "dora"}, "method.over must be full, lora or prefix"),
        ({"epsilon": 0.0}, "method.epsilon must be a positive number"),
        ({"rank": 8}, "method.rank belongs to method.over: lora"),
        ({"over": "lora", "ends": "frozen"}, "method.ends belongs to method.over: full"),
        ({"over": "lora", "rank": 0}, "method.rank must be >= 1"),
        ({"over": "prefix", "packing": True}, "data.packing cannot work with method prefix"),
        ({"activation_checkpointing": True}, "run.activation_checkpointing cannot work with method mezo"),
        ({"compile": True}, "run.compile cannot work with method mezo"),
        ({"moments": "8bit"}, "method mezo does not read optimizer.moments"),
        ({"betas": (0.9, 0.95)}, "method mezo does not read optimizer.betas"),
        ({"in_backward": True, "max_grad_norm": None}, "does not read optimizer.in_backward"),
        ({"name": "lion"}, "optimizer.name lion cannot work with method mezo"),
        ({"over": "lora", "ends_lr": 1e-3}, "optimizer.ends_lr=0.001 does nothing"),
    ],
)
def test_what_cannot_work_is_refused_with_the_recipe(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_recipe(**options)


def test_frozen_ends_stay_and_are_offered_where_memory_is_short() -> None:
    assert MeZO().alternatives(4).cheaper_ends == ({"ends": "frozen"},)
    assert not MeZO(ends="frozen").alternatives(4).cheaper_ends
    model = tiny.llama(blocks=2)
    method = MeZO(ends="frozen")
    method.prepare(model)
    optimizer = method.build_optimizer(model, find_layers(model), OptimizerConfig())
    assert [group["layer"] for group in optimizer.param_groups] == ["block 0", "block 1"]
