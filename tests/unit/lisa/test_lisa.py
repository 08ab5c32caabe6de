"""The invariants of LISA, numbered as in the design; resume (5, 6) is in test_lisa_resume.py."""

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.optimization
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import tiny
from lisatune import LISA, AdamW, Independent, LayerMap, ProofError, Sampler, build_adamw, find_layers
from lisatune.lisa.frozen_weights import RamMasters
from lisatune.lisa.samplers import Permutation, Uniform

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False, fused=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor-own-rate": lambda p: transformers.optimization.Adafactor(p),
}
BLOCKS = tuple(f"model.layers.{i}" for i in range(6))
POLICIES = ("drop", "reset", "second_moment", "cpu", "keep")
KINDS_AND_POLICIES = [
    *(("adamw", state) for state in POLICIES),
    *((kind, state) for kind in OPTIMIZERS if kind != "adamw" for state in ("drop", "second_moment")),
]
"""Each optimizer with the default and with the policy that reads its state, and AdamW with all."""


def attach(model: nn.Module, kind: str = "adamw", **options: Any) -> tuple[Optimizer, LISA]:
    """Attach LISA with γ = 2, K = 3 and the full proof to an optimizer over all parameters."""
    optimizer = OPTIMIZERS[kind](model.parameters())
    return optimizer, LISA(model, optimizer, **{"active": 2, "period": 3, "verify": "full", **options})


class Fixed(Sampler):
    """Draws the same each time, whatever it is."""

    def __init__(self, drawn: Any, *, num_blocks: int = 6, chances: int = 6) -> None:
        self.drawn, self.num_blocks, self.chances = drawn, num_blocks, chances

    def draw(self, period: int, *, seed: int) -> Any:
        return self.drawn

    def inclusion(self) -> tuple[float, ...]:
        return (0.5,) * self.chances


def layer_names(lisa: LISA, model: nn.Module) -> list[set[str]]:
    """Parameter names of each block."""
    return [set(block) for block in lisa.layers.block_parameters(model)]


def elements(optimizer: Optimizer) -> int:
    """Count the elements of all moments."""
    return sum(
        value.numel() for state in optimizer.state.values() for key, value in state.items() if key != "step"
    )


# ---- 1: everything trainable is in the optimizer


def test_1_optimizer_that_lacks_a_parameter_is_refused(tiny_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(list(tiny_llama.parameters())[:-1])
    with pytest.raises(ValueError, match=r"is not in the optimizer, so it would never train; build the"):
        LISA(tiny_llama, optimizer)
    assert all(p.requires_grad for p in tiny_llama.parameters())


def test_1_freezing_first_and_building_the_optimizer_later_is_refused(tiny_llama: nn.Module) -> None:
    """The defect with which only the ends ever trained."""
    for block in tiny_llama.model.layers:
        block.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in tiny_llama.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="nothing in block 0 requires grad, so it would never train"):
        LISA(tiny_llama, optimizer)


def test_1_a_parameter_that_is_missing_in_the_optimizer_is_named(tiny_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(p for n, p in tiny_llama.named_parameters() if "layers.3.mlp.up" not in n)
    with pytest.raises(ValueError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight' is not in the"):
        LISA(tiny_llama, optimizer)


def test_1_flags_that_an_earlier_lisa_left_are_refused(tiny_llama: nn.Module) -> None:
    attach(tiny_llama)
    with pytest.raises(ValueError, match=r"nothing in block \d requires grad.*detach\(\) an earlier LISA"):
        attach(tiny_llama)


def test_1_an_earlier_lisa_with_another_optimizer_is_refused_until_it_is_detached(
    tiny_llama: nn.Module,
) -> None:
    _, first = attach(tiny_llama)
    with pytest.raises(RuntimeError, match=r"to this model by another optimizer \(AdamW\).*call detach\(\)"):
        attach(tiny_llama, "sgd-momentum")
    first.detach()
    attach(tiny_llama, "sgd-momentum")


@pytest.mark.parametrize("lost", ["embedding, head and norm", "the blocks"])
def test_1_two_optimizers_for_one_model_are_refused(tiny_llama: nn.Module, lost: str) -> None:
    ends = set(find_layers(tiny_llama).ends)
    mine = [p for name, p in tiny_llama.named_parameters() if (name in ends) == (lost == "the blocks")]
    with pytest.raises(ValueError, match=rf"as if a second optimizer held {lost}; .* use param groups"):
        LISA(tiny_llama, torch.optim.AdamW(mine))


def test_1_an_optimizer_of_matrices_needs_the_vectors_frozen(tiny_llama: nn.Module) -> None:
    vectors = [p for p in tiny_llama.parameters() if p.ndim != 2]
    muon = torch.optim.Muon([p for p in tiny_llama.parameters() if p.ndim == 2], lr=1e-3)
    with pytest.raises(ValueError, match=r"norm.weight' and 12 more .*because Muon holds matrices alone"):
        LISA(tiny_llama, muon)
    for p in vectors:
        p.requires_grad_(False)
    with pytest.warns(UserWarning, match="and 10 more did not require grad"):
        lisa = LISA(tiny_llama, muon, active=2, period=2)
    tiny.fit(tiny_llama, muon, 4)
    assert lisa.periods_proven == 2


def test_1_what_is_frozen_before_stays_frozen_and_is_named_once(tiny_llama: nn.Module) -> None:
    names = ("q_proj.weight", "model.norm.weight")
    frozen = [p for name, p in tiny_llama.named_parameters() if name.endswith(names)]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in frozen]
    with pytest.warns(
        UserWarning, match=r"model\.norm\.weight, .* and 4 more did not require grad"
    ) as caught:
        optimizer, lisa = attach(tiny_llama, verify="full")
    assert len(caught) == 1
    tiny.fit(tiny_llama, optimizer, 9)
    lisa.check()
    assert all(torch.equal(p, was) for p, was in zip(frozen, before, strict=True))
    assert not any(p.requires_grad or p in optimizer.state for p in frozen)
    assert not any(p is q for p in frozen for q in lisa.trainable_parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_1_a_model_with_adapters_is_refused(untied_llama: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(untied_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the model has PEFT's adapters: LISA would train the"):
        LISA(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="the model has PEFT's adapters"):
        LISA(model.get_base_model(), torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_1_narrow_weights_that_updates_are_rounded_into_are_warned_of(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    says = r"float16 and AdamW rounds each update to nearest.*lisatune\.AdamW"
    with pytest.warns(UserWarning, match=says) as caught:
        LISA(model, torch.optim.AdamW(model.parameters()))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("rounding", ["exact", "stochastic"])
def test_1_exact_and_stochastic_updates_are_not_warned_of(rounding: str) -> None:
    model = tiny.llama().to(torch.bfloat16)
    LISA(model, AdamW(model.parameters(), rounding=rounding))


def replace_embedding(model: nn.Module) -> str:
    assert isinstance(model, PreTrainedModel)
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    return "'lm_head.weight' was"  # transformers puts other values into the embedding's own parameter


def assign_weights(model: nn.Module) -> str:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return f"'model.embed_tokens.weight' and {len(list(model.parameters())) - 1} more were"


@pytest.mark.parametrize(
    ("change", "steps"), [(replace_embedding, 0), (assign_weights, 0), (assign_weights, 1)]
)
def test_1_parameters_that_are_replaced_later_are_an_error_because_they_would_never_train(
    untied_llama: nn.Module, change: Callable[[nn.Module], str], steps: int
) -> None:
    optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, steps)
    says = f"parameter {change(untied_llama)} replaced in the model after LISA was attached"
    if steps:
        with pytest.raises(RuntimeError, match=says):
            lisa.check()
    with pytest.raises(RuntimeError, match=says):
        tiny.fit(untied_llama, optimizer, 1)
    assert lisa.steps_done == steps


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("where", ["the embedding", "an active block"])
def test_1_what_is_frozen_later_is_refused_because_the_next_draw_would_thaw_it(
    untied_llama: nn.Module, where: str, steps: int
) -> None:
    optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, steps)
    block = f"model.layers.{lisa.active_blocks[0]}"
    path, more = ("model.embed_tokens", "was") if where == "the embedding" else (block, "and 8 more were")
    untied_llama.get_submodule(path).requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"'{path}.*' {more} frozen after LISA was attached"):
        tiny.fit(untied_llama, optimizer, range(steps, steps + 1))
    assert lisa.steps_done == steps


# ---- 2: the drawn blocks train, no other does


@pytest.mark.parametrize(("kind", "state"), KINDS_AND_POLICIES)
def test_2_each_period_moves_the_drawn_blocks_and_nothing_else(
    tied_llama: nn.Module, kind: str, state: str
) -> None:
    optimizer, lisa = attach(tied_llama, kind, state=state)
    blocks = layer_names(lisa, tied_llama)
    for period in range(4):  # a pass over all blocks, and the first ones again
        drawn, before = lisa.active_blocks, tiny.weights(tied_llama)
        tiny.fit(tied_llama, optimizer, range(3 * period, 3 * period + 3))
        moved = tiny.moved(before, tied_llama)
        assert moved == set(lisa.layers.ends).union(*(blocks[i] for i in drawn))
    assert lisa.periods_proven == 4


@pytest.mark.parametrize("active", [1, 2, 4, 5, 6])
def test_2_every_block_moves_within_a_pass(untied_llama: nn.Module, active: int) -> None:
    optimizer, lisa = attach(untied_llama, active=active, period=2)
    before = tiny.weights(untied_llama)
    passes = -(-6 // active)
    tiny.fit(untied_llama, optimizer, 2 * passes)
    assert tiny.moved(before, untied_llama) == set(before)
    assert min(lisa.visits) >= 1
    assert sum(lisa.visits) == active * passes


def test_2_vision_tower_never_trains() -> None:
    config = AutoConfig.for_model("llava")
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = (
            16,
            16,
            3,
            2,
        )
    config.text_config.vocab_size = config.image_token_index = 64
    config.text_config.num_key_value_heads = 2
    config.vision_config.image_size = config.vision_config.patch_size = 14
    model = AutoModelForImageTextToText.from_config(config)
    optimizer, lisa = attach(model, active=3, period=1)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(lisa.layers.frozen)
    before = tiny.weights(model)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set(lisa.layers.frozen)
    optimizer.step()
    assert tiny.moved(before, model) == set(before) - set(lisa.layers.frozen)
    assert any("vision_tower" in name for name in lisa.layers.frozen)


def test_2_frozen_ends_stay(tiny_llama: nn.Module) -> None:
    optimizer, lisa = attach(tiny_llama, ends="frozen")
    before = tiny.weights(tiny_llama)
    tiny.fit(tiny_llama, optimizer, 9)
    assert tiny.moved(before, tiny_llama) == set(before) - set(lisa.layers.ends)


def test_2_steps_with_gradients_set_to_zero_move_no_frozen_block(untied_llama: nn.Module) -> None:
    """`zero_grad(set_to_none=False)` leaves gradients behind, with which AdamW decays what is frozen."""
    twin = copy.deepcopy(untied_llama)
    optimizer, lisa = attach(untied_llama)
    for step in range(9):
        tiny.backward(untied_llama, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert lisa.periods_proven == 3
    tiny.fit(twin, attach(twin)[0], 9)
    tiny.assert_same_weights(untied_llama, twin)


def test_2_clipping_sees_the_active_layers_alone(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    for step in range(6):
        tiny.backward(untied_llama, step)
        expected = torch.nn.utils.get_total_norm([p.grad for p in lisa.trainable_parameters()])
        norm = torch.nn.utils.clip_grad_norm_(untied_llama.parameters(), 0.1)
        torch.testing.assert_close(norm, expected)
        assert sum(p.grad is not None for p in untied_llama.parameters()) == len(lisa.trainable_parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert lisa.periods_proven == 2


# ---- 3: a frozen block costs nothing


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_3_state_is_that_of_ends_and_active_blocks_at_every_step(tied_llama: nn.Module, kind: str) -> None:
    optimizer = OPTIMIZERS[kind](tied_llama.parameters())
    in_step: list[set[Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: in_step.append(set(optimizer.state)))  # runs before LISA's
    lisa = LISA(tied_llama, optimizer, active=2, period=3)
    drawn = set(lisa.trainable_parameters())

    def check(step: int) -> None:
        nonlocal drawn
        now = set(lisa.trainable_parameters())
        assert in_step[-1] == drawn
        assert set(optimizer.state) == drawn & now
        drawn = now

    tiny.fit(tied_llama, optimizer, 11, after=check)


def test_3_adamw_holds_two_numbers_per_trained_element_and_does_not_grow(tiny_llama: nn.Module) -> None:
    optimizer, lisa = attach(tiny_llama)
    sizes = []

    def check(step: int) -> None:
        if step % 3:
            trained = lisa.trainable_parameters()
            assert elements(optimizer) == 2 * sum(p.numel() for p in trained)
            assert lisa.state_bytes() == sum(8 * p.numel() + 4 for p in trained)
            sizes.append(lisa.state_bytes())

    tiny.fit(tiny_llama, optimizer, 20, after=check)
    assert len(set(sizes)) == 1


def test_3_frozen_parameters_have_no_gradient(tiny_llama: nn.Module) -> None:
    optimizer, lisa = attach(tiny_llama)
    for step in range(7):
        tiny.backward(tiny_llama, step)
        optimizer.step()
        trained = set(lisa.trainable_parameters())
        assert {p for p in tiny_llama.parameters() if p.requires_grad} == trained
        assert not {p for p in tiny_llama.parameters() if p.grad is not None} - trained
        optimizer.zero_grad()


# ---- 4: what happens to state is the user's choice


def test_4_drop_keeps_the_moments_of_a_block_that_is_drawn_again(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, active=4, sampler="uniform")
    tiny.fit(untied_llama, optimizer, 2)
    blocks = lisa.layers.block_parameters(untied_llama)
    first, kept = lisa.active_blocks, {p: optimizer.state[p]["exp_avg"] for p in lisa.trainable_parameters()}
    tiny.fit(untied_llama, optimizer, range(2, 3))
    staying = set(first) & set(lisa.active_blocks)
    assert staying
    for block in staying:
        assert all(optimizer.state[p]["exp_avg"] is kept[p] for p in blocks[block].values())
    for block in set(range(6)) - staying:
        assert not any(p in optimizer.state for p in blocks[block].values())
    assert all(p in optimizer.state for p in lisa.layers.end_parameters(untied_llama).values())


def test_4_reset_clears_everything_at_a_draw_and_only_then(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, state="reset", active=4)
    entries = []
    tiny.fit(untied_llama, optimizer, 6, after=lambda step: entries.append(len(optimizer.state)))
    trained = len(lisa.trainable_parameters())
    assert entries == [trained, trained, 0, trained, trained, 0]


def test_4_keep_never_releases(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, state="keep")
    tiny.fit(untied_llama, optimizer, 9)
    assert set(optimizer.state) == set(untied_llama.parameters())
    assert lisa.state_bytes() == sum(8 * p.numel() + 4 for p in untied_llama.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_4_cpu_trains_like_keep_but_holds_no_more_than_drop(tied_llama: nn.Module, kind: str) -> None:
    twin = copy.deepcopy(tied_llama)
    optimizer, lisa = attach(tied_llama, kind, state="cpu", sampler="uniform")
    held = []
    tiny.fit(tied_llama, optimizer, 14, after=lambda step: held.append(set(optimizer.state)))
    other, _ = attach(twin, kind, state="keep", sampler="uniform")
    tiny.fit(twin, other, 14)
    tiny.assert_same_weights(tied_llama, twin)
    assert max(map(len, held)) == len(lisa.trainable_parameters())
    assert held[-1] == set(lisa.trainable_parameters())


def test_4_policies_differ_where_they_should(untied_llama: nn.Module) -> None:
    results = {}
    for state in POLICIES:
        model = copy.deepcopy(untied_llama)
        tiny.fit(model, attach(model, state=state, active=4, sampler="uniform")[0], 12)
        results[state] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(results["cpu"], results["keep"])
    assert not torch.equal(results["drop"], results["keep"])
    assert not torch.equal(results["drop"], results["reset"])


# ---- 5: draws


def test_5_draws_are_independent_of_global_random_numbers(untied_llama: nn.Module) -> None:
    runs = []
    for seed in (1, 2):
        model, drawn = copy.deepcopy(untied_llama), []
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        optimizer, lisa = attach(model, period=1, sampler="uniform")
        tiny.fit(
            model, optimizer, 8, after=lambda step, lisa=lisa, drawn=drawn: drawn.append(lisa.active_blocks)
        )
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert runs[0] == [Uniform(6, 2).draw(period, seed=0) for period in range(1, 9)]


def test_5_the_seed_names_the_draws(untied_llama: nn.Module) -> None:
    plans = set()
    for seed in range(5):
        _, lisa = attach(untied_llama, seed=seed)
        plans.add(lisa.planned_visits(6) + lisa.active_blocks)
        lisa.detach()
    assert len(plans) == 5


def test_5_nothing_global_is_drawn_from(untied_llama: nn.Module) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    optimizer, _ = attach(untied_llama, period=1)
    tiny.fit(untied_llama, optimizer, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


# ---- 7: only optimizer steps count; a draw happens right after one


def test_7_a_draw_happens_right_after_each_period(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    sampler = Permutation(6, 2)
    assert lisa.active_blocks == sampler.draw(0, seed=0)

    def check(step: int) -> None:
        assert (lisa.steps_done, lisa.period_index) == (step, step // 3)
        assert lisa.active_blocks == sampler.draw(step // 3, seed=0)
        begun = -(-step // 3)
        assert sum(lisa.visits) == 2 * begun

    tiny.fit(untied_llama, optimizer, 10, after=check)


def test_7_accumulation_does_not_count(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    for step in range(6):
        for micro_step in range(4):
            drawn = lisa.active_blocks
            tiny.backward(untied_llama, 4 * step + micro_step)
            assert lisa.active_blocks == drawn
        optimizer.step()
        optimizer.zero_grad()
    assert (lisa.steps_done, lisa.period_index, lisa.periods_proven) == (6, 2, 2)


def test_7_evaluation_does_not_count(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, 2)
    before, drawn = tiny.weights(untied_llama), lisa.active_blocks
    untied_llama.eval()
    for step in range(5):
        with torch.no_grad():
            untied_llama(input_ids=tiny.tokens(step))
        untied_llama(input_ids=tiny.tokens(step))
    untied_llama.train()
    assert (lisa.steps_done, lisa.active_blocks) == (2, drawn)
    assert not tiny.moved(before, untied_llama)


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        ("adamw", {1, 4, 5, 8}),
        ("adamw-foreach", {2, 3}),
        ("adamw-fused", set()),  # makes the scaler's step itself
        ("adamw-fused", {0}),
        ("adamw-fused", {2, 3}),
        ("sgd-momentum", {0}),
    ],
)
def test_7_steps_that_a_loss_scaler_skips_do_not_count(
    untied_llama: nn.Module, kind: str, skipped: set[int]
) -> None:
    optimizer, lisa = attach(untied_llama, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    done = 0
    for step in range(10):
        ids = tiny.tokens(step)
        scaler.scale(untied_llama(input_ids=ids, labels=ids).loss).backward()
        if step in skipped:
            lisa.trainable_parameters()[-1].grad.fill_(float("inf"))
        before = tiny.weights(untied_llama)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        done += step not in skipped
        assert bool(tiny.moved(before, untied_llama)) == (step not in skipped)
        assert lisa.steps_done == done
        assert lisa.active_blocks == Permutation(6, 2).draw(done // 3, seed=0)
    assert lisa.periods_proven == done // 3


def test_7_skipped_step_is_no_reason_to_have_moved(untied_llama: nn.Module) -> None:
    """A skipped step has gradients, the step that counts has none but zeros: nothing had to move."""
    optimizer = torch.optim.AdamW(untied_llama.parameters(), weight_decay=0.0, fused=True)
    lisa = LISA(untied_llama, optimizer, period=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (float("inf"), 0.0):
        ids = tiny.tokens(0)
        scaler.scale(untied_llama(input_ids=ids, labels=ids).loss).backward()
        for p in lisa.trainable_parameters():
            p.grad.fill_(factor)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (lisa.steps_done, lisa.periods_proven) == (1, 1)


# ---- 8: a schedule sees constant groups


def schedules(optimizer: Optimizer) -> list[torch.optim.lr_scheduler.LRScheduler]:
    return [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
    ]


@pytest.mark.parametrize("warmup", [0, 2])
def test_8_groups_and_learning_rates_are_those_without_lisa(untied_llama: nn.Module, warmup: int) -> None:
    layers = find_layers(untied_llama)
    lrs: list[list[list[float]]] = []
    for with_lisa in (False, True):
        model = copy.deepcopy(untied_llama)
        optimizer = build_adamw(model, layers, lr=1e-2, weight_decay=0.1)
        groups = [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]
        if with_lisa:
            LISA(model, optimizer, period=3, warmup=warmup)
        chain, seen = schedules(optimizer), []

        def after(
            step: int, optimizer: Optimizer = optimizer, chain: list = chain, seen: list = seen
        ) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])
            for schedule in chain:
                schedule.step()

        tiny.fit(model, optimizer, 9, after=after)
        assert groups == [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]
        lrs.append(seen)
    assert lrs[0] == lrs[1]


def ramp(lisa: LISA, optimizer: Optimizer) -> list[dict[str, float]]:
    """Record the learning rates that the optimizer uses, per layer, at every step."""
    seen: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(  # runs after LISA's
        lambda *_: seen.append({group["layer"]: group["lr"] for group in optimizer.param_groups})
    )
    return seen


@pytest.mark.parametrize("state", ["drop", "reset"])
def test_8_warmup_ramps_thawed_blocks_alone(untied_llama: nn.Module, state: str) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2)
    lisa = LISA(
        untied_llama,
        optimizer,
        active=4,
        period=4,
        warmup=3,
        sampler="uniform",
        state=state,
        layers=layers,
        lr_scaling="none",
    )
    seen, drawn = ramp(lisa, optimizer), [set(lisa.active_blocks)]
    tiny.fit(untied_llama, optimizer, 12, after=lambda step: drawn.append(set(lisa.active_blocks)))
    factors = (1 / 4, 2 / 4, 3 / 4, 1)
    stayed = 0
    for step, lrs in enumerate(seen):
        before = drawn[step - 4] if step >= 4 and state == "drop" else set()
        for layer, lr in lrs.items():
            thawed = layer != "ends" and int(layer.split()[1]) in drawn[step] - before
            assert lr == pytest.approx(1e-2 * (factors[step % 4] if thawed else 1))
        stayed += len(drawn[step] & before)
    assert (stayed > 0) == (state == "drop")
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


class OutOfMemoryError(Exception):
    pass


def raising_closure() -> float:
    raise OutOfMemoryError


def test_8_step_that_raises_leaves_no_ramp_behind(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2)
    lisa = LISA(untied_llama, optimizer, period=4, warmup=3, layers=layers, lr_scaling="none")
    seen = ramp(lisa, optimizer)
    ramped = f"block {lisa.active_blocks[0]}"
    with pytest.raises(OutOfMemoryError):
        optimizer.step(raising_closure)
    assert {group["lr"] for group in optimizer.state_dict()["param_groups"]} == {1e-2}
    assert lisa.steps_done == 0
    with pytest.raises(OutOfMemoryError):
        optimizer.step(raising_closure)
    tiny.fit(untied_llama, optimizer, 2)
    assert [lrs[ramped] for lrs in seen] == pytest.approx([0.0025, 0.0025, 0.0025, 0.005])
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    with pytest.raises(OutOfMemoryError):
        optimizer.step(raising_closure)
    lisa.detach()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


def test_8_rate_that_is_set_after_a_step_that_raised_holds(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2)
    lisa = LISA(untied_llama, optimizer, period=4, warmup=3, layers=layers)
    with pytest.raises(OutOfMemoryError):
        optimizer.step(raising_closure)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    tiny.fit(untied_llama, optimizer, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    assert lisa.steps_done == 1


# ---- 9: γ = N is full fine-tuning, γ = 0 trains the ends


@pytest.mark.parametrize(
    ("kind", "state"), [*((kind, "drop") for kind in OPTIMIZERS), ("adamw", "cpu"), ("adamw", "keep")]
)
def test_9_gamma_n_is_full_fine_tuning_bit_for_bit(tied_llama: nn.Module, kind: str, state: str) -> None:
    full = copy.deepcopy(tied_llama)
    optimizer, lisa = attach(tied_llama, kind, active=6, state=state)
    tiny.fit(tied_llama, optimizer, 8)
    twin = OPTIMIZERS[kind](full.parameters())
    tiny.fit(full, twin, 8)
    tiny.assert_same_weights(tied_llama, full)
    for p, q in zip(tied_llama.parameters(), full.parameters(), strict=True):
        assert optimizer.state[p].keys() == twin.state[q].keys()
        for key, value in twin.state[q].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))
    assert lisa.visits == [3] * 6


def test_9_gamma_n_is_full_fine_tuning_with_an_untied_head(untied_llama: nn.Module) -> None:
    full = copy.deepcopy(untied_llama)
    tiny.fit(untied_llama, attach(untied_llama, active=6)[0], 8)
    tiny.fit(full, OPTIMIZERS["adamw"](full.parameters()), 8)
    tiny.assert_same_weights(untied_llama, full)


@pytest.mark.parametrize("sampler", ["permutation", "uniform", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)])
def test_9_gamma_zero_trains_the_ends_alone(tiny_llama: nn.Module, sampler: Any) -> None:
    optimizer, lisa = attach(tiny_llama, active=0, sampler=sampler)
    before = tiny.weights(tiny_llama)
    tiny.fit(tiny_llama, optimizer, 7)
    assert tiny.moved(before, tiny_llama) == set(lisa.layers.ends)
    assert set(optimizer.state) == set(lisa.layers.end_parameters(tiny_llama).values())
    assert lisa.visits == [0] * 6
    assert lisa.periods_proven == 2


# ---- 10: tied weights are one parameter


def test_10_tied_weights_train_as_one_end(tied_llama: nn.Module) -> None:
    optimizer, lisa = attach(tied_llama)
    tiny.fit(tied_llama, optimizer, 4)
    embedding = tied_llama.model.embed_tokens.weight
    assert tied_llama.lm_head.weight is embedding
    trained = lisa.trainable_parameters()
    assert sum(p is embedding for p in trained) == 1
    assert elements(optimizer) == 2 * sum(p.numel() for p in trained)


def test_10_parameter_shared_by_two_blocks_trains_always(untied_llama: nn.Module) -> None:
    blocks = untied_llama.model.layers
    blocks[4].mlp.up_proj.weight = blocks[1].mlp.up_proj.weight
    optimizer, lisa = attach(untied_llama, active=1)
    tiny.fit(untied_llama, optimizer, 9)
    assert blocks[1].mlp.up_proj.weight in set(lisa.trainable_parameters())
    assert lisa.periods_proven == 3


# ---- attaching and detaching


def test_hold_trains_its_blocks_alone_draws_no_more_and_gives_up_the_open_proof(
    untied_llama: nn.Module,
) -> None:
    optimizer, lisa = attach(untied_llama, active=2, period=3, verify="full", total_steps=30)
    tiny.fit(untied_llama, optimizer, 1)
    held = tuple(sorted(set(range(6)) - set(lisa.active_blocks)))[:3]
    lisa.hold(held[::-1])
    before = tiny.weights(untied_llama)
    tiny.fit(untied_llama, optimizer, range(1, 10))
    assert lisa.active_blocks == held
    moved = tiny.moved(before, untied_llama)
    names = layer_names(lisa, untied_llama)
    assert [bool(block & moved) for block in names[:6]] == [block in held for block in range(6)]
    assert lisa.periods_proven == 0
    lisa.check()  # the blocks of the first step no longer count


def test_detach_restores_every_flag_and_hook(untied_llama: nn.Module) -> None:
    untied_llama.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in untied_llama.parameters()]
    with pytest.warns(UserWarning, match=r"model\.norm\.weight did not require grad"):
        optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, 4)
    lisa.detach()
    assert [p.requires_grad for p in untied_llama.parameters()] == flags
    assert "lisa" not in optimizer.state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    tiny.fit(untied_llama, optimizer, 4)
    assert lisa.steps_done == 4
    assert [p.requires_grad for p in untied_llama.parameters()] == flags
    with pytest.warns(UserWarning, match=r"model\.norm\.weight did not require grad"):
        LISA(untied_llama, optimizer)


def test_weights_that_load_state_dict_replaces_are_proven_from_there_on(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, active=1, period=5)
    other = {name: weight + 1 for name, weight in untied_llama.state_dict().items()}
    tiny.fit(untied_llama, optimizer, 2)
    untied_llama.load_state_dict(other)
    lisa.check()
    tiny.fit(untied_llama, optimizer, range(2, 4))
    lisa.check()
    frozen = min({0, 1} - set(lisa.active_blocks))
    with torch.no_grad():
        next(untied_llama.model.layers[frozen].parameters()).add_(1)
    with pytest.raises(ProofError, match=f"frozen weights moved in block {frozen}"):
        tiny.fit(untied_llama, optimizer, 1)


def test_second_lisa_on_an_optimizer_is_refused(untied_llama: nn.Module) -> None:
    optimizer, _ = attach(untied_llama)
    with pytest.raises(RuntimeError, match="already attached to this optimizer; call its detach"):
        LISA(untied_llama, optimizer)


def test_a_model_divided_in_part_is_refused_and_nothing_is_changed(
    untied_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    with monkeypatch.context() as patch:
        patch.setattr("lisatune.distributed.ranks.count", lambda: 2)
        patch.setattr("lisatune.lisa.checks.is_sharded", lambda p: p.ndim == 2)
        with pytest.raises(RuntimeError, match="fully_shard has divided a part of the model"):
            LISA(untied_llama, optimizer)
    assert all(p.requires_grad for p in untied_llama.parameters())
    assert "lisa" not in optimizer.state_dict()
    LISA(untied_llama, optimizer)


def test_a_model_that_the_older_fsdp_wraps_is_refused_on_several_ranks(
    untied_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = object.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    untied_llama.model.wrapper = wrapper
    monkeypatch.setattr("lisatune.distributed.ranks.count", lambda: 2)
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(FSDP1\).*use torch's fully_shard"):
        attach(untied_llama)


def test_ranks_that_appear_later_are_refused_at_the_next_step(
    untied_llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, _ = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, 2)
    monkeypatch.setattr("lisatune.distributed.ranks.count", lambda: 2)
    with pytest.raises(RuntimeError, match="there are 2 ranks, and 1 when LISA was attached"):
        tiny.fit(untied_llama, optimizer, 1)


def test_whole_numbers_may_be_numpys(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    given = {"active": np.int64(2), "seed": np.int64(5), "period": np.int64(3), "total_steps": np.int64(60)}
    lisa = LISA(untied_llama, optimizer, **given)
    assert len(lisa.active_blocks) == 2
    assert (type(lisa.seed), type(lisa.period)) == (int, int)  # a checkpoint holds plain numbers


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"active": 7}, "active must be between 0 and the model's 6 blocks, got 7"),
        ({"active": "2"}, "active must be a whole number, got '2'"),
        ({"active": 2.0}, "active must be a whole number, got 2.0"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"warmup": 0.5}, "warmup must be a whole number, got 0.5"),
        ({"total_steps": 1e3}, "total_steps must be a whole number, got 1000.0"),
        ({"active": -1}, "active must be between 0 and the model's 6 blocks, got -1"),
        ({"period": 0}, 'period must be a number of optimizer steps >= 1 or "auto", got 0'),
        ({"period": 2.5}, 'period must be a number of optimizer steps >= 1 or "auto", got 2.5'),
        ({"period": "auto"}, 'period="auto" needs total_steps'),
        ({"sampler": [0.5] * 5}, "got 5 probabilities for 6 blocks"),
        ({"sampler": np.ones(5)}, "got 5 probabilities for 6 blocks"),
        ({"sampler": Permutation(4, 2)}, "the sampler draws from 4 blocks and the model has 6"),
        ({"sampler": [0.5] * 5 + [float("nan")]}, "the probability of block 5 must be 0 or more, got nan"),
        ({"sampler": "random"}, "unknown sampler 'random'"),
        (
            {"state": "dropp"},
            "state must be one of 'drop', 'reset', 'second_moment', 'cpu', 'keep', got 'dropp'",
        ),
        ({"ends": "none"}, "ends 'none': there is no 'none'. Allowed: train, head, frozen, every:M, 8bit"),
        (
            {"ends": "8bit"},
            "their param groups in AdamW say moments=None; build it as lisatune.AdamW",
        ),
        ({"ends": "every:2", "active": 0}, "ends='every:2' needs active >= 1"),
        ({"verify": "yes"}, "verify must be one of 'sample', 'full', 'off', got 'yes'"),
        ({"warmup": 3}, "warmup must be >= 0 and below period=3, got 3"),
        ({"warmup": -1}, "warmup must be >= 0 and below period=3, got -1"),
        ({"ends": "frozen", "active": 0}, "ends='frozen' needs active >= 1"),
        ({"ends": "frozen", "sampler": Independent((0.5,) * 6)}, "a sampler other than Independent"),
        ({"layers": LayerMap(BLOCKS, ("lm_head",))}, "layers names 'lm_head', which LlamaForCausalLM"),
        ({"layers": LayerMap((*BLOCKS, "model.layers.6"), ())}, "layers names 'model.layers.6'"),
        ({"layers": LayerMap(BLOCKS, ("lm_head.weight",))}, "'model.embed_tokens.weight' is in no block"),
        ({"frozen_weights": "int8", "correction": "sign"}, "correction sign moves frozen weights"),
        ({"correction": "lora", "sampler": Fixed((0,), chances=5)}, "gives 5 chances for 6 blocks"),
        ({"sampler": Fixed((1, 6))}, "must return different numbers of blocks, from 0 to 5"),
        ({"sampler": Fixed((-1,))}, "it returned (-1,)"),
        ({"sampler": Fixed((2, 2))}, "it returned (2, 2)"),
        ({"sampler": Fixed(None)}, "it returned None"),
        (
            {"sampler": Fixed(()), "ends": "frozen"},
            "Fixed drew no blocks for period 0, in which the ends rest",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_and_nothing_is_changed(
    untied_llama: nn.Module, options: dict[str, Any], complaint: str
) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    before = {id(each): set(vars(each)) for each in (optimizer, *untied_llama.modules())}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        LISA(untied_llama, optimizer, **{"period": 3, **options})
    assert complaint in str(caught.value)
    assert all(p.requires_grad for p in untied_llama.parameters())
    assert {id(each): set(vars(each)) for each in (optimizer, *untied_llama.modules())} == before
    LISA(untied_llama, optimizer)


def test_a_sampler_that_draws_nothing_later_is_refused_if_the_ends_rest_then(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    LISA(untied_llama, optimizer, period=1, sampler=Fixed(()), ends="every:2")
    untied_llama(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    with pytest.raises(ValueError, match=r"Fixed drew no blocks for period 1, .*\(ends='every:2'\)"):
        optimizer.step()


def test_an_optimizer_whose_step_mixes_parameters_is_refused(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(untied_llama.parameters())
    with pytest.raises(TypeError, match=r"LISA cannot work with LBFGS.*frozen blocks would move too"):
        LISA(untied_llama, optimizer)


def test_a_store_of_exact_weights_is_refused_where_no_block_becomes_codes(untied_llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="frozen_weights is 'exact'; leave masters out"):
        attach(untied_llama, masters=RamMasters())


@pytest.mark.filterwarnings("ignore:.* did not require grad when LISA was attached:UserWarning")
@pytest.mark.parametrize("options", [{"active": 0}, {"sampler": Independent((0.5,) * 6)}])
def test_periods_that_might_train_nothing_are_refused_where_the_ends_are_frozen(
    untied_llama: nn.Module, options: dict[str, Any]
) -> None:
    for p in find_layers(untied_llama).end_parameters(untied_llama).values():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in untied_llama.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="a model without ends that train needs active >= 1"):
        LISA(untied_llama, optimizer, **options)
    LISA(untied_llama, optimizer)


def test_what_a_sampler_of_ones_own_draws_is_held_as_plain_numbers_in_rising_order(
    untied_llama: nn.Module,
) -> None:
    _, lisa = attach(untied_llama, sampler=Fixed(torch.tensor([4, 1])))
    assert lisa.active_blocks == (1, 4)
    assert {type(block) for block in lisa.active_blocks} == {int}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model": "smollm2-135m"}, "model must be a torch.nn.Module, got 'smollm2-135m'; load it first"),
        ({"layers": "model.layers"}, "layers must be what find_layers(model) returns, got 'model.layers'"),
        ({"masters": Path("/scratch")}, 'masters=lisatune.DiskMasters("/scratch")'),
        ({"sampler": None}, "sampler must be a name, one number per block or a lisatune.Sampler, got None"),
        ({"sampler": None, "unit": "module"}, "sampler must be a name, one number per block"),
        ({"sampler": dict.fromkeys(range(6), 1.0)}, "sampler must be a name, one number per block"),
        ({"sampler": ["a"] * 6}, "sampler must be a name, one number per block"),
    ],
)
def test_a_name_in_the_place_of_what_it_names_is_refused(
    untied_llama: nn.Module, options: dict[str, Any], complaint: str
) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    with pytest.raises(TypeError) as caught:
        LISA(**{"model": untied_llama, "optimizer": optimizer, **options})
    assert complaint in str(caught.value)
    LISA(untied_llama, optimizer)


def test_a_second_detach_does_nothing_to_the_lisa_that_was_attached_after_the_first(
    untied_llama: nn.Module,
) -> None:
    optimizer, first = attach(untied_llama)
    first.detach()
    second = LISA(untied_llama, optimizer, active=2, period=3, verify="full")
    first.detach()
    tiny.fit(untied_llama, optimizer, 6)
    assert second.periods_proven == 2


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_lisa_cannot_be_copied_because_its_copy_would_draw_nothing(
    untied_llama: nn.Module, copies: Callable[[Any], Any]
) -> None:
    _, lisa = attach(untied_llama)
    with pytest.raises(TypeError, match=r"a LISA cannot be copied or pickled, .* attach a new LISA"):
        copies(lisa)


# ---- coverage


def test_blocks_that_will_never_train_are_named_beforehand() -> None:
    model = tiny.llama(blocks=32)
    optimizer = torch.optim.AdamW(model.parameters())
    expected = r"25 of 32 blocks will never train in 122 steps with period=20: \d+(, \d+){24}; train longer"
    with pytest.warns(UserWarning, match=expected) as caught:
        lisa = LISA(model, optimizer, active=1, period=20, total_steps=122)
    assert caught[0].filename == __file__
    never = {i for i, count in enumerate(lisa.planned_visits(122)) if count == 0}
    assert str(caught[0].message).split(": ")[1].split("; ")[0] == ", ".join(map(str, sorted(never)))


@pytest.mark.parametrize(
    ("period", "advice"), [(1, "train longer, or let"), (2, "longer, draw more often, or")]
)
def test_a_run_that_draws_in_every_step_is_not_told_to_draw_more_often(
    untied_llama: nn.Module, period: int, advice: str
) -> None:
    with pytest.warns(UserWarning, match=advice):
        attach(untied_llama, active=1, period=period, total_steps=3)


def test_enough_steps_and_gamma_zero_give_no_warning(untied_llama: nn.Module) -> None:
    for options in ({"total_steps": 7}, {"active": 0, "total_steps": 1}, {}):
        _, lisa = attach(untied_llama, **options)
        lisa.detach()


def test_planned_visits_come_true(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, sampler="uniform")
    plan = lisa.planned_visits(10)
    tiny.fit(untied_llama, optimizer, 10)
    assert tuple(lisa.visits) == plan


def test_auto_period_trains_every_block_twice(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, period="auto", total_steps=25)
    assert lisa.period == 4
    tiny.fit(untied_llama, optimizer, 24)
    assert lisa.visits == [2] * 6


def test_independent_coins_train_what_they_draw(untied_llama: nn.Module) -> None:
    coins = Independent((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    optimizer, lisa = attach(untied_llama, sampler=coins, period=1, active=0)
    expected = [0] * 6
    for period in range(8):
        for block in coins.draw(period, seed=0):
            expected[block] += 1
    tiny.fit(untied_llama, optimizer, 8)
    assert lisa.visits == expected
    assert lisa.periods_proven == 8


# ---- activation checkpointing


def gradients(model: nn.Module, *, reentrant: bool | None, ends: str) -> dict[str, Tensor]:
    """Gradients with the four lowest blocks frozen."""
    optimizer, lisa = attach(model, sampler=(0.0, 0.0, 0.0, 0.0, 1.0, 1.0), ends=ends)
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    tiny.backward(model, 0)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(lisa.trainable_parameters())
    for step in range(3):
        optimizer.zero_grad()
        tiny.backward(model, step)
        optimizer.step()
    assert lisa.periods_proven == 1
    return found


@pytest.mark.parametrize("ends", ["train", "frozen"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_keeps_the_gradients(
    tied_llama: nn.Module, reentrant: bool, ends: str
) -> None:
    plain = gradients(copy.deepcopy(tied_llama), reentrant=None, ends=ends)
    checkpointed = gradients(tied_llama, reentrant=reentrant, ends=ends)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
