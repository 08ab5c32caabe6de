"""Invariants 5 and 6: the position inside a period is saved, and resume is exact."""

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import tiny
from lisatune import LISA, build_adamw, find_layers
from lisatune.lisa.samplers import Sampler

POLICIES = ("drop", "reset", "second_moment", "cpu", "keep")
STEPS = 14
PERIOD = 4


class Run:
    """A model, fused AdamW with a group per layer, LISA with a warmup, and a schedule."""

    def __init__(self, *, model_seed: int = 0, **options: Any) -> None:
        self.model = tiny.llama(tied=True, seed=model_seed)
        layers = find_layers(self.model)
        self.optimizer = build_adamw(self.model, layers, lr=1e-2, weight_decay=0.1)
        chosen = {
            "active": 3,
            "period": PERIOD,
            "sampler": "uniform",
            "warmup": 2,
            "verify": "full",
            **options,
        }
        self.lisa = LISA(self.model, self.optimizer, **chosen)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.95)

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.schedule)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        parts = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.schedule), parts, strict=True):
            part.load_state_dict(state)

    def fit(self, first: int, end: int, *, saves: bool = False) -> list[bytes]:
        """Train; return what it would save after each step, if asked."""
        made = []

        def after(step: int) -> None:
            self.schedule.step()
            if saves:
                made.append(self.save())

        tiny.fit(self.model, self.optimizer, range(first, end), after=after)
        return made


@functools.cache
def straight(state: str) -> tuple[Run, list[bytes]]:
    """An uninterrupted run, and what it saved after 0, 1, … steps."""
    run = Run(state=state)
    return run, [run.save(), *run.fit(0, STEPS, saves=True)]


def assert_same_run(run: Run, other: Run) -> None:
    tiny.assert_same_weights(run.model, other.model)
    mine, theirs = run.optimizer.state_dict(), other.optimizer.state_dict()
    assert mine["lisa"] == theirs["lisa"]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index, entry in theirs["state"].items():
        assert all(torch.equal(mine["state"][index][key], value) for key, value in entry.items())
    flags, others = ([p.requires_grad for p in each.model.parameters()] for each in (run, other))
    assert flags == others


@pytest.mark.parametrize(
    ("state", "step"),
    [
        *(("drop", step) for step in range(9)),  # two periods, so that blocks thaw that were frozen
        *((state, step) for state in POLICIES[1:] for step in (1, 4, 9)),
    ],
)
def test_6_resume_is_bit_equal_at_every_step(state: str, step: int) -> None:
    uninterrupted, saves = straight(state)
    resumed = Run(state=state, model_seed=1)
    resumed.load(saves[step])
    assert resumed.lisa.steps_done == step
    held = set(resumed.optimizer.state)
    if state != "keep":
        assert held <= set(resumed.lisa.trainable_parameters())
    resumed.fit(step, STEPS)
    assert_same_run(resumed, uninterrupted)


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_6_state_of_a_version_that_saved_no_previous_blocks_resumes_bit_equal(step: int) -> None:
    uninterrupted, saves = straight("drop")
    parts = torch.load(io.BytesIO(saves[step]), weights_only=True)
    lisa = parts[1]["lisa"]
    assert step < PERIOD or set(lisa["previous_blocks"]) & set(lisa["active_blocks"])  # not all ramp
    del lisa["previous_blocks"]
    file = io.BytesIO()
    torch.save(parts, file)
    resumed = Run(state="drop", model_seed=1)
    resumed.load(file.getvalue())
    resumed.fit(step, STEPS)
    assert_same_run(resumed, uninterrupted)


@pytest.mark.parametrize(("state", "step"), [("drop", 1), *((state, 4) for state in POLICIES)])
def test_6_going_back_in_the_same_process_is_bit_equal(state: str, step: int) -> None:
    uninterrupted, saves = straight(state)
    run = Run(state=state)
    run.fit(0, 11)
    run.load(saves[step])
    run.fit(step, STEPS)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("state", POLICIES)
def test_6_saving_changes_nothing(state: str) -> None:
    run = Run(state=state)

    def after(step: int) -> None:
        run.schedule.step()

    tiny.fit(run.model, run.optimizer, STEPS, after=after)
    assert_same_run(run, straight(state)[0])


def test_6_proof_goes_on_after_resume() -> None:
    resumed = Run(state="drop", model_seed=1)
    resumed.load(straight("drop")[1][6])
    assert resumed.lisa.periods_proven == 1
    resumed.fit(6, 12)
    assert resumed.lisa.periods_proven == 3


def test_5_saved_state_is_plain_numbers_lists_and_strings() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, float, str, bool)

    run = Run()
    saved = run.optimizer.state_dict()["lisa"]
    assert plain(saved)
    assert saved["active_blocks"] == list(run.lisa.active_blocks)


def test_6_saved_state_is_a_copy() -> None:
    run = Run()
    saved = run.optimizer.state_dict()["lisa"]
    before = copy.deepcopy(saved)
    run.fit(0, 5)
    assert saved == before


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("sampler", {"active": 2}),
        ("sampler", {"sampler": "permutation"}),
        ("sampler", {"sampler": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}),
        ("period", {"period": 5}),
        ("seed", {"seed": 1}),
        ("state", {"state": "cpu"}),
        ("ends", {"ends": "frozen"}),
        ("ends", {"ends": "every:2"}),
        ("warmup", {"warmup": 1}),
    ],
)
def test_6_resume_with_other_settings_is_refused_and_nothing_is_changed(
    key: str, options: dict[str, Any]
) -> None:
    run = Run(**options)
    before, flags = tiny.weights(run.model), [p.requires_grad for p in run.model.parameters()]
    saved = torch.load(io.BytesIO(straight("drop")[1][6]), weights_only=True)[1]
    with pytest.raises(
        ValueError, match=rf"saved with other settings; construct it with these \({key}: saved"
    ):
        run.optimizer.load_state_dict(saved)
    assert run.lisa.steps_done == 0
    assert not run.optimizer.state
    assert flags == [p.requires_grad for p in run.model.parameters()]
    assert not tiny.moved(before, run.model)


def test_6_model_of_another_depth_is_refused() -> None:
    model = tiny.llama(tied=True, blocks=4)
    optimizer = torch.optim.AdamW(model.parameters())
    LISA(model, optimizer, active=3, period=PERIOD)
    saved = torch.load(io.BytesIO(straight("drop")[1][6]), weights_only=True)[1]
    with pytest.raises(ValueError, match="blocks: saved 6, now 4"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("has_groups", [False, True])
def test_6_a_state_of_the_same_parameters_in_another_order_is_refused(has_groups: bool) -> None:
    def attach(*, turned: bool) -> tuple[nn.Module, Optimizer, LISA]:
        model = tiny.llama()
        layers = find_layers(model)
        blocks = [list(block.values()) for block in layers.block_parameters(model)]
        every = [list(layers.end_parameters(model).values()), *(blocks[::-1] if turned else blocks)]
        groups = [{"params": each} for each in every]
        optimizer = torch.optim.AdamW(groups if has_groups else [p for each in every for p in each])
        return model, optimizer, LISA(model, optimizer, period=PERIOD)

    model, optimizer, _ = attach(turned=False)
    tiny.fit(model, optimizer, 6)
    _, same, lisa = attach(turned=False)
    same.load_state_dict(optimizer.state_dict())
    assert lisa.steps_done == 6
    _, other, lisa = attach(turned=True)
    with pytest.raises(
        ValueError, match=r"in another order \('model\.layers\.0\..* was where 'model\.layers\.5"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert (lisa.steps_done, len(other.state)) == (0, 0)


def test_6_state_that_torch_refuses_leaves_lisa_as_it_was() -> None:
    run = Run()
    saved = torch.load(io.BytesIO(straight("drop")[1][6]), weights_only=True)[1]
    del saved["param_groups"][0]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        run.optimizer.load_state_dict(saved)
    assert (run.lisa.steps_done, run.lisa.visits) == (0, [0] * 6)
    assert {p for p in run.model.parameters() if p.requires_grad} == set(run.lisa.trainable_parameters())


def test_6_state_saved_without_lisa_is_refused() -> None:
    plain = torch.optim.AdamW(tiny.llama(tied=True).parameters())
    run = tiny.llama(tied=True)
    optimizer = torch.optim.AdamW(run.parameters())
    LISA(run, optimizer)
    with pytest.raises(ValueError, match="this optimizer state was saved without LISA"):
        optimizer.load_state_dict(plain.state_dict())


def test_state_loaded_before_attaching_is_taken_over_for_what_trains(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    tiny.fit(untied_llama, optimizer, 2)
    lisa = LISA(untied_llama, optimizer, verify="full")
    assert set(optimizer.state) == set(lisa.trainable_parameters())
    tiny.fit(untied_llama, optimizer, 10)
    assert lisa.periods_proven == 1


@pytest.mark.parametrize(("steps", "ends"), [(3, "train"), (PERIOD, "train"), (3, "frozen")])
def test_6_a_state_of_lisa_that_is_loaded_too_early_is_warned_of(
    untied_llama: nn.Module, steps: int, ends: str
) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    lisa = LISA(untied_llama, optimizer, period=PERIOD, ends=ends)
    tiny.fit(untied_llama, optimizer, steps)
    saved = optimizer.state_dict()
    lisa.detach()
    LISA(untied_llama, optimizer, period=PERIOD, ends=ends).detach()  # whose state is no other run's

    other = torch.optim.AdamW(untied_llama.parameters())
    other.load_state_dict(saved)
    says = r"state already, but of \d of 6 blocks only; if LISA saved it, load it after LISA is attached"
    with pytest.warns(UserWarning, match=says) as caught:
        lisa = LISA(untied_llama, other, period=PERIOD, ends=ends)
    assert caught[0].filename == __file__
    other.load_state_dict(saved)
    assert lisa.steps_done == steps


class HooklessAdamW(torch.optim.AdamW):
    """Loads its state without torch's hooks, as the optimizers of bitsandbytes do."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        other = torch.optim.AdamW([{"params": group["params"]} for group in self.param_groups])
        other.load_state_dict(state_dict)
        self.__setstate__({"state": other.state, "param_groups": other.param_groups})


class PoliteAdamW(torch.optim.AdamW):
    """Has a `load_state_dict` of its own that runs torch's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)


def overriding(kind: type[Optimizer], seed: int, state: str) -> tuple[nn.Module, Optimizer, LISA]:
    model = tiny.llama(tied=True, seed=seed)
    optimizer = kind(model.parameters(), lr=1e-2)
    return model, optimizer, LISA(model, optimizer, period=3, state=state, verify="full")


@pytest.mark.parametrize("state", ["drop", "cpu"])
@pytest.mark.parametrize("kind", [HooklessAdamW, PoliteAdamW])
def test_6_optimizers_with_a_load_state_dict_of_their_own_resume(kind: type[Optimizer], state: str) -> None:
    model, optimizer, lisa = overriding(kind, 0, state)
    tiny.fit(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    tiny.fit(model, optimizer, range(4, 10))

    resumed, other, its_lisa = overriding(kind, 1, state)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert its_lisa.steps_done == 4
    tiny.fit(resumed, other, range(4, 10))
    tiny.assert_same_weights(resumed, model)
    assert its_lisa.visits == lisa.visits
    with pytest.raises(ValueError, match="saved without LISA"):
        other.load_state_dict({key: value for key, value in saved[1].items() if key != "lisa"})
    its_lisa.detach()
    other.load_state_dict(saved[1])
    assert other.load_state_dict.__func__ is kind.load_state_dict


def test_6_param_groups_that_something_else_replaced_stop_the_run(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    LISA(untied_llama, optimizer)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="the param groups of AdamW were replaced"):
        tiny.fit(untied_llama, optimizer, 1)


class FirstBlocks(Sampler):
    """A user's sampler, no dataclass."""

    def __init__(self, num_blocks: int, active: int) -> None:
        self.num_blocks, self.active = num_blocks, active

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        return tuple(range(self.active))

    def inclusion(self) -> tuple[float, ...]:
        return (1.0,) * self.active + (0.0,) * (self.num_blocks - self.active)


def test_6_runs_with_a_sampler_of_ones_own_are_resumed() -> None:
    run, resumed = (Run(sampler=FirstBlocks(6, 2)) for _ in range(2))
    saves = run.fit(0, 6, saves=True)
    resumed.load(saves[2])
    resumed.fit(3, 6)
    assert_same_run(resumed, run)
    with pytest.raises(ValueError, match="sampler: saved FirstBlocks"):
        Run(sampler=FirstBlocks(6, 3)).load(saves[2])
