"""Greedy layer-wise training of a pretrained decoder, after deep belief networks (Hinton et al. 2006)."""

from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import nn

from lisatune.lisa.lisa import LISA
from lisatune.methods.as_lisa import AsLisa
from lisatune.methods.lisa import Lisa
from lisatune.nn.layers import LayerMap

__all__ = ["Greedy"]


@final
@dataclass(frozen=True, kw_only=True)
class Greedy(AsLisa):
    """One pass over the blocks: each trains once, for an equal part of the run, with head and final norm."""

    name = "greedy"

    order: Literal["ascending", "descending"] = "ascending"
    """From the first block to the last, or the reverse."""

    ends: str = "head"
    """Which ends train beside the block, in the words of LISA's key `ends`."""

    def __post_init__(self) -> None:
        self.as_lisa()

    def as_lisa(self) -> Lisa:
        """Return the LISA of one block in order; `attach` gives it the period."""
        return Lisa(
            active=1,
            sampler=self.order,
            state="reset",
            lr_scaling="none",
            ends=self.ends,
            verify=self.verify,
        )

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach that LISA with a period of T/N steps, rounded up."""
        lisa = replace(self.as_lisa(), period=-(-total_steps // layers.num_blocks))
        return lisa.attach(model, optimizer, layers, total_steps=total_steps)
