"""Proof that the drawn blocks trained and nothing else did.

Every layer gets a 64-bit fingerprint at the start and at the end of a period. The fingerprint of a drawn
block must have changed, and not to NaN; that of every other block must be the same.

The fingerprint of integers x_i (the parameters' bits) is sum_i w_i·x_i modulo 2^64 with w_i odd and mixed
from i. Integer sums are exact in any order, and odd numbers have an inverse modulo 2^64, so a change of any
single element always shows. A change of several elements stays hidden with a chance of about 2^-63.

"full" reads every element. "sample" reads one window of up to 1024 elements from each parameter. The window
moves with each period and has read all n elements after ⌈n/1024⌉ periods. An optimizer that touches a frozen
block touches all of it, so this is seen in the same period. Damage to a few rows is seen in the period that
reads them.

Weights of fewer than 32 bits can train without a change in their window: Adam's later updates are a small
part of the learning rate, and rounding swallows most of them. If a drawn layer of such weights did not change
in its window, it is read in full until it is seen to move, and refused if it does not move then either.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import local_part, part_of
from lisatune.lisa.moved_share import MovedShare
from lisatune.lisa.windows import locate_window, read_window

__all__ = [
    "Proof",
    "ProofError",
    "Verify",
    "describe_proof",
    "fingerprint",
    "fingerprint_whole",
    "has_reason_to_move",
    "may_hide",
]

Verify = Literal["sample", "full", "off"]
"""How much of every parameter a proof reads; `off` takes none."""

CHUNK = 1 << 22
"""Elements that are hashed at once, because that needs them in int64."""

ODD = 0x1E3779B97F4A7C15
"""An odd number whose multiples are far apart modulo 2^64."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""


class ProofError(RuntimeError):
    """The wrong weights trained: a drawn block did not move or became NaN, or another one moved."""


class Proof:
    """Fingerprints of all layers over a period.

    Call `begin` before the first step of a period, `saw_step` after every step while its gradients are still
    there, and `end` after the last one.

    Args:
        layers: name of each layer and its parameters.
        verify: "sample" or "full".
        moved: counts how many numbers of the drawn blocks move; None does not count.
        counted: names of the layers that `moved` counts, the blocks.
        read: the tensors that hold a parameter's numbers now. Default: the parameter.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[nn.Parameter]],
        verify: Literal["sample", "full"],
        moved: MovedShare | None = None,
        *,
        counted: Iterable[str] = (),
        read: Callable[[nn.Parameter], Sequence[Tensor]] | None = None,
    ) -> None:
        self._read_parameter = read or (lambda parameter: (parameter,))
        self._layers = {name: tuple(parameters) for name, parameters in layers.items() if parameters}
        self.verify, self.moved, self._counted = verify, moved, frozenset(counted)
        self._before: Tensor | None = None
        self._period = 0
        self._drawn: set[str] = set()
        self._free: set[str] = set()
        self._idle: set[str] = set()  # drawn layers that no step has given a reason to move
        self._coarse: set[str] = set()  # layers whose movement a window can miss
        self._doubted: set[str] = set()  # layers read in full until they are seen to move
        self.periods = 0
        """Periods proven so far."""

    @property
    def is_open(self) -> bool:
        """Whether a period has begun and has not been checked yet."""
        return self._before is not None

    def begin(self, period: int, drawn: Set[str], free: Set[str] = frozenset()) -> None:
        """Take the fingerprints that the end of the period is compared with.

        Args:
            period: its number, from 0.
            drawn: names of the layers that train in it.
            free: names of layers that may move or not.
        """
        self._period = period
        self._drawn, self._free = set(drawn) & self._layers.keys(), set(free)
        self._idle, self._coarse = set(self._drawn), set()
        self._before = self._fingerprints()
        if self.moved is not None:
            blocks = sorted(self._drawn & self._counted)
            self.moved.begin(period, {name: self._layers[name] for name in blocks})

    def saw_step(
        self, groups: Iterable[Mapping[str, Any]], updated_before: Set[nn.Parameter] = frozenset()
    ) -> None:
        """Note which drawn layers this step must move.

        Args:
            groups: the optimizer's param groups, with the learning rates of the step. A rate of None is one
                that the optimizer finds by itself (transformers' Adafactor); it always moves the weights.
            updated_before: parameters that were updated during backward. Their gradients are gone, so they
                never count as layers that must move.
        """
        if not self._idle:
            return
        rates = {
            p: math.inf if group["lr"] is None else group["lr"] for group in groups for p in group["params"]
        }
        for name in tuple(self._idle):
            parameters = self._layers[name]
            if updated_before.isdisjoint(parameters) and has_reason_to_move(
                parameters, rates, sample=self._sample(name)
            ):
                self._idle.remove(name)
                if may_hide(parameters):
                    self._coarse.add(name)

    def forget(self) -> None:
        """Drop the period's fingerprints, because weights are about to be replaced from outside."""
        self._before = None
        if self.moved is not None:
            self.moved.forget()

    def end(self, *, still_open: bool = False) -> None:
        """Check the period that `begin` opened.

        A drawn layer may stay unchanged if no step had a reason to move it, because its learning rate or
        gradients were zero. If a layer did not change in its window, and the window can miss that it moved,
        the layer is read in full from now on and the period does not count as proven.

        Args:
            still_open: the period continues: check it so far, and do not count it.

        Raises:
            ProofError: names every offending layer and the period.
        """
        if self._before is None:
            return
        # Each rank reads its part of a layer that is divided among ranks.
        moved_R = [ranks.max_over_ranks(each) for each in (self._fingerprints() != self._before).tolist()]
        moved = {name for name, has_moved in zip(self._layers, moved_R, strict=True) if has_moved}
        strangers = sorted(moved - self._drawn - self._free)
        resting = self._drawn - moved - self._idle
        doubted = resting & {name for name in self._coarse if self._sample(name) is not None}
        if strangers:
            raise ProofError(
                f"period {self._period}: frozen weights moved in {', '.join(strangers)}; "
                f"something besides this optimizer changed them, or gradients were put on frozen parameters"
            )
        if surely := sorted(resting - doubted):
            raise ProofError(
                f"period {self._period}: drawn but not trained: {', '.join(surely)}; their gradients never "
                f"reached the optimizer, or the updates were too small for the weights' dtype"
            )
        if broken := self._find_nan(sorted(moved & self._drawn)):
            raise ProofError(
                f"period {self._period}: the weights became NaN in {', '.join(broken)}, because a loss or "
                "gradients were not finite; lower the learning rate or clip gradients, and go back to a "
                "checkpoint from before"
            )
        if not still_open:
            self._doubted = (self._doubted - moved) | doubted
            self.periods += not doubted
            self._before = None
            if self.moved is not None:
                self.moved.end((self._drawn - self._idle) | moved)

    def _find_nan(self, names: Iterable[str]) -> list[str]:
        """Return the layers that hold NaN where their fingerprints read."""
        with torch.no_grad():
            found = {name: _has_nan(self._layers[name], self._sample(name)) for name in names}
        return [name for name, has_nan in found.items() if ranks.max_over_ranks(int(has_nan))]

    def _sample(self, name: str) -> int | None:
        """Return the number that places a layer's windows in this period; None if every element is read."""
        return self._period if self.verify == "sample" and name not in self._doubted else None

    def _fingerprints(self) -> Tensor:
        """Take one int64 per layer, on the CPU."""
        with torch.no_grad():
            prints = [
                fingerprint(
                    [tensor for p in parameters for tensor in self._read_parameter(p)],
                    sample=self._sample(name),
                )
                for name, parameters in self._layers.items()
            ]
            return torch.stack([each.cpu() for each in prints])


def describe_proof(
    proof: Proof | None, resting: int, rest: int, correction: str = "", word: str = "block"
) -> str:
    """Say how far a run is proven.

    Args:
        proof: what was taken; None if nothing was.
        resting: blocks that were frozen.
        rest: steps that came after the last complete period.
        correction: what is said of corrected blocks.
        word: what is drawn, block or module.
    """
    if proof is None:
        return "none taken: method.verify is off"
    periods = f"{proof.periods} period{'' if proof.periods == 1 else 's'}"
    tail = f" and {rest} step{'' if rest == 1 else 's'}" if rest else ""
    share = proof.moved.share if proof.moved is not None else None
    moved = "" if share is None else f" ({100 * share:.3g} % of their numbers)"
    read = "" if proof.verify == "full" else " in a moving sample"
    others = correction if correction.startswith("others") else f"{resting} others bit-identical{read}"
    besides = f"; {correction}" if correction and others != correction else ""
    return f"{periods}{tail}: drawn {word}s moved{moved}, {others}{besides}"


def fingerprint(parameters: Sequence[Tensor], *, sample: int | None = None) -> Tensor:
    """Hash the bits of several tensors into one int64 scalar on the first one's device.

    Args:
        parameters: tensors of any shape, of a dtype of 1, 2, 4 or 8 bytes, on any devices.
        sample: hash one window per tensor; this number decides where it is. None: hash everything.
    """
    parameters = [local_part(parameter) for parameter in parameters]
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.int64, device=device)
    parts: list[Tensor] = []
    for index, parameter in enumerate(parameters):
        bits = parameter.reshape(-1).view(INTEGERS[parameter.element_size()])
        if sample is not None:
            parts.append(read_window(bits, sample, index).to(device, torch.int64))
        else:
            for chunk in torch.split(bits, CHUNK):
                total = total * ODD + _weighted_sum(chunk.to(torch.int64)).to(device)
    return _weighted_sum(torch.cat(parts)) if parts else total


def fingerprint_whole(parameter: Tensor) -> int:
    """Hash the bits of all elements of a tensor; every rank that holds a part of it must call it.

    The result is the same however the tensor is divided among ranks.

    Args:
        parameter: a tensor of any shape, of a dtype of 1, 2, 4 or 8 bytes, on any device.
    """
    part, mine = part_of(parameter), local_part(parameter)
    bits = mine.reshape(-1).view(INTEGERS[mine.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for index, chunk in enumerate(torch.split(bits, CHUNK)):
        total += _weighted_sum(chunk.to(torch.int64), start=part.start + index * CHUNK)
    return int(part.sum(total))


def has_reason_to_move(
    parameters: Sequence[nn.Parameter], rates: Mapping[nn.Parameter, Any], *, sample: int | None = None
) -> bool:
    """Tell whether a step must show in a layer's fingerprint. Call it while the step's gradients exist.

    Adam moves a weight w by about its learning rate, and rounding swallows that unless lr is well above
    eps·|w| of the dtype. A layer must move if enough of the weights that the fingerprint reads, 16 or a
    quarter, have a gradient and lr > 2·eps·|w|. So a layer may rest if its learning rate is zero (in the
    first step of many schedules) or nearly zero (in the last steps), or if its gradients are zero (in a batch
    without a label; in a window, for rows of tokens that did not occur). A missing gradient is no reason to
    rest.

    Args:
        parameters: the layer's, in the order of its fingerprint.
        rates: learning rate of each.
        sample: as for `fingerprint`.
    """
    driven = [(index, p) for index, p in enumerate(parameters) if rates[p] != 0]
    if all(p.grad is None for _, p in driven):
        return bool(driven)
    with_gradient = [(index, p, p.grad) for index, p in driven if p.grad is not None]
    wanted = movable = 0
    for index, p, gradient in with_gradient:
        weights, gradients = _read(local_part(p), local_part(gradient), index, sample)
        wanted += weights.numel() if sample is not None else p.numel()
        for some, their in zip(torch.split(weights, CHUNK), torch.split(gradients, CHUNK), strict=True):
            coarse = 2 * torch.finfo(p.dtype).eps * some.abs()
            movable += int(((their != 0) & (coarse < rates[p])).sum())
            if movable >= 16:
                return True
    return wanted > 0 and 4 * movable >= wanted


def may_hide(parameters: Sequence[nn.Parameter]) -> bool:
    """Tell whether a window can miss that a layer trains: it has gradients, and weights of 8 or 16 bits."""
    coarse = all(p.element_size() < 4 for p in parameters)
    return coarse and any(p.grad is not None for p in parameters)


def _read(weight: Tensor, gradient: Tensor, index: int, sample: int | None) -> tuple[Tensor, Tensor]:
    """Return the elements of a weight that the fingerprint reads, and their gradients."""
    if not gradient.is_sparse:
        pair = weight.reshape(-1), gradient.reshape(-1)
        if sample is None:
            return pair
        return read_window(pair[0], sample, index), read_window(pair[1], sample, index)
    gradient = gradient.coalesce()
    ids_n, values_nD = gradient._indices()[0], gradient._values()
    if sample is None:
        return weight[ids_n].reshape(-1), values_nD.reshape(-1)
    width = weight[0].numel()
    at = locate_window(weight.numel(), sample, index)
    first, last = at.start // width, (at.stop - 1) // width
    is_near_n = (ids_n >= first) & (ids_n <= last)
    near = values_nD.new_zeros(last + 1 - first, width)
    near[ids_n[is_near_n] - first] = values_nD[is_near_n]
    begin = at.start - first * width
    return weight.reshape(-1)[at], near.view(-1)[begin : begin + at.stop - at.start]


def _has_nan(parameters: Sequence[Tensor], sample: int | None) -> Tensor:
    """Tell whether a layer holds NaN where its fingerprint reads; a bool scalar."""
    found = []
    for index, parameter in enumerate(parameters):
        values = local_part(parameter).reshape(-1)
        values = values if sample is None else read_window(values, sample, index)
        found += [chunk.isnan().any() for chunk in torch.split(values, CHUNK)]
    return torch.stack([each.to(found[0].device) for each in found]).any()


def _weighted_sum(values: Tensor, *, start: int = 0) -> Tensor:
    first = start + 1
    weights = torch.arange(first, first + values.numel(), dtype=torch.int64, device=values.device).mul_(ODD)
    # Weights in an arithmetic series would let small changes cancel: 1·(-8) + 3·1 + 5·1 = 0.
    weights.bitwise_xor_(weights >> 31).mul_(ODD).bitwise_or_(1)
    return weights.mul_(values).sum()
