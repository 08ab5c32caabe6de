"""BAdam (Luo et al., arXiv 2404.02827): LISA with one block at a time, in order, and frozen ends."""

from dataclasses import dataclass
from typing import Literal, final

from lisatune.methods.as_lisa import AsLisa
from lisatune.methods.base import Alternatives
from lisatune.methods.lisa import Lisa

__all__ = ["BAdam"]


@final
@dataclass(frozen=True, kw_only=True)
class BAdam(AsLisa):
    """One block trains at a time, in turn; optimizer state is cleared at each switch."""

    name = "badam"

    switch_every: int | Literal["auto"] = 50
    """Optimizer steps between two switches, K in the paper. auto: every block trains at least twice."""

    switch_mode: Literal["descending", "ascending", "random"] = "descending"
    """Order of the blocks: from the last to the first, the reverse, or shuffled anew in each pass."""

    seed: int = 0
    """Seed of the order `random`."""

    ends: str = "frozen"
    """Which ends train besides the block, in the words of LISA's key `ends`."""

    def __post_init__(self) -> None:
        if self.switch_every != "auto" and self.switch_every < 1:
            raise ValueError(f"method.switch_every must be >= 1 or auto, got {self.switch_every}")
        self.as_lisa()

    def as_lisa(self) -> Lisa:
        """Return the LISA of one block that clears all state at each draw."""
        return Lisa(
            active=1,
            period=self.switch_every,
            sampler="permutation" if self.switch_mode == "random" else self.switch_mode,
            seed=self.seed,
            state="reset",
            lr_scaling="none",
            ends=self.ends,
            verify=self.verify,
        )

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Return LISA's cheaper ends; the number of blocks is fixed."""
        return Alternatives(cheaper_ends=self.as_lisa().alternatives(num_blocks).cheaper_ends)
