from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import tiny
from lisatune import LISA, build_adamw, find_layers


class OfGroup(Optimizer):
    """An optimizer that counts its steps in the param group, as several packages do."""

    def __init__(self, params: Any, lr: float = 1e-3, **more: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), **more})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.count(group)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["m"] = state.get("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    state["v"] = state.get("v", torch.zeros_like(p)).lerp_(p.grad.square(), 0.001)
                    p.sub_(self.update(group, **state), alpha=group["lr"])

    def count(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, group: dict[str, Any], m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        t = group["step"]
        return (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-12)


class CountsFromItsStart(OfGroup):
    """The count is a tensor, made with the groups, and no default."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["k"] = torch.zeros(())

    def count(self, group: dict[str, Any]) -> None:
        group["k"] += 1

    def update(self, group: dict[str, Any], m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().update({"step": float(group["k"])}, m, v)


class Learns(OfGroup):
    """The group keeps no count but a scale that grows with training, as Prodigy's d."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, d=1.0)

    def count(self, group: dict[str, Any]) -> None:
        group["d"] *= 1.004

    def update(self, group: dict[str, Any], m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return group["d"] * m.sign()


class NeedsMore(OfGroup):
    """It needs the gradients' graph, so its step cannot be tried apart."""

    def count(self, group: dict[str, Any]) -> None:
        super().count(group)
        if len(group["params"]) == 1:
            raise RuntimeError("create_graph=True is needed")


class LikeLion(OfGroup):
    """It counts, and its update does not depend on the count."""

    def update(self, group: dict[str, Any], m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return m.sign()


class LikeSGD(OfGroup):
    """Its own warm-up counts steps, and there are no moments that a freeze could lose."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.count(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * min(1, group["step"] / 100))


def train(kind: type[Optimizer], *, steps: int = 8, **options: Any) -> LISA:
    model = tiny.llama(blocks=3)
    optimizer = kind(model.parameters())
    lisa = LISA(model, optimizer, **{"active": 1, "period": 2, **options})
    tiny.fit(model, optimizer, steps)
    return lisa


@pytest.mark.parametrize("state", ["drop", "reset", "second_moment"])
@pytest.mark.parametrize(("kind", "key"), [(OfGroup, "step"), (CountsFromItsStart, "k")])
def test_a_count_in_the_group_is_refused_after_the_first_step(
    kind: type[Optimizer], key: str, state: str
) -> None:
    model = tiny.llama(blocks=3)
    optimizer = kind(model.parameters())
    lisa = LISA(model, optimizer, active=1, period=5, state=state)
    says = (
        rf"{kind.__name__} keeps '{key}' per param group.*thaws late is 2\.5\d times.*state='{state}' starts"
    )
    with pytest.raises(ValueError, match=says):
        tiny.fit(model, optimizer, 5)
    assert lisa.steps_done == 1


@pytest.mark.parametrize("state", ["keep", "cpu"])
def test_with_state_that_stays_a_count_in_the_group_is_a_warning(state: str) -> None:
    with pytest.warns(UserWarning, match="keeps 'step' per param group.*once for each block") as caught:
        assert train(OfGroup, state=state).steps_done == 8
    assert len(caught) == 1


def test_what_a_group_learns_is_seen_once_it_matters() -> None:
    model = tiny.llama(blocks=3)
    optimizer = Learns(model.parameters())
    lisa = LISA(model, optimizer, active=1, period=2)
    with pytest.raises(ValueError, match=r"keeps 'd' per param group.*thaws late is 1\.0\d times"):
        tiny.fit(model, optimizer, 20)
    assert lisa.steps_done == 4  # 1.004^2 is within the tolerance of 1 %, and is tried at the end of a period


def test_an_optimizer_that_cannot_be_tried_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="keeps 'step' per param group.*could not be tried"):
        assert train(NeedsMore).steps_done == 8


@pytest.mark.parametrize("kind", [LikeLion, LikeSGD])
def test_a_count_that_no_moment_needs_is_fine(kind: type[Optimizer]) -> None:
    assert train(kind).periods_proven == 4


def test_the_trial_leaves_weights_state_groups_and_random_numbers_alone() -> None:
    trained = []
    for attached in (False, True):
        model = tiny.llama(blocks=3)
        optimizer = LikeLion(model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
        if attached:
            LISA(model, optimizer, active=3, period=2)
        torch.manual_seed(0)
        tiny.fit(model, optimizer, 6, after=lambda _, schedule=schedule: schedule.step())
        trained.append((model, torch.get_rng_state(), optimizer.param_groups[0]["step"]))
    tiny.assert_same_weights(trained[0][0], trained[1][0])
    assert torch.equal(trained[0][1], trained[1][1])
    assert trained[0][2] == trained[1][2] == 6


OWN = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")


@pytest.mark.parametrize("name", [*OWN, "Rprop", "SGD"])
def test_optimizers_of_torch_are_never_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisatune.lisa.group_state._compare_first_updates", None)  # calling it would raise
    assert train(getattr(torch.optim, name), steps=5).steps_done == 5


def test_schedules_that_change_momentum_and_rates_are_no_state_of_a_group(tiny_llama: nn.Module) -> None:
    optimizer = build_adamw(tiny_llama, find_layers(tiny_llama), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    lisa = LISA(tiny_llama, optimizer, active=2, period=2, warmup=1)
    tiny.fit(tiny_llama, optimizer, 8, after=lambda _: schedule.step())
    assert lisa.periods_proven == 4
