"""One optimizer step, from batches to updated weights: what `train` runs and what `plan` traces.

The loss of a step is the sum over its loss-carrying tokens divided by their number, whatever micro-batches
they come in, and on whichever rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import full_tensor
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.optim.chunks import strip_zero_rows
from lisatune.optim.in_backward import UpdateInBackward

__all__ = ["TrainingStep"]


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Forward, backward, clipping and the optimizer's update of one step.

    `backward`, `clip` and `update` are called in this order; after `clip` the caller decides by the loss and
    the norm whether `update` or `skip` follows.
    """

    model: nn.Module
    loss: CausalLMLoss
    optimizer: Optimizer
    device: torch.device
    autocast: torch.dtype | None = None
    """Dtype of matrix products; None computes in the weights' dtype."""

    max_grad_norm: float | None = 1.0
    """Largest global norm of the gradients; None leaves them as they are."""

    in_backward: UpdateInBackward | None = None
    """Where `backward` updates the weights: a loss that is not finite then skips backward."""

    def backward(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Leave the step's gradients in the parameters.

        Args:
            batches: one per micro-step, on any device: `input_ids`, `labels`, `position_ids`, int64 [B, T].

        Returns:
            Mean loss per token, a float32 scalar on the device.
        """
        mine = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        num_labels = int(ranks.sum_over_ranks(mine)[0])
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss_sum, _ = self.loss({name: ids.to(self.device) for name, ids in batch.items()})
                micro_loss = loss_sum / num_labels
            if self.in_backward is not None and not torch.isfinite(micro_loss):  # waits for the device
                return micro_loss.detach()
            # FSDP2 takes the mean of the ranks' gradients; the sum is meant.
            scaled = micro_loss if ranks.count() == 1 else micro_loss * ranks.count()
            scaled.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.detach()
        return loss.new_tensor(ranks.sum_over_ranks(float(loss))[0]) if ranks.has_others() else loss

    def clip(self) -> Tensor:
        """Clip the gradients' global norm, and return what it was: a scalar on the device.

        With update in backward nothing is left to clip.
        """
        if self.in_backward is not None:
            return self.in_backward.grad_norm().to(self.device)
        trainable = [_as_dense(p) for p in self.model.parameters() if p.requires_grad]
        return full_tensor(nn.utils.clip_grad_norm_(trainable, self.max_grad_norm or math.inf))

    def update(self) -> None:
        """Let the optimizer move the weights, and release the gradients."""
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Release the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def _as_dense(parameter: nn.Parameter) -> Tensor:
    """What torch's clipping takes: for rows of an embedding a stand-in whose gradient is in their memory."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()
    values = strip_zero_rows(parameter.grad)
    stand_in = values.detach()
    stand_in.grad = values
    return stand_in
