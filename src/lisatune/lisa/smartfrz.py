r"""SmartFRZ (Li et al., ICLR 2023, arXiv 2401.16720): a small attention network says which blocks freeze.

A re-implementation: the authors published no code. A run is divided into intervals. At the end of each, S
sampled weights of every block that still trains are recorded (`lisatune.lisa.weight_history`). From the last
R records of a block, w_0 … w_n, oldest first, the predictor answers with the chance that the block has
converged. A block with a chance of at least c freezes for good, wherever it is, and its records are released.

What the predictor reads is free of the scale of the weights, and of their order. With M = max_t ‖w_t - w_0‖,
the step s_t = w_t - w_(t-1), s_0 = 0, and λ(x) = ln(1 + 100 x), record t becomes four numbers:

    f_t = ( ‖w_t - w_0‖ / M,  λ(‖w_n - w_t‖ / M),  λ(‖s_t‖ / M),  cos(s_t, s_n) )

The newest record asks, and all records answer, each with an embedding of its age n - t:

    h_t = gelu(E f_t + a_(n-t)),    p_t = softmax_t(⟨Q h_n, K h_t⟩ / √d),
    chance = sigmoid(u · gelu(U (h_n + Σ_t p_t V h_t)))

Shapes: A active blocks, T = n + 1 records, S samples, d = `WIDTH`.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, pad

from lisatune.lisa.samplers import Sampler
from lisatune.lisa.statistics import BlockStatistics

__all__ = ["FEWEST_RECORDS", "Predictor", "SmartFRZ", "describe_history"]

WIDTH = 16
FEWEST_RECORDS = 3
"""Records that the predictor needs for an answer: the start and two intervals."""


def describe_history(history_ATS: Tensor) -> Tensor:
    """Return f: float64 [A, T, 4]. It is 0 for blocks that have not moved."""
    history_ATS = history_ATS.double()
    way_ATS = history_ATS - history_ATS[:, :1]
    step_ATS = pad(history_ATS.diff(dim=1), (0, 0, 1, 0))
    to_now_ATS = history_ATS[:, -1:] - history_ATS
    most_A1 = way_ATS.norm(dim=-1).amax(dim=1, keepdim=True)
    most_A1 = torch.where(most_A1 > 0, most_A1, 1.0)
    way_AT, to_now_AT, length_AT = (each.norm(dim=-1) / most_A1 for each in (way_ATS, to_now_ATS, step_ATS))
    direction_AT = cosine_similarity(step_ATS, step_ATS[:, -1:], dim=-1)
    logs = [(100 * each).log1p() for each in (to_now_AT, length_AT)]
    return torch.stack([way_AT, *logs, direction_AT], dim=-1)


class Predictor(nn.Module):
    """The network. Its weights come from `experiments/smartfrz_predictor.py`.

    Args:
        records: R, how many records it can read.
    """

    def __init__(self, records: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.age = nn.Parameter(torch.zeros(records, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.hidden, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, features_AT4: Tensor) -> Tensor:
        """Return the logit of "converged" for each block, [A]."""
        f_AT4 = features_AT4.to(self.age.dtype)
        h_ATd = gelu(self.embed(f_AT4) + self.age[: f_AT4.shape[1]].flip(0))
        newest_A1d = h_ATd[:, -1:]
        scores_A1T = self.query(newest_A1d) @ self.key(h_ATd).mT / WIDTH**0.5
        read_A1d = newest_A1d + scores_A1T.softmax(dim=-1) @ self.value(h_ATd)
        logits: Tensor = self.answer(gelu(self.hidden(read_A1d)))[:, 0, 0]
        return logits

    def __repr__(self) -> str:
        """Name the network by its weights, so that a run cannot continue with those of another version."""
        values = b"".join(w.detach().float().numpy().tobytes() for w in self.state_dict().values())
        return f"Predictor({hashlib.blake2b(values, digest_size=6).hexdigest()})"


@dataclass(frozen=True, eq=False)
class SmartFRZ(Sampler):
    """Draws all blocks that have not frozen yet. Each period is an interval.

    Args:
        num_blocks: N.
        predictor: says which blocks have converged.
        confidence: c, 0 < c <= 1; larger ones freeze less.
    """

    num_blocks: int
    predictor: Predictor
    confidence: float = 0.5
    records: int = field(init=False, repr=False)

    reads = ("weight_history", "idle")

    def __post_init__(self) -> None:
        if not 0 < self.confidence <= 1:
            raise ValueError(f"confidence must be above 0 and at most 1, got {self.confidence}")
        object.__setattr__(self, "records", len(self.predictor.age))

    @torch.no_grad()
    def draw(self, period: int, *, seed: int, statistics: BlockStatistics | None = None) -> tuple[int, ...]:
        """Return the blocks that go on training: at least one, that which is furthest from converged."""
        assert statistics is not None
        assert statistics.idle is not None
        assert statistics.weight_history is not None
        active = [block for block in range(self.num_blocks) if statistics.idle[block] == 0]
        history_ARS = statistics.weight_history[active]
        history_ATS = history_ARS[:, ~history_ARS.isnan().any(dim=-1).any(dim=0)]
        if history_ATS.shape[1] < FEWEST_RECORDS:
            return tuple(active)
        chance_A = self.predictor(describe_history(history_ATS)).sigmoid()
        moved_A = (history_ATS != history_ATS[:, :1]).any(dim=-1).any(dim=-1)
        stays_A = (chance_A < self.confidence) | ~moved_A
        stays_A[chance_A.argmin()] = True
        return tuple(block for block, stays in zip(active, stays_A.tolist(), strict=True) if stays)

    def inclusion(self) -> tuple[float, ...]:
        """Return 1 for every block: which ones freeze is not known before."""
        return (1.0,) * self.num_blocks
