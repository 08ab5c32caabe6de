"""FreezeOut (Brock et al., arXiv 1706.04983) as a method: blocks freeze for good, the lowest first."""

import math
import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.freezing import FreezeOut as FreezeOutSampler
from lisatune.lisa.lisa import LISA
from lisatune.methods.as_lisa import AsLisa
from lisatune.methods.lisa import Lisa
from lisatune.nn.layers import LayerMap

__all__ = ["FreezeOut"]


@final
@dataclass(frozen=True, kw_only=True)
class FreezeOut(AsLisa):
    """All blocks train at first and freeze one after another from below, each along a cosine of its own."""

    name = "freezeout"

    start: float = 0.8
    """t_0: the lowest layer freezes after this share of the run, to the third power if `cubic`."""

    cubic: bool = True
    """Whether shares are raised to the third power: 0.8 is then 51 % of the run."""

    scaled: bool = True
    """Whether blocks that freeze early begin at a higher rate, so that all blocks go as far."""

    period: int = 10
    """Steps between two looks at which block must freeze."""

    ends: str = "head"
    """Which ends train, in the words of LISA's key. With `train` backward always goes to the embedding."""

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"method.period must be >= 1, got {self.period}")
        try:
            FreezeOutSampler(1, 1, self.period, self.start)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        self.as_lisa()
        policy = EndsPolicy.parse(self.ends)
        if policy.trains == "none" or policy.every > 1:
            raise ValueError(
                f"method.ends {self.ends!r} of method freezeout would leave steps in which nothing trains, "
                "because the highest block freezes before the run ends; use head or train"
            )

    def as_lisa(self) -> Lisa:
        """Return the LISA with these ends; `attach` gives it the sampler."""
        return Lisa(period=self.period, ends=self.ends, lr_scaling="none", verify=self.verify)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach a LISA that draws the blocks that are not frozen yet. Warns if none will freeze."""
        sampler = FreezeOutSampler(
            layers.num_blocks, total_steps, self.period, self.start, self.cubic, self.scaled
        )
        if min(sampler.inclusion()) == 1:
            first = math.ceil(sampler.until(0) * total_steps)
            warnings.warn(
                f"method freezeout will freeze no block: the first one may freeze after step {first} of "
                f"{total_steps}, and method.period={self.period} brings no draw from then on; lower "
                "method.period or method.start, or train longer",
                stacklevel=2,
            )
        return self.as_lisa().attach_with(sampler, model, optimizer, layers, total_steps)
