"""The training step of SophiaG: now and then, a backward pass on labels that the model has drawn itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lisatune.distributed.shards import has_values
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods.step import TrainingStep
from lisatune.nn.hidden import hidden_states, logits
from lisatune.optim.sophia import SophiaG

__all__ = ["SophiaStep"]

TOKENS_AT_ONCE = 128
"""Positions whose logits exist at once."""


@dataclass(frozen=True, kw_only=True)
class SophiaStep(TrainingStep):
    """A step that estimates curvature first where SophiaG asks for it (arXiv 2305.14342, algorithm 2).

    Labels are drawn from the model's own distribution at every position that carries loss. The random numbers
    depend on the number of steps alone, so resume is exact and the global generator is not used.
    """

    def backward(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Estimate curvature if SophiaG wants it, then compute the gradients; see `TrainingStep.backward`."""
        assert isinstance(self.optimizer, SophiaG)
        if self.optimizer.wants_estimate:
            drawn = [self._draw_labels(batch, index) for index, batch in enumerate(batches)]
            if torch.isfinite(super().backward(drawn)):  # else every later step would be NaN
                self.optimizer.update_hessian(sum(int((b["labels"][:, 1:] != -100).sum()) for b in drawn))
            self.optimizer.zero_grad(set_to_none=True)
        return super().backward(batches)

    @torch.no_grad()
    def _draw_labels(self, batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Return the batch with drawn labels where it has labels, int64 [B, T]."""
        batch = {name: ids.to(self.device) for name, ids in batch.items()}
        assert isinstance(self.optimizer, SophiaG)
        generator = torch.Generator(self.device)
        generator.manual_seed(self.optimizer.steps_done * 1_000_003 + index)
        ids, positions = batch["input_ids"], batch["position_ids"]
        assert isinstance(self.loss, CausalLMLoss)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.loss.is_chunked:
                parts = torch.split(hidden_states(self.model, ids, positions).flatten(0, 1), TOKENS_AT_ONCE)
                transform = self.loss.transform or (lambda each: each)
                head = self.loss.model.get_output_embeddings()
                drawn = [draw(transform(head(part)), generator) for part in parts]
            else:
                parts = torch.split(logits(self.model, ids, positions).flatten(0, 1), TOKENS_AT_ONCE)
                drawn = [draw(part, generator) for part in parts]
        # What is drawn at a position is the label of the next one.
        next_BT = torch.cat(drawn).view(ids.shape).roll(1, dims=1)
        labels = batch["labels"]
        if not has_values(next_BT):  # in a memory plan
            return batch
        return batch | {"labels": torch.where(labels == -100, labels, next_BT)}


def draw(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token for each row from softmax of its logits, int64 [N]: the largest logit + Gumbel noise."""
    uniform = torch.rand(logits_NV.shape, generator=generator, device=logits_NV.device)
    return (logits_NV.float() - (-uniform.clamp_min(1e-30).log()).log()).argmax(1)
