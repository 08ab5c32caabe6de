"""One optimizer step, from batches to updated weights: `train` runs it and `plan` traces it.

The loss of a step is the sum over its loss-carrying tokens, or over its pairs of answers, divided by their
number. How they are spread over micro-batches and ranks makes no difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import (
    exchange_late,
    full_tensor,
    like_rows,
    local_part,
    set_local_gradient,
)
from lisatune.lisa.correction import find_correction
from lisatune.losses.base import Loss
from lisatune.optim.chunks import strip_zero_rows
from lisatune.optim.in_backward import UpdateInBackward

__all__ = ["TrainingStep"]


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Forward, backward, clipping and the optimizer's update of one step.

    Call `backward`, then `clip`, then `update`, or `skip` if the loss or the norm is not finite.
    """

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    device: torch.device
    autocast: torch.dtype | None = None
    """Dtype of matrix products; None computes in the weights' dtype."""

    max_grad_norm: float | None = 1.0
    """Largest global norm of the gradients; None does not clip."""

    in_backward: UpdateInBackward | None = None
    """Set if `backward` updates the weights. A loss that is not finite then skips backward."""

    def backward(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Compute the step's gradients, which stay in the parameters.

        Args:
            batches: one per micro-step, on any device: `input_ids`, `labels`, `position_ids`, int64 [B, T].

        Returns:
            Mean loss per token or per pair, a float32 scalar on the device.
        """
        mine = sum(self.loss.count(batch) for batch in batches)
        num_labels = int(ranks.sum_over_ranks(mine)[0])
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            exchange_late(self.model, is_last=number == len(batches))
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss_sum, _ = self.loss({name: ids.to(self.device) for name, ids in batch.items()})
                micro_loss = loss_sum / num_labels
            is_in_backward = self.in_backward is not None  # then all ranks wait for the device
            if is_in_backward and ranks.max_over_ranks(int(not torch.isfinite(micro_loss))):
                loss += micro_loss.detach()
                break
            # FSDP2 takes the mean of the ranks' gradients, and the step needs their sum.
            scaled = micro_loss if ranks.count() == 1 else micro_loss * ranks.count()
            scaled.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.detach()
        return loss.new_tensor(ranks.sum_over_ranks(float(loss))[0]) if ranks.has_others() else loss

    def clip(self) -> Tensor:
        """Clip the gradients' global norm, and return the norm before that: a scalar on the device.

        Nothing is clipped if `backward` has updated the weights.
        """
        if self.in_backward is not None:
            return self.in_backward.grad_norm().to(self.device)
        trainable = [_as_dense(p) for p in self.model.parameters() if p.requires_grad]
        if (correction := find_correction(self.model)) is not None:
            trainable += correction.parameters()
        return full_tensor(nn.utils.clip_grad_norm_(trainable, self.max_grad_norm or math.inf))

    def update(self) -> None:
        """Update the weights, and release the gradients."""
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Release the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def _as_dense(parameter: nn.Parameter) -> Tensor:
    """Return what torch can clip: for a sparse gradient a stand-in, whose gradient shares its memory."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    gradient = local_part(parameter.grad).coalesce()
    set_local_gradient(parameter, gradient)
    values = like_rows(strip_zero_rows(gradient), parameter)
    stand_in = values.detach()
    stand_in.grad = values
    return stand_in
