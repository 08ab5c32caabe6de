"""The learning rate of a block follows from its chance to train, in a step and nowhere else."""

import copy
import logging
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from transformers.optimization import Adafactor

import tiny
from lisatune import LISA, AdamW, Sampler, build_adamw, find_layers, param_groups, scale_block_lr
from lisatune.methods import BAdam, EndsOnly, Lisa, Method
from lisatune.recipe import OptimizerConfig

ROOT_3 = 3**0.5  # 1/√π of 2 of 6 blocks


def watch(optimizer: Optimizer) -> list[dict[nn.Parameter, float]]:
    """Record at every step the rate that the optimizer uses for each parameter."""
    seen: list[dict[nn.Parameter, float]] = []
    optimizer.register_step_pre_hook(  # runs after LISA's
        lambda *_: seen.append({p: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]})
    )
    return seen


def trainers_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Make the two groups of HF Trainer, which both mix ends and blocks."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]


def freeze_frame(optimizer: Optimizer) -> list[Any]:
    """Return all that must be the same after a step as before: the list, its groups and their contents."""
    groups = optimizer.param_groups
    inner = [(id(g), list(map(id, g["params"])), {k: g[k] for k in g.keys() - {"params"}}) for g in groups]
    return [id(groups), inner]


@pytest.mark.parametrize(("how", "power"), [("inverse", -1), ("sqrt", -0.5), ("none", 0)])
def test_rates_of_blocks_are_scaled_by_their_chance_to_train(
    how: Literal["inverse", "sqrt", "none"], power: float
) -> None:
    config = OptimizerConfig(lr=1e-3, ends_lr=1e-4)
    chances = (1.0, 0.5, 0.0, 0.25, 0.125, 1.0)
    for method, expected in (
        (Lisa(active=2, lr_scaling=how), (1 / 3,) * 6),
        (Lisa(active=0, lr_scaling=how), (1.0,) * 6),
        (Lisa(active=4, sampler="window", lr_scaling=how), (0.5, 0.5, 1, 1, 0.5, 0.5)),
        (Lisa(sampler="independent", probabilities=chances, lr_scaling=how), (1, 0.5, 1, 0.25, 0.125, 1)),
    ):
        model = tiny.llama()
        layers = find_layers(model)
        optimizer = method.build_optimizer(model, layers, config)
        lisa = method.attach(model, optimizer, layers, total_steps=100)
        seen, before = watch(optimizer), freeze_frame(optimizer)
        tiny.fit(model, optimizer, 1)
        assert freeze_frame(optimizer) == before
        assert {seen[0][p] for p in layers.end_parameters(model).values()} == {1e-4}
        for i, block in enumerate(layers.block_parameters(model)):
            factor = expected[i] ** power
            assert [seen[0][p] for p in block.values()] == pytest.approx([1e-3 * factor] * len(block))
            assert lisa.lr_factor(i) == pytest.approx(factor)


@pytest.mark.parametrize("method", [BAdam(), EndsOnly()], ids=["badam", "ends"])
def test_rates_of_other_methods_are_the_recipes(method: Method, untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = method.build_optimizer(untied_llama, layers, OptimizerConfig(lr=1e-3))
    schedule = method.attach(untied_llama, optimizer, layers, total_steps=300)
    seen = watch(optimizer)
    tiny.fit(untied_llama, optimizer, 1)
    assert set(seen[0].values()) == {1e-3}
    assert schedule.lr_factor(-1) == 1.0


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=False),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2)),
    "fused, tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True),
    "ours": lambda groups: AdamW(groups, lr=1e-2),
    "ours, tensor": lambda groups: AdamW(groups, lr=torch.tensor(1e-2)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_param_groups_train_as_groups_by_layer_with_scaled_rates(kind: str) -> None:
    trained = []
    for by_layer in (False, True):
        model = tiny.llama(tied=True)
        layers = find_layers(model)
        groups = param_groups(model, layers, weight_decay=0.1) if by_layer else trainers_groups(model)
        for group in groups:  # the embedding is decayed by Trainer, and not by `param_groups`
            group["weight_decay"] = 0.1
        optimizer = OPTIMIZERS[kind](groups)
        if by_layer:
            scale_block_lr(optimizer, [1 / 3] * 6)
        LISA(model, optimizer, period=2)
        before = freeze_frame(optimizer)
        tiny.fit(model, optimizer, 5)
        after = freeze_frame(optimizer)
        for _, _, options in (*before[1], *after[1]):
            options.pop("steps_done", None)
        assert after == before
        trained.append(model)
    tiny.assert_same_weights(*trained)


def test_parts_of_a_group_keep_the_names_of_their_parameters(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.named_parameters(), lr=1e-2)
    LISA(untied_llama, optimizer)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(
            pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)
        )
    )
    tiny.fit(untied_llama, optimizer, 1)
    assert len(optimizer.param_groups) == 1
    assert dict(seen) == dict(untied_llama.named_parameters())


SCHEDULES: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 3)),
    "recursive": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
}


@pytest.mark.parametrize(
    ("kind", "lr"),
    [
        *((kind, 1e-2) for kind in SCHEDULES),
        *((kind, torch.tensor(1e-2)) for kind in ("lambda", "recursive")),
    ],
)
def test_schedules_do_not_notice_and_blocks_follow_them(
    untied_llama: nn.Module, kind: str, lr: float | Tensor
) -> None:
    bare = torch.optim.AdamW(trainers_groups(copy.deepcopy(untied_llama)), lr=copy.deepcopy(lr), fused=True)
    optimizer = torch.optim.AdamW(trainers_groups(untied_llama), lr=copy.deepcopy(lr), fused=True)
    schedule, its_schedule = SCHEDULES[kind](bare), SCHEDULES[kind](optimizer)
    layers = find_layers(untied_llama)
    lisa = LISA(untied_llama, optimizer, period=4, warmup=1)
    seen = watch(optimizer)
    for step in range(6):
        alone = float(bare.param_groups[0]["lr"])
        active = lisa.active_blocks
        tiny.backward(untied_llama, step)
        optimizer.step()
        its_schedule.step()
        bare.step()
        schedule.step()
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == [float(group["lr"]) for group in bare.param_groups]
        assert {seen[step][p] for p in layers.end_parameters(untied_llama).values()} == {alone}
        for i, block in enumerate(layers.block_parameters(untied_llama)):
            ramp = 0.5 if i in active and step % 4 == 0 else 1.0
            rates = [seen[step][p] for p in block.values()]
            assert rates == pytest.approx([alone * ROOT_3 * ramp] * len(block), rel=1e-6)


def test_a_schedule_in_a_hook_from_before_sees_the_groups_as_they_were_built(
    untied_llama: nn.Module,
) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    lisa = LISA(untied_llama, optimizer, active=2, period=3)
    tiny.fit(untied_llama, optimizer, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 5]
    lisa.detach()
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_scaled_rates_of_a_loop_of_ones_own(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    shared = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(param_groups(untied_llama, layers, weight_decay=0.1), lr=shared)
    scale_block_lr(optimizer, [0.25] * 5 + [1.0])
    rates = {group["layer"]: float(group["lr"]) for group in optimizer.param_groups}
    doubled = dict.fromkeys((f"block {i}" for i in range(5)), 2e-2)
    assert rates == pytest.approx({"ends": 1e-2, **doubled, "block 5": 1e-2})
    assert float(shared) == pytest.approx(1e-2)


def test_rates_are_scaled_once(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2)
    scale_block_lr(optimizer, [1 / 3] * 6)
    with pytest.raises(ValueError, match="are scaled already; call scale_block_lr once"):
        scale_block_lr(optimizer, [1 / 3] * 6)
    lisa = LISA(untied_llama, optimizer, warmup=1)
    seen = watch(optimizer)
    tiny.fit(untied_llama, optimizer, 2)
    last = next(iter(layers.block_parameters(untied_llama)[lisa.active_blocks[0]].values()))
    assert [rates[last] for rates in seen] == pytest.approx([1e-2 * ROOT_3 / 2, 1e-2 * ROOT_3])
    assert lisa.lr_factor(0) == 1.0


@pytest.mark.parametrize("groups", ["layers", "model"])
def test_rates_are_not_scaled_of_groups_that_mix_or_miss_blocks(untied_llama: nn.Module, groups: str) -> None:
    layers = find_layers(untied_llama)
    of = param_groups(untied_llama, layers) if groups == "layers" else untied_llama.parameters()
    optimizer = torch.optim.AdamW(of, lr=1e-2)
    found = 6 if groups == "layers" else 0
    with pytest.raises(ValueError, match=f"got 3 chances for {found} blocks.*param_groups"):
        scale_block_lr(optimizer, [0.5] * 3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


def test_warmup_of_a_period_ramps_each_rate_from_its_own(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2, ends_lr=1e-3)
    lisa = LISA(untied_llama, optimizer, period=2, warmup=1, ends="every:2", layers=layers, lr_scaling="none")
    seen: list[tuple[float, float]] = []
    block = f"block {lisa.active_blocks[0]}"

    def note(*_: object) -> None:
        rates = {group["layer"]: group["lr"] for group in optimizer.param_groups}
        seen.append((rates["ends"], rates[block]))

    optimizer.register_step_pre_hook(note)  # runs after LISA's
    tiny.fit(untied_llama, optimizer, 2)
    assert seen == [(5e-4, 5e-3), (1e-3, 1e-2)]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]) == (1e-3, 1e-2)


def test_rates_that_the_optimizer_finds_itself_are_left_to_it(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    optimizer = Adafactor(param_groups(untied_llama, layers))
    with pytest.raises(ValueError, match="warmup needs a learning rate to ramp, and Adafactor has lr=None"):
        LISA(untied_llama, optimizer, warmup=1)
    lisa = LISA(untied_llama, optimizer)
    tiny.fit(untied_llama, optimizer, 1)
    assert {group["lr"] for group in optimizer.param_groups} == {None}
    assert lisa.lr_factor(0) == 1.0


# ---- a step that raises, and what happens between hook and step


class OutOfMemoryError(Exception):
    pass


def raising_closure() -> float:
    raise OutOfMemoryError


@pytest.mark.parametrize("scheduler", ["none", "before", "after"])
def test_step_that_raises_leaves_groups_and_rates_as_they_were(
    untied_llama: nn.Module, scheduler: str
) -> None:
    optimizer = torch.optim.AdamW(trainers_groups(untied_llama), lr=1e-2)
    own = vars(optimizer).get("step")
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduler == "before" else None
    lisa = LISA(untied_llama, optimizer)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduler == "after" else schedule
    before = freeze_frame(optimizer)
    with pytest.raises(OutOfMemoryError):
        optimizer.step(raising_closure)
    assert freeze_frame(optimizer) == before
    if schedule is not None:
        tiny.fit(untied_llama, optimizer, 1)
        schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3 if schedule else 1e-2}
    lisa.detach()
    if scheduler == "none":
        assert vars(optimizer).get("step") is own
    tiny.fit(untied_llama, optimizer, 1)


@pytest.mark.parametrize("groups", ["model", "trainer"])
def test_update_in_backward_equals_step(groups: str) -> None:
    trained = []
    for in_backward in (False, True):
        model = tiny.llama().to(torch.bfloat16)
        of = trainers_groups(model) if groups == "trainer" else model.parameters()
        optimizer = AdamW(of, lr=1e-2, rounding="stochastic")
        if in_backward:
            optimizer.update_in_backward()
        LISA(model, optimizer, period=2, warmup=1)
        before = freeze_frame(optimizer)
        tiny.fit(model, optimizer, 5)
        after = freeze_frame(optimizer)
        assert [options.pop("steps_done") for _, _, options in after[1]] == [5] * len(after[1])
        assert [options.pop("steps_done") for _, _, options in before[1]] == [0] * len(before[1])
        assert after == before
        trained.append(model)
    tiny.assert_same_weights(*trained)


def test_rate_that_is_set_between_backward_and_step_holds(untied_llama: nn.Module) -> None:
    optimizer = AdamW(untied_llama.parameters(), lr=1e-2)
    optimizer.update_in_backward()
    LISA(untied_llama, optimizer)
    tiny.backward(untied_llama, 0)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3]


class Counting(torch.optim.SGD):
    """Keeps numbers in its param groups, as some optimizers do."""

    def __init__(self, params: Any, key: str) -> None:
        super().__init__(params, lr=1e-2)
        self.key = key

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group[self.key] = max(group.get(self.key, 0.0), group["lr"])
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_stays_there(untied_llama: nn.Module) -> None:
    optimizer = Counting(untied_llama.parameters(), "lr")
    LISA(untied_llama, optimizer)
    tiny.fit(untied_llama, optimizer, 3)
    assert [group["steps"] for group in optimizer.param_groups] == [3]


def test_what_an_optimizer_keeps_of_each_rate_needs_groups_by_layer(untied_llama: nn.Module) -> None:
    optimizer = Counting(untied_llama.parameters(), "lr_max")
    lisa = LISA(untied_llama, optimizer)
    with pytest.raises(RuntimeError, match=r"Counting keeps 'lr_max' in its param groups.*param_groups"):
        tiny.fit(untied_llama, optimizer, 1)
    assert [set(g["params"]) for g in optimizer.param_groups] == [set(untied_llama.parameters())]
    lisa.detach()
    optimizer = Counting(param_groups(untied_llama, find_layers(untied_llama)), "lr_max")
    LISA(untied_llama, optimizer)
    tiny.fit(untied_llama, optimizer, 1)
    assert optimizer.param_groups[1]["lr_max"] == pytest.approx(1e-2 * ROOT_3)


# ---- save and resume


def continue_from(
    saved: dict[str, Any], weights: dict[str, Tensor], groups: str, **options: Any
) -> nn.Module:
    """Load a state into a new model, optimizer and LISA, and train three steps more."""
    model = tiny.llama(seed=1)
    of = param_groups(model, find_layers(model)) if groups == "layers" else trainers_groups(model)
    optimizer = torch.optim.AdamW(of, lr=1e-2, fused=True)
    LISA(model, optimizer, period=4, **options)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    tiny.fit(model, optimizer, range(6, 9))
    return model


@pytest.mark.parametrize("groups", ["layers", "trainer"])
@pytest.mark.parametrize("is_old", [False, True])
def test_resume_is_bit_equal_also_of_states_whose_rates_lisa_did_not_scale(groups: str, is_old: bool) -> None:
    model = tiny.llama()
    of = param_groups(model, find_layers(model)) if groups == "layers" else trainers_groups(model)
    optimizer = torch.optim.AdamW(of, lr=1e-2, fused=True)
    if is_old and groups == "layers":  # as recipes did
        for group in optimizer.param_groups[1:]:
            group["lr"] *= ROOT_3
    LISA(model, optimizer, period=4, lr_scaling="none" if is_old else "sqrt")
    tiny.fit(model, optimizer, 6)
    saved, weights = copy.deepcopy(optimizer.state_dict()), tiny.weights(model)
    if is_old:
        del saved["lisa"]["settings"]["lr_scaling"]
    tiny.fit(model, optimizer, range(6, 9))
    tiny.assert_same_weights(model, continue_from(saved, weights, groups))


def test_old_rates_stay_over_a_second_resume(untied_llama: nn.Module) -> None:
    optimizer = build_adamw(untied_llama, find_layers(untied_llama), lr=1e-2)
    LISA(untied_llama, optimizer)
    saved = optimizer.state_dict()
    del saved["lisa"]["settings"]["lr_scaling"]
    for _ in range(2):
        model = tiny.llama()
        optimizer = build_adamw(model, find_layers(model), lr=1e-2)
        lisa = LISA(model, optimizer)
        optimizer.load_state_dict(saved)
        assert lisa.lr_factor(-1) == 1.0
        saved = optimizer.state_dict()


def test_state_saved_under_another_scaling_is_refused(untied_llama: nn.Module) -> None:
    optimizer = build_adamw(untied_llama, find_layers(untied_llama), lr=1e-2)
    LISA(untied_llama, optimizer, lr_scaling="none")
    model = tiny.llama()
    other = build_adamw(model, find_layers(model), lr=1e-2)
    LISA(model, other)
    with pytest.raises(ValueError, match="lr_scaling: saved none, now sqrt"):
        other.load_state_dict(optimizer.state_dict())


# ---- what is said


def test_scaling_is_said_once(untied_llama: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lisatune")
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=1e-2)
    lisa = LISA(untied_llama, optimizer, period=2)
    tiny.fit(untied_llama, optimizer, 5)
    assert [record.message for record in caplog.records] == [
        "blocks train at 1.73 × the optimizer's learning rate, because each trains in a part of the steps "
        'only; lr_scaling="none" gives all layers one rate'
    ]
    lisa.detach()
    LISA(untied_llama, optimizer, lr_scaling="none")
    assert len(caplog.records) == 1


class Short(Sampler):
    num_blocks = 6

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        return (0,)

    def inclusion(self) -> tuple[float, ...]:
        return (0.5,)


def test_chances_of_other_blocks_than_the_models_are_refused(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="gives 1 chances for 6 blocks"):
        LISA(untied_llama, optimizer, sampler=Short())
    wrong: Any = "cube"
    with pytest.raises(ValueError, match="lr_scaling must be one of 'sqrt', 'inverse', 'none', got 'cube'"):
        LISA(untied_llama, optimizer, lr_scaling=wrong)
