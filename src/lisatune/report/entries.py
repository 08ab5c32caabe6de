"""What charts are drawn of: an arm of a comparison, or a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.compare_results import Point

__all__ = ["BlockHistory", "Entry", "block_history", "read_metrics"]


@dataclass(frozen=True, kw_only=True)
class BlockHistory:
    """Which blocks trained when."""

    active: dict[int, tuple[int, ...]]
    """Active blocks of each period that was logged."""

    visits: tuple[int, ...]
    """In how many periods each block trained."""


@dataclass(kw_only=True)
class Entry:
    """A line in every chart. What is not known is None or empty, and left out of the chart."""

    name: str
    curves: list[list[Point]] = field(default_factory=list)
    """Held-out losses on the way, of each run with the chosen learning rate."""

    loss: float | None = None
    """Held-out loss after training, the lower the better."""

    peak_bytes: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes at a step's peak by category."""

    blocks: BlockHistory | None = None
    movement: list[float] | None = None
    """`lisatune.movement.block_movement`."""

    samples: Sequence[Mapping[str, str]] = ()


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines of a run's metrics.jsonl that can be read, and the number of those that can't.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    lines, damaged = [], 0
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def block_history(metrics: Sequence[Mapping[str, Any]], visits: Sequence[int] | None) -> BlockHistory | None:
    """Periods and visits of a run; None for a method that draws no blocks."""
    active = {
        line["period"]: tuple(line["active_blocks"])
        for line in metrics
        if line.get("period") is not None and line.get("active_blocks") is not None
    }
    if visits is None:
        num_blocks = 1 + max((block for blocks in active.values() for block in blocks), default=-1)
        visits = [sum(block in blocks for blocks in active.values()) for block in range(num_blocks)]
    return BlockHistory(active=active, visits=tuple(visits)) if active or visits else None
