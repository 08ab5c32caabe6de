"""Apply each update during backward, so that only one layer's gradient exists at a time.

Each parameter is updated as soon as its gradient is complete, and the gradient is released.
`optimizer.step()` then updates nothing: it counts the step, and runs the hooks of LISA and of learning-rate
schedules as usual. Step pre-hooks run twice: before the first update, and in `step()`. LISA's allow that.

Three things need all gradients at once and cannot be combined with this: clipping by the global norm,
several micro-steps per step, and a loss scaler, which unscales before `step()`. Check before backward that
the loss is finite: if a gradient is not finite although the loss is, it has reached the weights by the time
it is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed.shards import Part, local_part, part_of
from lisatune.optim.chunks import strip_zero_rows
from lisatune.optim.gradient_hooks import after_gradient

__all__ = ["UpdateInBackward"]


class UpdateInBackward:
    """Hooks on every parameter of an optimizer: each updates its parameter once the gradient is complete.

    Args:
        optimizer: every parameter that will ever train must require grad now; later it may be frozen and
            thawed.
        update: called with a parameter's place in the optimizer and the parameter; updates it from its
            gradient.

    Raises:
        ValueError: a parameter does not require grad.
    """

    def __init__(self, optimizer: Optimizer, update: Callable[[int, nn.Parameter], None]) -> None:
        self._optimizer, self._update = optimizer, update
        self._places = self._find_places()
        frozen = sum(not p.requires_grad for p in self._places)
        if frozen:
            raise ValueError(
                f"update in backward needs hooks on all parameters, and {frozen} do not require grad; "
                "call it before anything is frozen"
            )
        self._updated: set[nn.Parameter] = set()
        self._squares: dict[Any, tuple[Part, list[Tensor]]] = {}
        self._has_ended, self._is_paused = True, False
        self._hooks = [after_gradient(p, self._take) for p in self._places]

    @property
    def updated(self) -> frozenset[nn.Parameter]:
        """Parameters updated in this step, or after `optimizer.step()` in the step that it ended."""
        return frozenset(self._updated)

    def grad_norm(self) -> Tensor:
        """Return the global norm of this step's gradients, a float32 scalar; 0 before backward.

        On several ranks every rank must call it.
        """
        if self._has_ended:
            return torch.zeros(())
        sums = [part.sum(torch.stack(squares).sum()) for part, squares in self._squares.values()]
        return torch.stack(sums).sum().sqrt()

    def end_step(self) -> None:
        """Let the next gradient begin a new step: `optimizer.step()` calls this."""
        self._has_ended = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, gradients are released and update nothing."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if self._is_paused:
            parameter.grad = None
            return
        if self._has_ended:
            self._has_ended = False
            self._updated.clear()
            self._squares.clear()
            self._begin()
        if parameter in self._updated:
            raise RuntimeError(
                "a parameter got a second gradient before optimizer.step(); update in backward cannot "
                "accumulate gradients, so call step() after every backward"
            )
        self._updated.add(parameter)
        part, gradient = part_of(parameter), strip_zero_rows(local_part(parameter.grad))
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        self._squares.setdefault(part.group, (part, []))[1].append(square)
        self._update(self._places[parameter], parameter)
        parameter.grad = None

    def _begin(self) -> None:
        for hook in self._optimizer._optimizer_step_pre_hooks.values():
            hook(self._optimizer, (), {})
        self._places = self._find_places()  # a hook may have divided a group, as LISA's does

    def _find_places(self) -> dict[Any, int]:
        held = (p for group in self._optimizer.param_groups for p in group["params"])
        return {p: place for place, p in enumerate(held)}
