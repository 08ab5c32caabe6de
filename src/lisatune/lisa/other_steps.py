"""Steps that another optimizer makes on the weights of LISA.

LISA draws when its optimizer steps. A loop that trains with another one (HF Trainer builds its own if none is
given) never draws again: the blocks of the first period train for the whole run, and nothing fails. torch
tells a global hook of every step of every optimizer, so this is seen in the loop's second step.

A wrapper such as Lookahead steps after the optimizer inside it, so one step beside each of our own is fine.
"""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lisatune.lisa.proof import ProofError

__all__ = ["OtherSteps"]

MOST = 1
"""Steps of others between two of our own that are not spoken of."""


class OtherSteps:
    """Counts the steps of other optimizers on some parameters since our optimizer's last step.

    Args:
        optimizer: ours.
        parameters: what it trains. Another optimizer's step counts if it has a gradient of one of them.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer, self._parameters = weakref.ref(optimizer), frozenset(parameters)
        self._count, self._other, self._has_warned = 0, "", False
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_tell))
        _watching.add(self)

    def detach(self) -> None:
        """Look no more."""
        _watching.discard(self)

    def check(self, steps_done: int) -> None:
        """Raise ProofError if our optimizer has made none of the run's steps, or none of the last ones."""
        if self._count > MOST:
            raise ProofError(self._describe())
        if steps_done == 0:
            raise ProofError(
                "the optimizer that LISA is attached to has made no step; attach LISA to the optimizer, and "
                "over the model, that the loop trains with (with Trainer: trainer.create_optimizer())"
            )

    def _saw(self, other: Optimizer) -> None:
        if other is self._optimizer():
            self._count = 0
        elif any(
            p.grad is not None and p in self._parameters for g in other.param_groups for p in g["params"]
        ):
            self._count, self._other = self._count + 1, type(other).__name__
            if self._count > MOST and not self._has_warned:
                self._has_warned = True
                warnings.warn(self._describe(), stacklevel=3)

    def _describe(self) -> str:
        return (
            f"another optimizer ({self._other}) makes the steps: {self._count} since the last one of the "
            "optimizer that LISA is attached to, so LISA draws no blocks; attach LISA to the one that the "
            "loop trains with (with Trainer: trainer.create_optimizer()), or call detach()"
        )


_watching: "weakref.WeakSet[OtherSteps]" = weakref.WeakSet()
"""Who is told of steps. Weak, because the hook belongs to torch and must not keep models alive."""

_hooks: list[RemovableHandle] = []
"""One hook for all, which stays: torch's dict of hooks must not change while a step goes through it, and a
garbage collection may come just then."""


def _tell(optimizer: Optimizer, *_: Any) -> None:
    for each in list(_watching):
        each._saw(optimizer)
