"""Numbers about each block that a sampler may read during training.

A sampler that names numbers in `Sampler.reads` gets them at each draw as `BlockStatistics`. A number that the
sampler does not name is not collected. For a block l with weights θ_l and gradients g_l, where a norm is the
L2 norm over all parameters of the block:

    visits         periods in which it has trained
    idle           periods since it trained last; since the start of training, if it never has
    weight norm    ‖θ_l‖ at the end of the last period in which it trained; before that, at the start
    gradient norm  √(mean over the steps of that period of ‖g_l‖²), after clipping
    update norm    √(mean over the steps of that period of ‖Δθ_l‖²), where Δθ_l is one step's change
    gradient average
                   A_l ← keeps A_l + (1 - keeps) m after each of its periods, where m is the mean of ‖g_l‖
                   over the steps, after clipping; at first A_l = m. `keeps` is the sampler's
    gradient change
                   η_l = |s_l - s_l'| / s_l', where s_l = ‖Σ g_l‖₁ is the L1 norm of the sum of the gradients
                   over the steps of its last period, and s_l' that of the period before
    spectrum       signal-to-noise ratio of θ_l (`lisatune.lisa.spectrum`), once, when LISA is attached
    weight history the last records of a sample of θ_l, one after each period (`lisatune.lisa.weight_history`)

The gradient and update norms of a block that has not trained yet are NaN. On several ranks a norm is that of
the whole block, so all ranks read equal numbers.

Cost for each step: one pass over the gradients of the active blocks for the gradient norm; a copy of the
active blocks' weights while the optimizer updates them, and one pass over both, for the update norm; 4 bytes
for each number of the active blocks, all the time, and a pass over them and their gradients, for the gradient
change. The weight history costs nothing in a step.

Shapes: N blocks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import full_tensor, has_values, local_part
from lisatune.lisa.weight_history import WeightHistory

__all__ = [
    "PER_STEP",
    "BlockStatistics",
    "Collector",
    "Readable",
    "collected_tensors",
    "watch",
]

Readable = Literal[
    "visits",
    "weight_norm",
    "gradient_norm",
    "update_norm",
    "idle",
    "gradient_average",
    "gradient_change",
    "spectrum",
    "weight_history",
]
"""What a sampler may name in `reads`."""

PER_STEP = ("gradient_norm", "gradient_average", "gradient_change", "update_norm")
"""Numbers that are collected in every step, from the gradients or from the update."""


@dataclass(frozen=True, kw_only=True)
class BlockStatistics:
    """Numbers about each block: float64 [N] on the CPU, equal on all ranks; `weight_history` is [N, R, S].

    A field is None unless the sampler names it in `reads`. NaN: not known yet.
    """

    visits: Tensor | None = None
    idle: Tensor | None = None
    weight_norm: Tensor | None = None
    gradient_norm: Tensor | None = None
    gradient_average: Tensor | None = None
    gradient_change: Tensor | None = None
    update_norm: Tensor | None = None
    spectrum: Tensor | None = None
    weight_history: Tensor | None = None


class Collector:
    """Collects, while blocks train, the numbers that a sampler reads. `LISA` calls it.

    Args:
        blocks: the parameters of each block.
        reads: the numbers to collect, each a `Readable`.
        exact: returns the numbers of a parameter that may be frozen. Default: the parameter.
        keeps: share of the old value that `gradient_average` keeps.
        spectra: measures the spectrum of each block.
        records: how many records `weight_history` keeps.

    Raises:
        ValueError: `reads` names something that is not collected, or not on several ranks.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Parameter]],
        reads: Sequence[str],
        exact: Callable[[nn.Parameter], Tensor] | None = None,
        *,
        keeps: float = 0.0,
        spectra: Callable[[], Sequence[float]] | None = None,
        records: int = 0,
    ) -> None:
        for name in reads:
            if name not in get_args(Readable):
                known = ", ".join(get_args(Readable))
                raise ValueError(f"a sampler cannot read {name!r}; it can read {known}")
        if "gradient_change" in reads and ranks.count() > 1:
            raise ValueError(
                "a sampler can read gradient_change on one rank only, because a rank has parts of gradients"
            )
        self._blocks, self._reads, self._keeps = blocks, tuple(reads), keeps
        self._exact = exact or (lambda parameter: parameter)
        with unset_fake_temporarily():  # a sampler reads real numbers, also in a memory plan
            self._norms = {
                name: torch.full((len(blocks),), math.nan, dtype=torch.float64)
                for name in reads
                if name not in ("visits", "weight_history")
            }
            if "idle" in reads:
                self._norms["idle"].zero_()
            if "spectrum" in reads and spectra is not None:
                self._norms["spectrum"] = torch.tensor(spectra(), dtype=torch.float64)
        self._squares: dict[str, dict[int, Tensor]] = {name: {} for name in PER_STEP if name in reads}
        self._steps = 0
        self._before: dict[nn.Parameter, Tensor] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._sum_norms = [math.nan] * len(blocks)
        self._history = WeightHistory(blocks, records) if "weight_history" in reads else None
        if "weight_norm" in reads:
            self._measure_weights(range(len(blocks)))

    def make_room(self, active: Iterable[int]) -> None:
        """Hold sums of gradients, and weight histories, for these blocks and no others, if they are read."""
        if "gradient_change" in self._reads:
            parameters = [p for block in active for p in self._blocks[block]]
            self._sums = {
                p: self._sums[p] if p in self._sums else torch.zeros_like(p, dtype=torch.float32)
                for p in parameters
            }
        if self._history is not None:
            self._history.make_room(active)

    @property
    def tensors(self) -> list[Tensor]:
        """What is held of the active blocks: float32 sums of their gradients, and weight histories."""
        return [*self._sums.values(), *([] if self._history is None else self._history.tensors)]

    def before_step(self, active: Iterable[int]) -> None:
        """Keep the weights that the optimizer is about to update, if the sampler reads update norms."""
        if "update_norm" in self._reads:
            self._before = {p: p.detach().clone() for block in active for p in self._blocks[block]}

    def after_step(self, active: Iterable[int]) -> None:
        """Add a step to the numbers of the active blocks. Call it while the step's gradients exist."""
        self._steps += 1
        for block in active:
            parameters = self._blocks[block]
            if "gradient_norm" in self._reads:
                self._add("gradient_norm", block, [p.grad for p in parameters if p.grad is not None])
            if "gradient_average" in self._reads:
                gradients = [p.grad for p in parameters if p.grad is not None]
                self._add("gradient_average", block, gradients, power=0.5)
            for p in parameters if self._sums else ():
                if p.grad is not None:
                    self._sums[p].add_(p.grad)
            if "update_norm" in self._reads:
                self._add("update_norm", block, [self._before.pop(p).sub_(p.detach()) for p in parameters])
        self._before = {}

    def end_period(self, active: Sequence[int]) -> None:
        """Compute the numbers of the blocks that trained, and begin the next period."""
        for name, squares in self._squares.items():
            for block in active:
                if block in squares:
                    mean = float(squares[block]) / self._steps
                    self._norms[name][block] = (
                        self._average(block, mean) if name == "gradient_average" else math.sqrt(mean)
                    )
            squares.clear()
        for block in active if self._sums else ():
            self._norms["gradient_change"][block] = self._change(block)
        if "idle" in self._reads:
            self._norms["idle"] += 1
            self._norms["idle"][list(active)] = 0
        if "weight_norm" in self._reads:
            self._measure_weights(active)
        if self._history is not None:
            self._history.record(active)
        self._steps = 0

    def _average(self, block: int, mean: float) -> float:
        before = float(self._norms["gradient_average"][block])
        return mean if math.isnan(before) else self._keeps * before + (1 - self._keeps) * mean

    def _change(self, block: int) -> float:
        """Return η of a block whose period has ended, and clear its sums."""
        sums = [self._sums[p] for p in self._blocks[block]]
        now = sum(float(each.abs().sum(dtype=torch.float64)) for each in sums)
        before, self._sum_norms[block] = self._sum_norms[block], now
        for each in sums:
            each.zero_()
        return abs(now - before) / before if before else math.nan

    def statistics(self, visits: Sequence[int]) -> BlockStatistics:
        """Return the numbers that the sampler reads.

        Args:
            visits: in how many periods each block has trained.
        """
        with unset_fake_temporarily():
            read = {name: norms.clone() for name, norms in self._norms.items()}
            if "visits" in self._reads:
                read["visits"] = torch.tensor(visits, dtype=torch.float64)
        if self._history is not None:
            read["weight_history"] = self._history.stack()
        return BlockStatistics(**read)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was collected, also inside a period."""
        squares = {
            name: {str(block): value.detach().cpu().clone() for block, value in squares.items()}
            for name, squares in self._squares.items()
        }
        return {
            "steps": self._steps,
            "norms": {name: norms.clone() for name, norms in self._norms.items()},
            "squares": squares,
            "sum_norms": list(self._sum_norms),
            "sums": {
                f"{block}.{place}": self._sums[p].cpu().clone()
                for block, parameters in enumerate(self._blocks)
                for place, p in enumerate(parameters)
                if p in self._sums
            },
            "history": {} if self._history is None else self._history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._steps = state["steps"]
        self._norms = {name: norms.clone() for name, norms in state["norms"].items()}
        self._squares = {
            name: {
                int(block): value.clone().to(self._blocks[int(block)][0].device)
                for block, value in squares.items()
            }
            for name, squares in state["squares"].items()
        }
        self._before = {}
        self._sum_norms = list(state.get("sum_norms", self._sum_norms))
        self._sums = {}
        for key, value in state.get("sums", {}).items():
            block, _, place = key.partition(".")
            p = self._blocks[int(block)][int(place)]
            self._sums[p] = value.clone().to(p.device)
        if self._history is not None:
            self._history.load_state_dict(state["history"])

    def _measure_weights(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            norm = _compute_squared_norm([self._exact(p) for p in self._blocks[block]]).sqrt()
            if has_values(norm):  # NaN stays for a model that has only shapes
                self._norms["weight_norm"][block] = float(norm)

    def _add(self, name: str, block: int, tensors: Sequence[Tensor], power: float = 1.0) -> None:
        if tensors:
            squared = _compute_squared_norm(tensors)
            squared = squared if power == 1 else squared**power
            known = self._squares[name].get(block)
            self._squares[name][block] = squared if known is None else known + squared


_collectors: "WeakKeyDictionary[Optimizer, Collector]" = WeakKeyDictionary()


def watch(optimizer: Optimizer, collector: Collector) -> None:
    """Let `collected_tensors` find what is collected beside an optimizer."""
    _collectors[optimizer] = collector


def collected_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return what is collected beside an optimizer as large tensors, for the count of memory."""
    collector = _collectors.get(optimizer)
    return [] if collector is None else collector.tensors


def _compute_squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared L2 norm over tensors, each whole or divided among ranks: a scalar on their device.

    It stays on the device, so nothing waits for it. Each tensor's norm is taken in float32; the squares are
    added in float64 if the device has it.
    """
    device = local_part(tensors[0]).device
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    for tensor in tensors:
        norm = full_tensor(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))
        total = total + norm.to(device, wide).square()
    return total
