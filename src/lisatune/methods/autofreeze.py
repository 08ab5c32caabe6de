"""AutoFreeze (Liu et al., arXiv 2102.01386) as a method; the algorithm is in `lisatune.lisa.freezing`."""

from dataclasses import dataclass
from typing import final

from lisatune.lisa.freezing import AutoFreeze as AutoFreezeSampler
from lisatune.methods.as_lisa import FreezesByInterval
from lisatune.recipe import OptimizerConfig

__all__ = ["AutoFreeze"]


@final
@dataclass(frozen=True, kw_only=True)
class AutoFreeze(FreezesByInterval):
    """All blocks train at first and freeze from below, once their gradients change little."""

    name = "autofreeze"
    shards = False

    percentile: float = 50.0
    """n: the longest prefix freezes whose gradients changed less than the n-th percentile, 0 <= n <= 100."""

    def make_sampler(self, num_blocks: int) -> AutoFreezeSampler:
        """Return the sampler of gradient changes."""
        return AutoFreezeSampler(num_blocks, self.percentile)

    def check_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Refuse updates in backward, after which no gradient can be added up."""
        if optimizer.in_backward:
            raise ValueError(
                "optimizer.in_backward frees each gradient before method autofreeze could add it up; set it "
                "to false"
            )
