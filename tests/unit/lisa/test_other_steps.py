import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import tiny
from lisatune import LISA, ProofError


@pytest.fixture
def pair(tiny_llama: nn.Module) -> Iterator[tuple[nn.Module, Optimizer, Optimizer, LISA]]:
    """A model, the optimizer that LISA is attached to, another one over the same weights, and LISA."""
    mine, other = (torch.optim.SGD(tiny_llama.parameters(), lr=1e-2) for _ in range(2))
    lisa = LISA(tiny_llama, mine, active=2, period=2)
    yield tiny_llama, mine, other, lisa
    lisa.detach()


SAYS = r"another optimizer \(SGD\) makes the steps: {} since the last one of the optimizer that LISA"


def test_a_loop_that_steps_another_optimizer_is_warned_once_and_refused_in_the_end(
    pair: tuple[nn.Module, Optimizer, Optimizer, LISA],
) -> None:
    model, _, other, lisa = pair
    with pytest.warns(UserWarning, match=SAYS.format(2)) as caught:
        tiny.fit(model, other, 4)
    assert len(caught) == 1
    with pytest.raises(ProofError, match=SAYS.format(4)):
        lisa.check()


def test_steps_that_go_elsewhere_later_are_seen(pair: tuple[nn.Module, Optimizer, Optimizer, LISA]) -> None:
    model, mine, other, lisa = pair
    tiny.fit(model, mine, 2)
    lisa.check()
    with pytest.warns(UserWarning, match=SAYS.format(2)):
        tiny.fit(model, other, 3)
    with pytest.raises(ProofError, match=SAYS.format(3)):
        lisa.check()


def test_accumulation_wrappers_and_other_weights_are_no_other_steps(
    pair: tuple[nn.Module, Optimizer, Optimizer, LISA],
) -> None:
    model, mine, other, lisa = pair
    elsewhere = nn.Linear(2, 2)
    theirs = torch.optim.SGD(elsewhere.parameters(), lr=1e-2)
    for step in range(3):
        for micro in range(4):  # gradients of four micro-batches come before the step
            tiny.backward(model, 4 * step + micro)
            elsewhere(torch.ones(1, 2)).sum().backward()
            theirs.step()
        mine.step()
        other.step()  # as a wrapper does after the optimizer inside it
        mine.zero_grad()
    other.step()
    other.step()  # without gradients it does nothing
    lisa.check()


def test_the_end_of_a_with_block_checks_and_detaches(tiny_llama: nn.Module) -> None:
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=1e-2)
    with pytest.raises(ProofError, match="has made no step"), LISA(tiny_llama, optimizer):
        pass
    with pytest.raises(KeyError, match="the loop's own"), LISA(tiny_llama, optimizer):
        raise KeyError("the loop's own")
    with LISA(tiny_llama, optimizer, period=2) as lisa:
        tiny.fit(tiny_llama, optimizer, 3)
    assert lisa.steps_done == 3
    assert all(p.requires_grad for p in tiny_llama.parameters())
    assert "lisa" not in optimizer.state_dict()


def test_a_detached_lisa_looks_no_more_and_a_forgotten_one_keeps_nothing_alive(tiny_llama: nn.Module) -> None:
    mine, other = (torch.optim.SGD(tiny_llama.parameters(), lr=1e-2) for _ in range(2))
    LISA(tiny_llama, mine).detach()
    tiny.fit(tiny_llama, other, 3)
    alive = weakref.ref(LISA(tiny_llama, mine))
    del mine
    gc.collect()
    assert alive() is None


def test_a_forgotten_lisa_that_is_collected_during_a_step_does_not_stop_it(tiny_llama: nn.Module) -> None:
    def forget() -> "weakref.ref[LISA]":
        model = tiny.llama()
        return weakref.ref(LISA(model, torch.optim.SGD(model.parameters(), lr=1e-2)))

    gc.collect()
    gc.disable()
    try:
        forgotten = forget()
        assert forgotten() is not None
        collects = register_optimizer_step_post_hook(lambda *_: gc.collect())
        optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=1e-2)
        with LISA(tiny_llama, optimizer):
            tiny.fit(tiny_llama, optimizer, 1)
        collects.remove()
    finally:
        gc.enable()
    assert forgotten() is None
