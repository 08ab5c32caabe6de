"""Update in backward: the same weights bit for bit, with one gradient at a time."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from lisatune import LISA, AdamW, find_layers, param_groups


def start(in_backward: bool, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, AdamW]:
    model = tiny.llama(tied=True).to(dtype)
    optimizer = AdamW(param_groups(model, find_layers(model)), lr=1e-3, **options)
    if in_backward:
        optimizer.update_in_backward()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["exact", "stochastic"])
def test_weights_are_those_of_updates_in_step(dtype: torch.dtype, rounding: Any) -> None:
    results = []
    for in_backward in (False, True):
        model, optimizer = start(in_backward, dtype, rounding=rounding)
        tiny.fit(model, optimizer, 5)
        results.append(model)
    tiny.assert_same_weights(*results)


@pytest.mark.parametrize("options", [{}, {"period": 1}, {"warmup": 1}, {"state": "cpu"}, {"state": "reset"}])
def test_lisa_trains_proves_and_ramps_as_ever(options: dict[str, Any]) -> None:
    results = []
    for in_backward in (False, True):
        model, optimizer = start(in_backward, torch.bfloat16)
        lisa = LISA(model, optimizer, **{"active": 2, "period": 3, "verify": "full", **options})
        tiny.fit(model, optimizer, 12)
        assert lisa.periods_proven == 12 // lisa.period
        assert lisa.steps_done == 12
        results.append(model)
    tiny.assert_same_weights(*results)


def test_lisa_still_sees_drawn_blocks_that_nothing_updates() -> None:
    model, optimizer = start(True)
    lisa = LISA(model, optimizer, active=2, period=1, verify="full")
    updates = optimizer.in_backward
    assert updates is not None
    tiny.fit(model, optimizer, 1)
    updates.remove()
    tiny.backward(model, 1)
    model.zero_grad()
    updates.end_step()
    updates._updated.clear()
    with pytest.raises(RuntimeError, match="drawn but not trained"):
        optimizer.step()  # without any gradient
    assert lisa.periods_proven == 1


def test_gradients_are_released_as_they_are_used() -> None:
    peaks = {}
    for in_backward in (False, True):
        model, optimizer = start(in_backward)
        alive: list[int] = []

        def count(_: Any, model: nn.Module = model, alive: list[int] = alive) -> None:
            alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

        for p in model.parameters():  # these run after the optimizer's hook
            p.register_post_accumulate_grad_hook(count)
        tiny.backward(model, 0)
        peaks[in_backward] = max(alive)
        optimizer.step()
    everything = sum(p.nbytes for p in start(False)[0].parameters())
    assert peaks[False] == everything
    assert peaks[True] == 0  # seen between two updates


def test_step_counts_and_gradient_norm_is_the_global_one() -> None:
    model, optimizer = start(True)
    updates = optimizer.in_backward
    assert updates is not None
    other, _ = start(False)
    tiny.backward(other, 0)
    tiny.backward(model, 0)
    want = nn.utils.get_total_norm([p.grad for p in other.parameters() if p.grad is not None])
    torch.testing.assert_close(updates.grad_norm(), want)
    before = tiny.weights(model)
    optimizer.step()
    assert not tiny.moved(before, model)
    assert {group["steps_done"] for group in optimizer.param_groups} == {1}
    assert float(updates.grad_norm()) == 0


def test_schedules_do_not_notice() -> None:
    model, optimizer = start(True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.fit(model, optimizer, 3, after=lambda _: schedule.step())
    assert optimizer.param_groups[0]["lr"] == 1e-3 / 4


def test_accumulation_is_refused() -> None:
    model, _ = start(True)
    tiny.backward(model, 0)
    with pytest.raises(RuntimeError, match="cannot accumulate gradients, so call step"):
        tiny.backward(model, 1)


def test_frozen_parameters_are_refused() -> None:
    model, optimizer = start(False)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="1 do not require grad; call it before anything is frozen"):
        optimizer.update_in_backward()


def test_a_loss_scaler_is_refused() -> None:
    class Wrapper:
        """As AcceleratedOptimizer holds them."""

        def __init__(self, optimizer: Any, scaler: Any) -> None:
            self.optimizer, self.scaler = optimizer, scaler

    scaler = torch.amp.GradScaler("cpu")
    model = tiny.llama()
    optimizer = AdamW(model.parameters())
    LISA(model, Wrapper(optimizer, scaler)).detach()
    optimizer.update_in_backward()
    LISA(model, Wrapper(optimizer, None)).detach()
    with pytest.raises(ValueError, match=r"cannot work with a loss scaler \(GradScaler, fp16\)"):
        LISA(model, Wrapper(optimizer, scaler))


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("with_lisa", [False, True])
def test_a_loss_scaler_in_the_loop_is_refused(with_lisa: bool, unscales: bool) -> None:
    model, optimizer = start(True)
    if with_lisa:
        LISA(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=tiny.tokens(0), labels=tiny.tokens(0)).loss).backward()
    if unscales:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"update in backward .* loss scaler .* GradScaler\(enabled=False\)"):
        scaler.step(optimizer)
