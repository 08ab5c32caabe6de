"""Full fine-tuning: the optimizer updates every parameter outside vision towers."""

from dataclasses import dataclass
from typing import final

from lisatune.methods.base import Method

__all__ = ["Full"]


@final
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Every parameter trains: the yardstick for quality, and for memory."""

    name = "full"
    shards = True
