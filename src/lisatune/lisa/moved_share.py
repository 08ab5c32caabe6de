"""How many numbers of the drawn blocks a period has changed.

The proof asks whether a block moved. One number in a thousand is enough for that, and that is what happens to
bf16 weights whose updates are rounded to nearest: at a small learning rate nearly all of them stand still. So
up to 1024 neighbouring numbers of each parameter are kept when a period begins, and compared when it ends.

A bf16 weight of `lisatune.AdamW` is the upper half of a float32 number. Its lower half, the remainder, counts
as a part of it.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import local_part
from lisatune.lisa.windows import locate_window

__all__ = ["MovedShare", "rounds_to_nearest"]

FEW = 0.1
"""Share of the numbers below which a period is warned of, if updates are rounded to nearest."""


class MovedShare:
    """Estimates the share of the drawn blocks' numbers that changed, over the periods of a run.

    Args:
        optimizer: it may name state that is a part of the weight, in its attribute `lasting_state`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._lasting: tuple[str, ...] = tuple(getattr(optimizer, "lasting_state", ()))
        self._before: dict[str, list[tuple[nn.Parameter, list[Tensor]]]] = {}
        self._period, self._has_warned = 0, False
        self.total, self.periods = 0.0, 0
        """Sum of the periods' shares, and how many periods were counted."""

    @property
    def share(self) -> float | None:
        """Mean over the periods, 0 to 1; None before the end of the first one."""
        return self.total / self.periods if self.periods else None

    def begin(self, period: int, blocks: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Keep a window of each parameter of the drawn blocks; its place depends on `period`."""
        self._period = period
        self._before = {name: [(p, self._read(p)) for p in block] for name, block in blocks.items()}

    def end(self, names: set[str]) -> None:
        """Count what has changed in those of the blocks that had a reason to move."""
        parts = [part for name, block in self._before.items() if name in names for part in block]
        self._before = {}
        shares = [self._compare(was, self._read(p)) for p, was in parts]
        sizes = [local_part(p).numel() for p, _ in parts]
        changed = (
            sum(s * n for s, n in zip(torch.stack(shares).tolist(), sizes, strict=True)) if parts else 0.0
        )
        changed, size = ranks.sum_over_ranks(changed, float(sum(sizes)))
        if size > 0:
            self.total, self.periods = self.total + changed / size, self.periods + 1
            self._warn_of_few(changed / size)

    def forget(self) -> None:
        """Drop what `begin` has kept."""
        self._before = {}

    def _read(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return a window of a parameter and of its lasting state, zeros where it has none yet."""
        weight = local_part(parameter).reshape(-1)
        at = locate_window(weight.numel(), self._period)
        read = [weight[at].clone()]
        state = self._optimizer.state.get(parameter, {}) if self._lasting else {}
        for key in self._lasting:
            part = local_part(state[key]).reshape(-1) if key in state else torch.zeros_like(weight[:0])
            fits = part.numel() == weight.numel()
            read.append(part[at].to(weight.device, copy=True) if fits else read[0] * 0)
        return read

    def _compare(self, was: list[Tensor], now: list[Tensor]) -> Tensor:
        """Return the share of a window's numbers that differ, a float32 scalar."""
        differs = torch.stack([a != b for a, b in zip(was, now, strict=True)]).any(0)
        return differs.float().mean() if differs.numel() else was[0].new_zeros((), dtype=torch.float32)

    def _warn_of_few(self, share: float) -> None:
        if share < FEW and rounds_to_nearest(self._optimizer) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"in period {self._period} only {100 * share:.2g} % of the drawn blocks' numbers changed: "
                "the updates are too small for the weights' dtype; use lisatune.AdamW, whose updates are "
                "exact, load the model with dtype=torch.float32, or raise the learning rate",
                stacklevel=2,
            )


def rounds_to_nearest(optimizer: Optimizer) -> bool:
    """Tell whether updates that are too small for a weight's dtype are lost: the optimizer keeps no rest.

    Known to keep it: `lisatune.AdamW`, torchao with stochastic rounding, torch-optimi with Kahan's sums.
    """
    groups = optimizer.param_groups
    return (
        all(group.get("rounding", "nearest") == "nearest" for group in groups)
        and not getattr(optimizer, "lasting_state", ())
        and not getattr(optimizer, "bf16_stochastic_round", False)  # torchao's
        and all(group.get("kahan_sum", False) is False for group in groups)  # torch-optimi's: None is "auto"
    )
