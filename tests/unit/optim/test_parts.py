"""Which optimizers may update the rows of a matrix that a rank holds, and no others."""

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from lisatune.optim.muon import MuonWithAdamW
from lisatune.optim.parts import works_on_parts


class LearnsOneNumber(Optimizer):
    """Steps by the norm of all gradients, as Prodigy's `d` follows from sums over all parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(p.grad / norm)


def with_muon(named: list[Any]) -> Optimizer:
    return MuonWithAdamW([{"params": named[:1], "matrices": True}, {"params": named[1:]}], lr=0.1)


@pytest.mark.parametrize(
    ("build", "works"),
    [
        (lambda named: torch.optim.SGD(named, 0.1, momentum=0.9), True),
        (torch.optim.NAdam, True),
        (torch.optim.Adafactor, False),
        (with_muon, False),
        (LearnsOneNumber, False),
    ],
)
def test_a_trial_on_halves_tells_what_needs_the_whole(build: Any, works: bool) -> None:
    before = torch.get_rng_state()
    assert works_on_parts(build) is works
    assert torch.equal(torch.get_rng_state(), before)
