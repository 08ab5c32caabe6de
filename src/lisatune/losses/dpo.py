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
from torch.nn.functional import logsigmoid

from lisatune.losses.causal_lm import IGNORE, CausalLMLoss

__all__ = ["DPOLoss"]


class DPOLoss(CausalLMLoss):
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
        self.reference: Tensor | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the losses of a batch.

        Args:
            batch: `input_ids`, `labels` (-100 on the prompt) and `position_ids`, int64 [2 P, T], and
                `number`, int64 [2 P].

        Returns:
            Loss sum (float32 scalar) and number of pairs (int64 scalar).
        """
        return self.evaluate(batch)[:2]

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Count what a step's loss is the mean over: the pairs that have labels."""
        return int(_find_pairs(batch).sum())

    def evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return loss sum and count, and the sums of `accuracy` (1 if the margin is > 0) and `margin`."""
        margins_P = self.margins(batch)
        is_pair_P = _find_pairs(batch)
        margins_P = (
            margins_P * is_pair_P
        )  # a rank whose share of a batch is empty computes a pair all the same
        more = {"accuracy": (margins_P > 0).sum(), "margin": margins_P.detach().sum()}
        return -(logsigmoid(margins_P) * is_pair_P).sum(), is_pair_P.sum(), more

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
        return -self._sum_losses(batch, by_row=True)[0]


def _find_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Say which pairs of a batch have labels, bool [P]."""
    return (batch["labels"] != IGNORE).view(len(batch["labels"]) // 2, -1).any(dim=1)
