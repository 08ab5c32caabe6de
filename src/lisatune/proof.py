"""Proof that the drawn blocks trained and nothing else did.

Every layer gets a 64-bit fingerprint at the start and at the end of a period. A block that was drawn must
have another one, every other block must have the same.

The fingerprint of integers x_i (the parameters' bits) is sum_i (2i+1)·c·x_i modulo 2^64 with c odd. Integer
sums are exact in any order, and odd numbers have an inverse modulo 2^64, so a change of any single element
always shows; a change of several hides with a chance of about 2^-64.

"full" reads every element. "sample" reads one window of up to 1024 elements from each parameter, at a place
that moves with the period: an optimizer that touches a frozen block touches all of it, so it is seen in the
same period, and damage to a few rows only is seen sooner or later.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Proof", "ProofError", "fingerprint", "has_reason_to_move"]

WINDOW = 1024
CHUNK = 1 << 22
ODD = 0x1E3779B97F4A7C15
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ProofError(RuntimeError):
    """The wrong weights trained: a drawn block did not move, or another one did."""


class Proof:
    """Fingerprints of all layers over a period.

    Args:
        layers: name of each layer and its parameters.
        verify: "sample" or "full".
    """

    def __init__(self, layers: Mapping[str, Sequence[Tensor]], verify: Literal["sample", "full"]) -> None:
        self._layers = {name: tuple(parameters) for name, parameters in layers.items() if parameters}
        self._verify = verify
        self._before: Tensor | None = None
        self._period = 0
        self.periods = 0
        """Periods proven so far."""

    @property
    def is_open(self) -> bool:
        """Whether a period has begun and not been checked yet."""
        return self._before is not None

    def begin(self, period: int) -> None:
        """Take the fingerprints that the end of the period is compared with."""
        self._period = period
        self._before = self._fingerprints()

    def forget(self) -> None:
        """Drop the period's fingerprints: weights are about to be replaced from outside."""
        self._before = None

    def end(self, *, moving: set[str], may_rest: set[str], still_open: bool = False) -> None:
        """Check the period that `begin` opened.

        Args:
            moving: layers that were drawn.
            may_rest: those of them that had no reason to move: a learning rate or gradients of zero.
            still_open: the period goes on; it is checked so far and not counted.

        Raises:
            ProofError: names every offending layer and the period.
        """
        if self._before is None:
            return
        moved_R = (self._fingerprints() != self._before).tolist()
        moved = {name for name, has_moved in zip(self._layers, moved_R, strict=True) if has_moved}
        drawn = moving & self._layers.keys()
        strangers = sorted(moved - drawn)
        idle = sorted(drawn - moved - may_rest)
        if strangers:
            raise ProofError(
                f"period {self._period}: frozen weights moved in {', '.join(strangers)}; "
                f"something besides this optimizer changed them, or gradients were put on frozen parameters"
            )
        if idle:
            raise ProofError(
                f"period {self._period}: drawn but not trained: {', '.join(idle)}; their gradients never "
                f"reached the optimizer, or the updates were too small for the weights' dtype"
            )
        if not still_open:
            self.periods += 1
            self._before = None

    def _fingerprints(self) -> Tensor:
        """One int64 per layer, on the CPU."""
        sampled = self._period if self._verify == "sample" else None
        with torch.no_grad():
            prints = [fingerprint(parameters, sample=sampled) for parameters in self._layers.values()]
            return torch.stack([each.cpu() for each in prints])


def fingerprint(parameters: Sequence[Tensor], *, sample: int | None = None) -> Tensor:
    """Hash the bits of several tensors into one int64 scalar on their device.

    Args:
        parameters: tensors of any shape and dtype.
        sample: hash one window per tensor, whose place follows from this number. None: hash everything.
    """
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.int64, device=device)
    parts: list[Tensor] = []
    for index, parameter in enumerate(parameters):
        bits = parameter.detach().reshape(-1).view(INTEGERS[parameter.element_size()])
        if sample is not None:
            places = max(bits.numel() - WINDOW, 0) + 1
            start = (sample * (WINDOW + 1) * 7919 + index * 104729) % places
            parts.append(bits[start : start + WINDOW].to(torch.int64))
        else:
            for chunk in torch.split(bits, CHUNK):
                total = total * ODD + _weighted_sum(chunk.to(torch.int64))
    return _weighted_sum(torch.cat(parts)) if parts else total


def has_reason_to_move(parameters: Sequence[nn.Parameter], rates: dict[nn.Parameter, Any]) -> bool:
    """Tell whether a step must move a layer whose gradients are still there.

    A learning rate of zero (the first step of many schedules) and gradients that are all zero (a batch
    without a label) are reasons to rest; missing gradients are not.
    """
    if all(rates[p] == 0 for p in parameters):
        return False
    gradients = [p.grad for p in parameters if p.grad is not None]
    return not gradients or any(bool(gradient.any()) for gradient in gradients)


def _weighted_sum(values: Tensor) -> Tensor:
    weights = torch.arange(values.numel(), dtype=torch.int64, device=values.device).mul_(2).add_(1)
    return (values * weights.mul_(ODD)).sum()
