"""Average gradients over ranks that each hold the whole model.

DistributedDataParallel fixes which gradients it exchanges when it wraps a model, so blocks that thaw later
would drift apart. Here, once a backward pass has ended, every gradient of what trains now is replaced by its
mean over the ranks. The mean of equal numbers is the same number, so it does no harm to do this again: after
each micro-step of an accumulation, or after somebody else has averaged them.

A DistributedDataParallel around the model then has nothing left to do. It is found in its first forward pass,
and exchanges nothing from then on. Its `no_sync()` still saves communication.

Equal weights are compared before the first step and at every draw, bit by bit as sums of their bits.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.lisa.proof import INTEGERS
from lisatune.nn.coded import exact_parameters
from lisatune.optim.adamw import AdamW
from lisatune.optim.gradient_hooks import after_gradient

__all__ = ["GradientExchange"]


class GradientExchange:
    """Averages the gradients of what trains after each backward pass. Every rank must make one.

    Args:
        model: whole on every rank, with equal weights.
        parameters: what will ever train; all of it must require grad now.
        find_trained: returns what trains now, in the same order on every rank.
        optimizer: trains them.

    Raises:
        ValueError: the optimizer needs gradients before they are exchanged, or sparse ones.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        find_trained: Callable[[], Sequence[nn.Parameter]],
        optimizer: Optimizer,
    ) -> None:
        if isinstance(optimizer, AdamW) and optimizer.in_backward is not None:
            raise ValueError(
                "update in backward works on one rank only, because gradients of several ranks arrive after "
                "backward; update in step()"
            )
        if any(group.get("rows") for group in optimizer.param_groups):
            raise ValueError("ends with rows do not work on several ranks yet; leave rows out")
        self._model, self._find_trained = model, find_trained
        self._queued_in = -1
        """Number of the backward pass after which gradients were last exchanged."""
        self._is_due = self._waits = self._has_compared = False
        self._wrapper: Any = None
        self._hooks: list[Any] = [after_gradient(p, self._queue) for p in parameters if p.requires_grad]
        self._hooks.append(model.register_forward_pre_hook(self._find_wrapper))

    def before_step(self) -> None:
        """Make sure that the step is the same on every rank.

        Raises:
            RuntimeError: the ranks began with different weights.
        """
        if not self._has_compared:
            self._has_compared = True
            self.compare("the weights before the first step", exact_parameters(self._model).values())
        if self._is_due:  # the last micro-step was in no_sync()
            self._exchange()

    def compare(self, what: str, parameters: Iterable[Tensor]) -> None:
        """Compare parameters between the ranks.

        Raises:
            RuntimeError: they differ; the message begins with `what`.
        """
        sums = repr([_sum_bits(p.detach()) for p in parameters])
        ranks.check_equal(what, f"the hash {hashlib.blake2b(sums.encode(), digest_size=6).hexdigest()}")

    def detach(self) -> None:
        """Remove the hooks, and let a DistributedDataParallel exchange again what it was made for."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._wrapper is not None:
            vars(self._wrapper).pop("no_sync", None)
            self._wrapper.require_backward_grad_sync = True
            self._wrapper = None

    def _find_wrapper(self, *_: Any) -> None:
        wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is None:
            return
        if wrapper.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) trains the same parameters in every step, and "
                "LISA draws others; leave static_graph out"
            )
        self._wrapper = wrapper
        wrapper.require_backward_grad_sync = False  # each time, because its own no_sync() may have ended
        wrapper.no_sync = self._no_sync

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Replace the `no_sync` of DistributedDataParallel: backward passes inside exchange nothing."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def _queue(self, parameter: Tensor) -> None:
        """Exchange once this backward pass has ended."""
        number = torch._C._current_graph_task_id()
        if number != self._queued_in:  # a pass before this one may have failed
            self._queued_in = number
            Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._is_due = True
        if not self._waits:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self._is_due = False
        ranks.average_gradients(self._find_trained())


def _sum_bits(tensor: Tensor) -> int:
    """Sum a tensor's bits as integers, which does not depend on the order."""
    return int(tensor.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
