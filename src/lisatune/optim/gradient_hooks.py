"""Hooks that run when the gradient of a parameter is complete."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

__all__ = ["after_gradient"]


def after_gradient(parameter: Any, method: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a method with a parameter whenever its gradient is complete, as long as the method's object lives.

    The hook does not hold that object. Python's garbage collector does not look into the hooks of a parameter
    that has had a backward pass, so an object that holds its parameters would keep them for ever.

    Args:
        parameter: requires grad.
        method: a bound method.

    Returns:
        Its `remove` ends that.
    """
    weak = weakref.WeakMethod(method)

    def call(parameter: Tensor) -> None:
        if (alive := weak()) is not None:
            alive(parameter)

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(call)
    return handle
