"""Private parts of torch that a count of memory needs, besides the classes that it imports by name.

Checked on torch 2.13. `tests/unit/test_private_torch.py` names those that a release has lost.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["ASKS_DEVICE", "IN_PLACE", "ResizeHook", "identify", "run_first", "runs_backward"]

ASKS_DEVICE = torch.ops.prim.device.default
"""What `tensor.device` calls on a fake tensor. More than half of a traced step's operations are these."""

IN_PLACE = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl.default,
)
"""Operations that autograd does in place in backward, without memory of their own, unless a dispatch mode is
active."""


def runs_backward() -> bool:
    """Return whether autograd's backward pass runs, a checkpointed forward pass inside it included."""
    return torch._C._current_graph_task_id() != -1


def identify(storage: torch.UntypedStorage) -> int:
    """Return a number that no other living storage has."""
    return int(storage._cdata)


def run_first(optimizer: Optimizer, hook: RemovableHandle) -> None:
    """Let a step post-hook run before all others of the optimizer."""
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(hook.id, last=False)


class ResizeHook:
    """Calls back after a storage is resized, which no dispatch mode sees.

    Args:
        after: called with the storage.
    """

    def __init__(self, after: Callable[[torch.UntypedStorage], None]) -> None:
        before = self._before = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = before(storage, size)
            after(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]

    def remove(self) -> None:
        """Call back no more."""
        torch.UntypedStorage.resize_ = self._before  # type: ignore[method-assign]
