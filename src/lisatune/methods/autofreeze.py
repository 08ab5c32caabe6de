"""AutoFreeze (Liu et al., arXiv 2102.01386) as a method; the algorithm is in `lisatune.lisa.freezing`."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.freezing import AutoFreeze as AutoFreezeSampler
from lisatune.lisa.lisa import LISA
from lisatune.methods.lisa import AsLisa, Lisa
from lisatune.nn.layers import LayerMap
from lisatune.recipe import OptimizerConfig

__all__ = ["AutoFreeze"]


@final
@dataclass(frozen=True, kw_only=True)
class AutoFreeze(AsLisa):
    """All blocks train at first and freeze from below, once their gradients change little."""

    name = "autofreeze"
    shards = False

    percentile: float = 50.0
    """n: the longest prefix freezes whose gradients changed less than the n-th percentile, 0 <= n <= 100."""

    intervals: int = 20
    """Into how many intervals a run is divided; blocks may freeze at the end of each, from the second on."""

    ends: str = "head"
    """Which ends train, in the words of LISA's key. With `train` backward always goes to the embedding."""

    def __post_init__(self) -> None:
        if self.intervals < 1:
            raise ValueError(f"method.intervals must be >= 1, got {self.intervals}")
        try:
            AutoFreezeSampler(1, self.percentile)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        self.as_lisa()
        EndsPolicy.parse(self.ends)

    def as_lisa(self) -> Lisa:
        """Return a LISA with these ends."""
        return Lisa(ends=self.ends, lr_scaling="none", verify=self.verify)

    def check_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Refuse updates in backward, after which no gradient can be added up."""
        if optimizer.in_backward:
            raise ValueError(
                "optimizer.in_backward frees each gradient before method autofreeze could add it up; set it "
                "to false"
            )

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach a LISA that draws the blocks that are not frozen yet, with a period of an interval."""
        return LISA(
            model,
            optimizer,
            period=-(-total_steps // self.intervals),
            sampler=AutoFreezeSampler(layers.num_blocks, self.percentile),
            ends=self.ends,
            lr_scaling="none",
            verify=self.verify,
            total_steps=total_steps,
            layers=layers,
        )
