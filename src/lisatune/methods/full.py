"""Full fine-tuning: AdamW on every parameter outside vision towers."""

from dataclasses import dataclass
from typing import Literal

from lisatune.methods.base import Method

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """AdamW on every parameter: the yardstick for quality, and for memory."""

    shards = True

    name: Literal["full"] = "full"
    """Way to fine-tune."""
