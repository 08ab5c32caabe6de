"""SmartFRZ (Li et al., arXiv 2401.16720) as a method; the algorithm is in `lisatune.lisa.smartfrz`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.lisa.lisa import LISA
from lisatune.lisa.smartfrz import Predictor
from lisatune.lisa.smartfrz import SmartFRZ as SmartFRZSampler
from lisatune.methods.lisa import AsLisa, Lisa
from lisatune.nn.layers import LayerMap

__all__ = ["WEIGHTS", "SmartFRZ", "load_predictor"]

WEIGHTS = Path(__file__).with_name("smartfrz.safetensors")
"""Weights of the predictor; `experiments/smartfrz_predictor.py` writes them."""


@final
@dataclass(frozen=True, kw_only=True)
class SmartFRZ(AsLisa):
    """All blocks train at first and freeze, each once a small network finds that it has converged."""

    name = "smartfrz"

    confidence: float = 0.5
    """A block freezes if the network gives this chance, or more, that it has converged."""

    intervals: int = 20
    """Into how many intervals a run is divided; blocks may freeze at the end of each, from the second on."""

    ends: str = "head"
    """Which ends train, in the words of LISA's key. With `train` backward always goes to the embedding."""

    def __post_init__(self) -> None:
        if self.intervals < 1:
            raise ValueError(f"method.intervals must be >= 1, got {self.intervals}")
        if not 0 < self.confidence <= 1:
            raise ValueError(f"method.confidence must be above 0 and at most 1, got {self.confidence}")
        self.as_lisa()

    def as_lisa(self) -> Lisa:
        """Return a LISA with these ends."""
        return Lisa(ends=self.ends, lr_scaling="none", verify=self.verify)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach a LISA that draws the blocks that are not frozen yet, with a period of an interval."""
        return LISA(
            model,
            optimizer,
            period=-(-total_steps // self.intervals),
            sampler=SmartFRZSampler(layers.num_blocks, load_predictor(), self.confidence),
            ends=self.ends,
            lr_scaling="none",
            verify=self.verify,
            total_steps=total_steps,
            layers=layers,
        )


@cache
def load_predictor() -> Predictor:
    """Load the predictor that comes with the package."""
    from safetensors.torch import load_file

    with unset_fake_temporarily():  # also in a memory plan
        weights = load_file(WEIGHTS)
        predictor = Predictor(len(weights["age"])).requires_grad_(False)
        predictor.load_state_dict(weights)
        return predictor.double()
