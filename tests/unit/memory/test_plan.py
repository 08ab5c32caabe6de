"""Which step is planned, for which device, and what waits in host memory meanwhile."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

import lisatune.memory.plan
import lisatune.optim.adamw
import tiny
from lisatune import LISA, build_adamw
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.costly_draws import find_costly_draws
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.memory.tracker import measure
from lisatune.methods import METHODS
from lisatune.methods.build import build, weight_dtype
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.runs.checkpoint import save_checkpoint
from plans import PlansOnce

BLOCKS = 4
CONFIG = LlamaConfig(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
EXPERTS = Qwen3MoeConfig(
    vocab_size=200,
    hidden_size=64,
    moe_intermediate_size=64,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
LARGE_VOCABULARY = LlamaConfig(**CONFIG.to_dict() | {"vocab_size": 2000})
planned_once = PlansOnce()
BLOCK = sum(p.numel() for p in LlamaForCausalLM(CONFIG).model.layers[0].parameters())
PARAMETERS = 9
"""Of a block."""


def make_recipe(optimizer: dict[str, Any] | None = None, **options: Any) -> Recipe:
    """A LISA recipe; options go to `run` where it has such a key, else to the method."""
    run = {"precision": "fp32", "batch_size": 2, "steps": 400, "device": "cpu"}
    run |= {key: value for key, value in options.items() if key in RunConfig.__dataclass_fields__}
    method = {key: value for key, value in options.items() if key not in run}
    return Recipe(
        model=ModelConfig(name="x"),
        data=DataConfig(train="x", max_length=96),
        method=METHODS["lisa"](**method),
        optimizer=OptimizerConfig(**(optimizer or {})),
        run=RunConfig(**run),
    )


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, {}),
        (CONFIG, {"ends": "head"}),
        (LARGE_VOCABULARY, {"ends": "frozen", "activation_checkpointing": True}),
    ],
    ids=["train", "head", "frozen"],
)
def test_no_draw_of_a_run_needs_more_than_planned(config: LlamaConfig, options: dict[str, Any]) -> None:
    recipe = make_recipe(**options)
    planned = planned_once(recipe, config=config)
    peaks = [
        plan_memory(recipe, config=config, blocks=draw).peak_bytes
        for draw in itertools.combinations(range(BLOCKS), 2)
    ]
    assert planned.peak_bytes == max(peaks)


@pytest.mark.parametrize("ends", ["train", "frozen"])
def test_no_draw_of_units_needs_noticeably_more_than_planned(ends: str) -> None:
    recipe = make_recipe(unit="module", ends=ends)
    planned = planned_once(recipe, config=CONFIG)
    model = LlamaForCausalLM(CONFIG)
    built = build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))
    assert (planned.word, planned.num_blocks) == ("unit", 7 * BLOCKS)
    draws = sorted(built.schedule.possible_draws(400))[::8]
    peaks = [plan_memory(recipe, config=CONFIG, blocks=draw).peak_bytes for draw in draws]
    assert planned.peak_bytes >= 0.98 * max(peaks)


@pytest.mark.parametrize("sampler", ["gradient", "misa", "spectrum"])
@pytest.mark.parametrize("unit", ["block", "module"])
def test_a_sampler_that_reads_what_a_plan_cannot_measure_is_planned(sampler: str, unit: str) -> None:
    planned = plan_memory(make_recipe(sampler=sampler, unit=unit), config=CONFIG)
    even = planned_once(make_recipe(unit=unit), config=CONFIG)
    assert planned.kind == "traced"
    assert planned.peak_bytes == pytest.approx(even.peak_bytes, rel=0.05)


def test_draws_differ_in_memory_where_the_embedding_rests() -> None:
    recipe = make_recipe(ends="frozen")
    low, high = (planned_once(recipe, config=CONFIG, blocks=blocks).peak_bytes for blocks in ((0, 1), (2, 3)))
    assert low > 1.2 * high


def test_a_plan_that_may_stop_early_stops_at_a_draw_that_is_too_large_and_only_there() -> None:
    recipe = make_recipe(ends="frozen")
    full = planned_once(recipe, config=CONFIG)
    assert full.active_blocks == (0, 1)
    early = plan_memory(recipe, config=CONFIG, too_many_bytes=1)
    assert early.active_blocks == (2, 3)
    assert early.peak_bytes == planned_once(recipe, config=CONFIG, blocks=(2, 3)).peak_bytes < full.peak_bytes
    unhindered = plan_memory(recipe, config=CONFIG, too_many_bytes=full.needed_bytes + 1)
    assert (unhindered.active_blocks, unhindered.at_peak) == (full.active_blocks, full.at_peak)


def test_the_larger_blocks_are_planned() -> None:
    model = tiny.llama(blocks=6)
    for name in ("gate_proj", "up_proj"):
        setattr(model.model.layers[3].mlp, name, torch.nn.Linear(32, 96, bias=False))
    model.model.layers[3].mlp.down_proj = torch.nn.Linear(96, 32, bias=False)
    layers = lisatune.find_layers(model)
    lisa = LISA(model, build_adamw(model, layers, lr=1e-3), sampler="uniform", period=1)
    sizes = [sum(p.numel() for p in block.values()) for block in layers.block_parameters(model)]
    draws = find_costly_draws(lisa.possible_draws(400), sizes, ends_rest=False)
    assert draws[0] == (3, 5)
    assert all(3 in draw for draw in draws)
    assert any(0 in draw for draw in draws)


def test_a_short_run_is_planned_by_its_own_draws() -> None:
    recipe = make_recipe(steps=1, seed=3)
    drawn = plan_memory(recipe, config=CONFIG).active_blocks
    model = LlamaForCausalLM(CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        built = build(recipe, model, CausalLMLoss(model), steps=1, device=torch.device("cpu"))
    assert drawn == built.schedule.active_blocks


@pytest.mark.parametrize(("state", "period"), [("drop", 1), ("drop", 3), ("cpu", 3), ("keep", 1)])
def test_state_that_frozen_blocks_leave_behind_is_planned_as_it_is_in_a_run(state: str, period: int) -> None:
    recipe = make_recipe(state=state, period=period, precision="bf16")
    plan = planned_once(recipe, config=CONFIG)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    built = build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))
    lisa, most = built.schedule, 0
    assert isinstance(lisa, LISA)
    for _ in range(2 * period + 1):  # two periods are a pass over four blocks; the next has begun
        built.step.backward([make_batch(recipe, model, 16)])
        built.step.clip()
        built.step.update()
        most = max(most, lisa.host_bytes())
    assert plan.host_bytes == most
    frozen = BLOCK * (BLOCKS - 2)
    assert most == {"drop": 2 * frozen, "cpu": 10 * frozen + 4 * PARAMETERS * 2, "keep": 0}[state]
    assert plan.trainable == sum(p.numel() for p in lisa.trainable_parameters())
    if state == "keep":
        dropped = planned_once(make_recipe(state="drop", period=1, precision="bf16"), config=CONFIG)
        assert plan.peak_bytes - dropped.peak_bytes >= 10 * frozen


@pytest.mark.parametrize("ends", ["train", "every:3"])
def test_a_draw_at_every_step_changes_nothing_in_a_planned_step(ends: str) -> None:
    one, ten = (
        plan_memory(make_recipe(period=period, ends=ends), config=CONFIG, blocks=(0, 2)) for period in (1, 10)
    )
    assert one.active_blocks == (0, 2)
    assert (one.trainable, one.at_peak) == (ten.trainable, ten.at_peak)


def test_state_in_host_memory_is_no_part_of_the_peak() -> None:
    plan = plan_memory(make_recipe({"state_device": "cpu"}), config=CONFIG, length=4)
    assert plan.host_bytes == 8 * plan.trainable
    assert plan.at_peak["optimizer state"] < 1000
    assert plan.peak_bytes < plan.at_peak["weights"] + plan.host_bytes


def test_host_memory_comes_on_top_where_it_is_the_only_memory() -> None:
    here, away = (
        plan_memory(make_recipe(state="cpu", device=device), config=CONFIG) for device in ("cpu", "cuda")
    )
    assert here.host_bytes == away.host_bytes > 0
    assert here.tensor_bytes == here.peak_bytes + here.host_bytes
    assert away.tensor_bytes == away.peak_bytes
    assert away.needed_bytes - away.peak_bytes > lisatune.memory.plan.RESERVE_BYTES


def test_state_bytes_are_those_of_the_training_device() -> None:
    recipe = make_recipe({"state_device": "cpu"})
    model = LlamaForCausalLM(CONFIG)
    built = build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))
    lisa = built.schedule
    assert isinstance(lisa, LISA)
    built.step.backward([make_batch(recipe, model, 16)])
    built.step.update()
    trained = lisa.trainable_parameters()
    assert lisa.host_bytes() == 8 * sum(p.numel() for p in trained)
    assert lisa.state_bytes() == 4 * len(trained)


@pytest.mark.parametrize("moments", ["fp32", "8bit", "factored"])
def test_a_few_chunks_stand_for_all(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisatune.optim.adamw, "CHUNK", {"cpu": 2304})  # the last chunk of 64 × 256 is smaller
    recipe = make_recipe({"moments": moments}, precision="bf16")
    few = plan_memory(recipe, config=CONFIG, blocks=(1, 2))
    monkeypatch.setattr("lisatune.optim.chunks.has_values", lambda tensor: True)
    every = plan_memory(recipe, config=CONFIG, blocks=(1, 2))
    assert few.kind == every.kind == "traced"
    assert few.by_phase == every.by_phase
    assert few.at_peak == every.at_peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # chunks of tokens, slices of the vocabulary
def test_a_few_chunks_of_the_loss_stand_for_all(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisatune.losses.cross_entropy.SLICE_ELEMENTS", 1)
    recipe = make_recipe(precision=precision, batch_size=5)
    few = plan_memory(recipe, config=LARGE_VOCABULARY, blocks=(1, 2))
    monkeypatch.setattr("lisatune.optim.chunks.has_values", lambda tensor: True)
    every = plan_memory(recipe, config=LARGE_VOCABULARY, blocks=(1, 2))
    assert few.kind == every.kind == "traced"
    assert few.by_phase == every.by_phase
    assert few.at_peak == every.at_peak


def test_chunks_of_the_update_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisatune.optim.adamw, "CHUNK", {"cpu": 1024})
    steps = {
        device: plan_memory(make_recipe(precision="bf16", device=device), config=CONFIG).by_phase[
            "optimizer step"
        ]
        for device in ("cpu", "cuda:1")
    }
    assert steps["cuda:1"] > steps["cpu"] + 4 * 64 * 256


def test_a_compiled_run_is_planned_as_it_is_written() -> None:
    plan = plan_memory(make_recipe(compile=True), config=CONFIG)
    assert plan.note is not None
    assert "without run.compile" in plan.note
    assert plan.peak_bytes == planned_once(make_recipe(), config=CONFIG).peak_bytes


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["llama", "experts"])
@pytest.mark.parametrize("ends", ["train", "frozen"])
@pytest.mark.parametrize("bits", ["int8", "mixed", "nf4"])
def test_codes_and_the_switch_between_two_draws_are_planned_as_in_a_run(
    bits: str, ends: str, config: PreTrainedConfig
) -> None:
    options = {"ends": ends, "period": 1, "precision": "bf16", "verify": "off"}
    recipe = make_recipe({"rounding": "stochastic"}, frozen_weights=bits, **options)
    plan = plan_memory(recipe, config=config)
    exact = planned_once(make_recipe({"rounding": "stochastic"}, **options), config=config)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    built = build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))
    steps = []
    with measure(built.model, built.step.optimizer) as tracker:
        for step in range(6):
            if step == 4:  # until here each step ends with a draw
                assert plan.active_blocks is not None
                built.schedule.hold(plan.active_blocks)
            built.step.backward([make_batch(recipe, model, 96)])
            built.step.clip()
            built.step.update()
            steps.append(tracker.end_step().peak_bytes)
    assert steps[-1] == pytest.approx(plan.peak_bytes, rel=0.03)
    assert max(steps[1:4]) <= plan.peak_bytes * 1.03
    assert plan.at_peak["weights"] < exact.at_peak["weights"]
    assert plan.host_bytes == built.schedule.host_bytes()


def test_a_plan_for_cuda_counts_the_whole_pinned_area() -> None:
    cpu, cuda = (
        plan_memory(
            make_recipe({"rounding": "stochastic"}, frozen_weights="int8", precision="bf16", device=device),
            config=CONFIG,
        )
        for device in ("cpu", "cuda")
    )
    linear = sum(p.numel() for p in LlamaForCausalLM(CONFIG).model.layers[0].parameters() if p.ndim == 2)
    assert cpu.host_bytes == 2 * (BLOCKS - 2) * linear
    assert cuda.host_bytes == 2 * BLOCKS * linear
    assert cpu.active_blocks is not None
    assert cpu.switch_bytes == 2 * len(cpu.active_blocks) * linear
    assert planned_once(make_recipe(), config=CONFIG).switch_bytes == 0


def test_exact_weights_on_disk_are_planned_there_and_not_in_memory() -> None:
    codes: dict[str, Any] = {"frozen_weights": "int8", "precision": "bf16"}
    ram, disk = (
        plan_memory(make_recipe({"rounding": "stochastic"}, master=master, **codes), config=CONFIG)
        for master in ("ram", "disk")
    )
    assert (ram.host_bytes > 0, ram.disk_bytes) == (True, 0)
    weights = sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters())
    assert (disk.host_bytes, disk.disk_bytes) == (0, 2 * weights)


@pytest.mark.parametrize("options", [{}, {"frozen_weights": "int8", "precision": "bf16", "state": "cpu"}])
def test_the_copy_of_a_checkpoint_is_what_it_writes(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe({"rounding": "stochastic"}, save_async=True, **options)
    planned = plan_memory(recipe, config=CONFIG)
    without = planned_once(make_recipe({"rounding": "stochastic"}, **options), config=CONFIG)
    model = LlamaForCausalLM(CONFIG).to(weight_dtype(recipe))
    built = build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))
    for blocks in (range(BLOCKS), planned.active_blocks or ()):
        built.schedule.hold(tuple(blocks))
        built.step.backward([make_batch(recipe, model, 96)])
        built.step.update()
        built.step.skip()
    path = save_checkpoint(tmp_path, step=1, model=built.model, optimizer=built.step.optimizer)
    names = ("weights", "optimizer")
    tensors = [tensor for name in names for tensor in load_file(path / f"{name}.safetensors").values()]
    assert planned.copy_bytes == sum(tensor.nbytes for tensor in tensors)
    assert planned.host_bytes == without.host_bytes + planned.copy_bytes
    assert planned.needed_bytes > without.needed_bytes + planned.copy_bytes
    assert without.copy_bytes == 0


def test_the_copy_of_a_checkpoint_holds_adapters_beside_frozen_blocks_and_the_step_is_still_traced() -> None:
    corrected = plan_memory(make_recipe(correction="lora", save_async=True), config=CONFIG)
    without = planned_once(make_recipe(correction="lora"), config=CONFIG)
    plain = plan_memory(make_recipe(save_async=True), config=CONFIG)
    assert (corrected.kind, corrected.peak_bytes) == ("traced", without.peak_bytes)
    adapters = 3 * 4 * (corrected.trainable - plain.trainable)  # float32, both moments
    assert corrected.copy_bytes - plain.copy_bytes == pytest.approx(adapters, rel=0.01)
