"""Embedding, head and final norm train alone: LISA with γ = 0."""

from dataclasses import dataclass
from typing import Any, Literal

from lisatune.lisa.ends import EndsPolicy
from lisatune.methods.lisa import AsLisa, Lisa

__all__ = ["EndsOnly"]


@dataclass(frozen=True, kw_only=True)
class EndsOnly(AsLisa):
    """Embedding, head and final norm train, all blocks are frozen."""

    name: Literal["ends"] = "ends"
    """Way to fine-tune."""

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
        """LISA that draws no block."""
        return Lisa(active=0, ends=self.ends, verify=self.verify)

    def cheaper_ends(self) -> tuple[dict[str, Any], ...]:
        """Those of LISA that leave something to train."""
        return tuple(change for change in self.as_lisa().cheaper_ends() if change != {"ends": "frozen"})
