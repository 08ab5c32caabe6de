"""LISA with optimizers whose moments have 8 bits; skipped where their packages are not installed."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import tiny
from lisatune import LISA, find_layers, param_groups

LIBRARIES = ["torchao", "bitsandbytes"]
POLICIES = ["drop", "reset", "cpu", "keep"]

# Both libraries, and the compiler that torchao calls, use what is deprecated elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchao's update run as it is written: to compile it for every shape takes most of a minute."""
    monkeypatch.setattr(torch, "compile", lambda update, **_: update)


def start(library: str, seed: int = 0, **options: Any) -> tuple[nn.Module, Optimizer, LISA]:
    """Weights of 4096 and more elements have moments of 8 bits: all matrices but those of keys and values."""
    module = pytest.importorskip(f"{library}.optim")
    model = tiny.llama(hidden=64, seed=seed)
    optimizer = module.AdamW8bit(param_groups(model, find_layers(model)), lr=1e-2)
    return model, optimizer, LISA(model, optimizer, active=2, period=2, verify="full", **options)


@pytest.mark.parametrize("library", LIBRARIES)
def test_drawn_blocks_train_and_the_others_have_no_state(library: str) -> None:
    model, optimizer, lisa = start(library)

    def check(step: int) -> None:
        assert set(optimizer.state) <= set(lisa.trainable_parameters())

    tiny.fit(model, optimizer, 6, after=check)
    assert lisa.periods_proven == 3
    assert lisa.visits == [1] * 6


@pytest.mark.parametrize("library", LIBRARIES)
def test_state_bytes_are_those_of_8_bit_moments(library: str) -> None:
    model, optimizer, lisa = start(library)
    tiny.fit(model, optimizer, 1)
    sizes = [p.numel() for p in lisa.trainable_parameters()]
    large, small = (sum(n for n in sizes if (n >= 4096) is is_large) for is_large in (True, False))
    tables = 2 * 1024 * len(sizes)  # what the 256 codes of each moment mean; bitsandbytes shares them
    assert 2 * large + 8 * small < lisa.state_bytes() <= 2.04 * large + 8 * small + tables + 4 * len(sizes)


@pytest.mark.parametrize("state", POLICIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_resume_inside_a_period_is_bit_equal(library: str, state: str) -> None:
    model, optimizer, lisa = start(library, state=state, warmup=1)
    tiny.fit(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    tiny.fit(model, optimizer, range(3, 8))

    resumed, its_optimizer, its_lisa = start(library, seed=1, state=state, warmup=1)
    weights, moments = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    its_optimizer.load_state_dict(moments)
    tiny.fit(resumed, its_optimizer, range(3, 8))
    tiny.assert_same_weights(resumed, model)
    assert its_lisa.visits == lisa.visits
