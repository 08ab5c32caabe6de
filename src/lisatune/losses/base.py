"""What every loss has.

A loss sums over a batch, and says how many tokens or pairs the sum is over. A step divides by their number in
all of its batches, so that how they are spread over micro-steps and ranks makes no difference.

Shapes: B = rows, T = tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lisatune.distributed.shards import is_sharded, reshard
from lisatune.nn.hidden import unwrap_adapters

__all__ = ["Loss", "Sums", "as_forward"]

Sums = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Loss sum (float32 scalar), number of tokens or pairs (int64 scalar), sums of further figures by name."""


class Loss:
    """What training minimises.

    Args:
        model: a transformers model on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the losses of a batch.

        Args:
            batch: `input_ids`, `labels` and `position_ids`, each int64 [B, T].

        Returns:
            Loss sum (float32 scalar) and number of tokens or pairs (int64 scalar).
        """
        return self.evaluate(batch)[:2]

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Count what a step's loss is the mean over."""
        raise NotImplementedError

    def evaluate(self, batch: Mapping[str, Tensor]) -> Sums:
        """Return loss sum and count, and sums of further held-out figures by name."""
        raise NotImplementedError

    def follow(self, model: nn.Module) -> None:
        """From now on compute the loss of `model`, a wrapper that a method has put around the old model."""
        self.model = model


def as_forward(model: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function be a forward pass of a model that FSDP2 has divided: meanwhile the ends are whole.

    Every rank must call the result.

    Args:
        model: a transformers model, or PEFT's around it.
        compute: calls the decoder, and then an end, such as the head. It is returned as it is if the model is
            whole.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return compute
    from torch.distributed.fsdp import register_fsdp_forward_method

    reshard(model)
    divided: Any = unwrap_adapters(model)
    name = f"lisatune{compute.__name__}"
    setattr(divided, name, compute)
    register_fsdp_forward_method(divided, name)
    forward: Callable[..., Any] = getattr(divided, name)
    return forward
