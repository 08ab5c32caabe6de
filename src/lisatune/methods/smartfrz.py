"""SmartFRZ (Li et al., arXiv 2401.16720) as a method; the algorithm is in `lisatune.lisa.smartfrz`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.lisa.smartfrz import Predictor
from lisatune.lisa.smartfrz import SmartFRZ as SmartFRZSampler
from lisatune.methods.as_lisa import FreezesByInterval

__all__ = ["WEIGHTS", "SmartFRZ", "load_predictor"]

WEIGHTS = Path(__file__).with_name("smartfrz.safetensors")
"""Weights of the predictor; `experiments/smartfrz_predictor.py` writes them."""


@final
@dataclass(frozen=True, kw_only=True)
class SmartFRZ(FreezesByInterval):
    """All blocks train at first and freeze, each once a small network finds that it has converged."""

    name = "smartfrz"

    confidence: float = 0.5
    """A block freezes if the network gives this chance, or more, that it has converged."""

    def make_sampler(self, num_blocks: int) -> SmartFRZSampler:
        """Return the sampler that asks the network."""
        return SmartFRZSampler(num_blocks, load_predictor(), self.confidence)


@cache
def load_predictor() -> Predictor:
    """Load the predictor that comes with the package."""
    from safetensors.torch import load_file

    with unset_fake_temporarily():  # also in a memory plan
        weights = load_file(WEIGHTS)
        predictor = Predictor(len(weights["age"])).requires_grad_(False)
        predictor.load_state_dict(weights)
        return predictor.double()
