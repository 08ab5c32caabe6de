"""Direct Preference Optimization: the loss of pairs of answers, of which people prefer one.

For a prompt x with the answers y_w (chosen) and y_l (rejected), the margin m says by how much more the model
prefers the chosen answer than it did before training. The loss is that of the Bradley-Terry model, in which
the chosen answer wins with chance σ(m) (Rafailov et al., arXiv 2305.18290, eq. 7):

    m    = β [ log π(y_w|x) - log π_ref(y_w|x)  -  log π(y_l|x) + log π_ref(y_l|x) ]
    loss = -log σ(m)                                     summed over the pairs

log π(y|x) is the sum over the answer's tokens. π_ref is the model before training. Its log-probabilities
never change, so they are computed once (`lisatune.train.reference`) and no second model is held.

Shapes: P = pairs, B = 2 P rows in the order chosen, rejected, chosen, …, T = tokens.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lisatune.losses.base import Sums
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.losses.pairs import PairLoss, bradley_terry, find_pairs

__all__ = ["DPOLoss"]


class DPOLoss(PairLoss):
    """The loss of Direct Preference Optimization.

    Args:
        model: as for `CausalLMLoss`.
        beta: β > 0: how strongly the model is held to the reference.

    Attributes:
        reference: log π_ref of every row that a batch may hold, float32 on the model's device; a batch finds
            its own by its rows' `number`. None only while no batch has numbers: such made-up rows, as in a
            memory plan, have a reference of 0.
    """

    def __init__(self, model: nn.Module, *, beta: float) -> None:
        super().__init__(model)
        self.beta = beta
        self._next_tokens = CausalLMLoss(model)
        self.reference: Tensor | None = None

    def evaluate(self, batch: Mapping[str, Tensor]) -> Sums:
        """Return loss sum, number of pairs, and the sums of `accuracy` (1 if the margin is > 0) and `margin`.

        Args:
            batch: `input_ids`, `labels` (-100 on the prompt) and `position_ids`, int64 [2 P, T], and
                `number`, int64 [2 P].
        """
        return bradley_terry(self.margins(batch), find_pairs(batch))

    def margins(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return m of each pair, float32 [P]."""
        gains_B = self.log_probs(batch)
        if "number" in batch:
            assert self.reference is not None
            gains_B = gains_B - self.reference[batch["number"]]
        chosen_P, rejected_P = gains_B.view(-1, 2).unbind(dim=1)
        return self.beta * (chosen_P - rejected_P)

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return log π of each row's answer, float32 [B]: the sum over the tokens that have a label."""
        return -self._next_tokens.sum_losses(batch, by_row=True)[0]

    def follow(self, model: nn.Module) -> None:
        """From now on compute the loss of `model`; see `CausalLMLoss.follow`."""
        super().follow(model)
        self._next_tokens.follow(model)
