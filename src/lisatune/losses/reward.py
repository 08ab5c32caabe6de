"""The loss of a reward model: a score for every answer, and pairs of answers of which people prefer one.

The model gives a prompt with its answer a reward r: a linear layer, the score, of the hidden state at the
last token. In the Bradley-Terry model the chosen answer y_w wins against the rejected one y_l with chance
σ(m) (Ouyang et al., arXiv 2203.02155, eq. 1, with one pair for each prompt):

    m    = r(x, y_w) - r(x, y_l)
    loss = -log σ(m) + c (r(x, y_w) + r(x, y_l))²         summed over the pairs

The loss does not change if all rewards grow by the same number. The second term draws their mean to 0
(Eisenstein et al., arXiv 2312.09244).

Only the last hidden state of a row reaches the score, so there are 2 P scores and never B × T.

Shapes: P = pairs, B = 2 P rows in the order chosen, rejected, chosen, …, T = tokens, H = hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed.shards import has_values, local_part, reshard
from lisatune.losses.base import Sums, as_forward
from lisatune.losses.causal_lm import TOLERANCE, evaluation_mode
from lisatune.losses.pairs import PairLoss, bradley_terry, find_pairs
from lisatune.nn.hidden import hidden_states, unwrap_adapters
from lisatune.nn.layers import find_score

__all__ = ["RewardLoss"]


class RewardLoss(PairLoss):
    """The loss of a reward model.

    The rewards must equal the model's own; that is proven here on a few tokens. Of a model that FSDP2 has
    divided, a call is the forward pass: every rank must make this object, and call it.

    Args:
        model: a transformers model for sequence classification with one label, on its device. It is called
            twice; without weights it is not called.
        center: c >= 0: how strongly the mean reward is drawn to 0.

    Raises:
        ValueError: the model has no score, or reads it in another way.

    Example:
        >>> loss = RewardLoss(reward_model)
        >>> loss_sum, num_pairs = loss(batch)
        >>> (loss_sum / num_pairs).backward()
    """

    def __init__(self, model: nn.Module, *, center: float = 0.0) -> None:
        super().__init__(model)
        self.center = center
        found = find_score(unwrap_adapters(model))
        if found is None:
            raise ValueError(f"{type(model).__name__} has no score; open it as a reward model")
        self._score = found
        self._forward = as_forward(model, self._compute_rewards)
        if all(has_values(local_part(p)) for p in model.parameters()):
            self._compare()

    def evaluate(self, batch: Mapping[str, Tensor]) -> Sums:
        """Return loss sum, number of pairs, and the sums of `accuracy` (1 if the margin is > 0) and `margin`.

        Args:
            batch: as for `rewards`, and `labels`, int64 [B, T]; a pair without any does not count.
        """
        chosen_P, rejected_P = self.rewards(batch).view(-1, 2).unbind(dim=1)
        is_pair_P = find_pairs(batch)
        loss, num_pairs, more = bradley_terry(chosen_P - rejected_P, is_pair_P)
        if self.center:
            loss = loss + self.center * ((chosen_P + rejected_P).square() * is_pair_P).sum()
        return loss, num_pairs, more

    def rewards(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the reward of each row, float32 [B].

        Args:
            batch: `input_ids` and `position_ids`, int64 [B, T], and `last`, int64 [B]: where each row ends.
                Default: at its last position, as in a memory plan.
        """
        rewards_B1: Tensor = self._forward(batch)
        return rewards_B1[:, 0].float()  # a view, which FSDP2 warns of inside

    def _compute_rewards(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids_BT = batch["input_ids"]
        hidden_BTH = hidden_states(self.model, ids_BT, batch["position_ids"])
        last_B = batch.get("last", torch.full((len(ids_BT),), ids_BT.shape[1] - 1, device=ids_BT.device))
        hidden_BH = hidden_BTH[torch.arange(len(ids_BT), device=ids_BT.device), last_B]
        rewards_B1: Tensor = unwrap_adapters(self.model).get_submodule(self._score)(hidden_BH)
        return rewards_B1

    @torch.no_grad()
    def _compare(self) -> None:
        """Compare the rewards of eight tokens with the model's own. A padding token would be passed over."""
        model: Any = unwrap_adapters(self.model)
        embedding = model.get_input_embeddings().weight
        ids_T = torch.arange(9, device=embedding.device) % len(embedding)
        padding = model.config.get_text_config().pad_token_id
        ids_BT = ids_T[ids_T != (-1 if padding is None else padding)][None, :8]
        position_ids_BT = torch.arange(ids_BT.shape[1], device=embedding.device)[None]
        with evaluation_mode(model):
            own = model(input_ids=ids_BT, use_cache=False).logits
            ours = self.rewards({"input_ids": ids_BT, "position_ids": position_ids_BT})
        reshard(model)
        tolerance = TOLERANCE[own.dtype]
        if own.shape != (1, 1) or not torch.allclose(own[0].float(), ours, rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"loss.name=reward cannot work with {type(model).__name__}: its score is not a linear layer "
                "of the last token's hidden state; use a causal language model, or one made from it"
            )
