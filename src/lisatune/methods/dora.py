"""DoRA (Liu et al., arXiv 2402.09353) with PEFT: LoRA turns a weight, a vector sets its norm."""

from dataclasses import dataclass
from typing import final

from lisatune.methods.lora import LowRank

__all__ = ["Dora"]


@final
@dataclass(frozen=True, kw_only=True)
class Dora(LowRank):
    """Low-rank adapters and a magnitude for each output of a linear layer train, all weights are frozen."""

    name = "dora"
    has_magnitudes = True
