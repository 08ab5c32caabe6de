"""A hook on a parameter runs as long as its owner lives, and keeps nothing alive."""

import gc
import weakref

import torch
from torch import Tensor, nn

import tiny
from lisatune import AdamW
from lisatune.optim.gradient_hooks import after_gradient


class Owner:
    """Holds parameters and hooks on them."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Tensor] = []
        self.hooks = [after_gradient(p, self.take) for p in model.parameters()]

    def take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the gradient is complete"
        self.calls.append(parameter)


def backward(model: nn.Module) -> None:
    model(torch.ones(2)).sum().backward()


def test_the_method_is_called_for_each_parameter_until_the_hook_is_removed() -> None:
    model = nn.Linear(2, 2)
    owner = Owner(model)
    backward(model)
    assert {id(p) for p in owner.calls} == {id(p) for p in model.parameters()}
    for hook in owner.hooks:
        hook.remove()
    backward(model)
    assert len(owner.calls) == 2


def test_an_owner_that_is_gone_is_not_called_and_does_not_stay_with_its_parameters() -> None:
    model = nn.Linear(2, 2)
    owner = Owner(model)
    backward(model)
    alive = [weakref.ref(owner), weakref.ref(model.weight)]
    del owner
    gc.collect()
    assert alive[0]() is None
    backward(model)
    del model
    gc.collect()
    assert alive[1]() is None


def test_a_model_that_was_updated_in_backward_is_freed() -> None:
    def train() -> list["weakref.ref[object]"]:
        model = tiny.llama(blocks=2)
        optimizer = AdamW(model.parameters())
        optimizer.update_in_backward()
        tiny.fit(model, optimizer, 2)
        return [weakref.ref(optimizer), *(weakref.ref(p) for p in model.parameters())]

    alive = train()
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
