"""Embedding, head and final norm train alone: LISA with γ = 0."""

from dataclasses import dataclass
from typing import final

from lisatune.lisa.ends import EndsPolicy
from lisatune.methods.as_lisa import AsLisa
from lisatune.methods.base import Alternatives
from lisatune.methods.lisa import Lisa

__all__ = ["EndsOnly"]


@final
@dataclass(frozen=True, kw_only=True)
class EndsOnly(AsLisa):
    """Embedding, head and final norm train, all blocks are frozen."""

    name = "ends"

    ends: str = "train"
    """Which ends train, with what state: train head 8bit factored cpu rows, by +."""

    def __post_init__(self) -> None:
        self.as_lisa()
        policy = EndsPolicy.parse(self.ends)
        if policy.trains == "none" or policy.every > 1:
            raise ValueError(
                f"method.ends {self.ends!r} of method ends would leave steps in which nothing trains; use "
                "train or head"
            )

    def as_lisa(self) -> Lisa:
        """Return the LISA that draws no block."""
        return Lisa(active=0, ends=self.ends, verify=self.verify)

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Return those of LISA's cheaper ends that leave something to train."""
        cheaper = self.as_lisa().alternatives(num_blocks).cheaper_ends
        return Alternatives(cheaper_ends=tuple(change for change in cheaper if change != {"ends": "frozen"}))
