"""What AdamW refuses to keep or to update."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lisatune import AdamW
from lisatune.optim.state import fused_adamw


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of exact, stochastic, nearest, got 'up'"),
        ({"moments": "fp8"}, "moments must be one of fp32, bf16, 8bit, factored, got 'fp8'"),
        ({"state_device": "cuda"}, "state_device must be one of None, cpu, got 'cuda'"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"chunk_size": 100}, "chunk_size must be a positive multiple of 256, got 100"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(3))], **options)


def test_half_precision_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW([weight])
    with pytest.raises(ValueError, match=r"got torch\.float16; load the model in one of these"):
        optimizer.step()


def test_rate_that_is_a_tensor_goes_to_the_card_of_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.device, torch.device]] = []

    def note(weights: list[Tensor], *_: Any, lr: Tensor, **__: Any) -> None:
        seen.append((weights[0].device, lr.device))

    monkeypatch.setattr(torch, "_fused_adamw_", note)
    with FakeTensorMode():
        weights = [nn.Parameter(torch.ones(3, device=f"cuda:{card}")) for card in (0, 1)]
        group = AdamW(weights, lr=torch.tensor(1e-2, device="cuda:0")).param_groups[0]
        fused_adamw(group, weights, weights, weights, weights, weights)
    assert seen == [(torch.device("cuda", card), torch.device("cuda", card)) for card in (0, 1)]
