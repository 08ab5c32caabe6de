"""What the losses of pairs of answers share: each pair is two rows, first the answer that people prefer.

Shapes: P = pairs, B = 2 P rows in the order chosen, rejected, chosen, …, T = tokens.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from lisatune.losses.base import Loss, Sums
from lisatune.losses.causal_lm import IGNORE

__all__ = ["PairLoss", "bradley_terry", "find_pairs"]


class PairLoss(Loss):
    """The loss of pairs of answers. Its figures are `accuracy` and `margin`."""

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Count the pairs that have labels."""
        return int(find_pairs(batch).sum())


def bradley_terry(margins_P: Tensor, is_pair_P: Tensor) -> Sums:
    """Sum -log σ(m) over the margins m: the chosen answer wins with chance σ(m).

    Args:
        margins_P: m of each pair, float32.
        is_pair_P: from `find_pairs`; others do not count.

    Returns:
        Loss sum (float32 scalar) and number of pairs, and the sums of `accuracy` (1 if the margin is > 0, so
        0 for answers that are rated alike) and `margin`.
    """
    margins_P = margins_P * is_pair_P
    more = {"accuracy": (margins_P > 0).sum(), "margin": margins_P.detach().sum()}
    return -(logsigmoid(margins_P) * is_pair_P).sum(), is_pair_P.sum(), more


def find_pairs(batch: Mapping[str, Tensor]) -> Tensor:
    """Say which pairs of a batch have labels, bool [P].

    A rank whose share of a batch is empty computes a pair without labels all the same.
    """
    return (batch["labels"] != IGNORE).view(len(batch["labels"]) // 2, -1).any(dim=1)
