"""The figures of a report: what each shows, in a chart, in words and in a table.

An `Entry` is an arm of a comparison, or a run. `make_figures` turns entries into every figure that they have
values for; `lisatune.report.charts` draws them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.compare.results import Point
from lisatune.console import byte_text, plural, ranges_text
from lisatune.memory.fit import CARD_GB
from lisatune.report import charts

__all__ = [
    "BlockHistory",
    "Entry",
    "Figure",
    "Table",
    "extract_block_history",
    "find_pareto_front",
    "make_figures",
    "mark_best",
    "read_metrics",
]

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of common cards, in GB."""

GB = 10**9

MEMORY = "tensors in a step"
"""Name of the sum of `Entry.memory`."""

PEAK = "peak memory of the run"
"""Name of `Entry.peak_bytes`, which is more: on a CPU all that the process held."""


@dataclass(frozen=True, kw_only=True)
class BlockHistory:
    """Which blocks, or units of blocks, trained in which periods."""

    active: dict[int, tuple[int, ...]]
    """Active blocks of each logged period."""

    visits: tuple[int, ...]
    """In how many periods each block trained."""

    word: str = "block"
    """What they are: block or unit."""


@dataclass(kw_only=True)
class Entry:
    """An arm or a run: one line of every chart. An unknown value is None or empty, and left out."""

    name: str
    curves: list[list[Point]] = field(default_factory=list)
    """Held-out losses during training, one curve for each run with the chosen learning rate."""

    loss: float | None = None
    """Held-out loss after training. Lower is better."""

    peak_bytes: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes at a step's peak by category."""

    blocks: BlockHistory | None = None
    movement: list[float] | None = None
    """How far each block's weights moved, as `lisatune.study.movement.measure_movement` measures it."""

    samples: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """The cells to mark, as (row, column)."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its title, text and values."""

    title: str
    svg: str
    alt: str
    """Description of the chart for a reader who cannot see it."""
    note: str
    """How to read the chart."""
    table: Table
    """The values in the chart."""


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Read metrics.jsonl. Return its intact lines, and the number of damaged ones.

    Raises:
        OSError: the file does not exist or cannot be read.
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


def extract_block_history(
    metrics: Sequence[Mapping[str, Any]], visits: Sequence[int] | None
) -> BlockHistory | None:
    """Extract periods and visits of a run from its metrics. None for a method that draws no blocks."""
    key = "active_units" if any("active_units" in line for line in metrics) else "active_blocks"
    active = {
        line["period"]: tuple(line[key])
        for line in metrics
        if line.get("period") is not None and line.get(key) is not None
    }
    if visits is None:
        num_blocks = 1 + max((block for blocks in active.values() for block in blocks), default=-1)
        visits = [sum(block in blocks for blocks in active.values()) for block in range(num_blocks)]
    word = "unit" if key == "active_units" else "block"
    return BlockHistory(active=active, visits=tuple(visits), word=word) if active or visits else None


def mark_best(values: Sequence[float | None], pick: Callable[..., float]) -> list[int]:
    """Return the indices of the best values. Empty if fewer than two values are known."""
    known = [value for value in values if value is not None]
    return [] if len(known) < 2 else [i for i, value in enumerate(values) if value == pick(known)]


def make_figures(
    entries: Sequence[Entry], *, loss: str, memory_note: str, card_bytes: int | None
) -> list[Figure]:
    """Make every figure that there are values for.

    Args:
        entries: the arms or runs to show.
        loss: name of the quantity in `Entry.loss`.
        memory_note: how memory was counted.
        card_bytes: memory of the card to compare with. None: the smallest common card that is large enough.
    """
    made = [
        _show_losses(entries, "tokens", "tokens trained on"),
        _show_losses(entries, "seconds", "seconds in training steps"),
        _show_memory(entries, memory_note, card_bytes),
        _show_quality(entries, loss),
        *map(_show_active_blocks, entries),
        _show_movement(entries),
    ]
    return [figure for figure in made if figure is not None]


def find_pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Find the points that no other point beats in one value without being worse in the other.

    Lower is better in both.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _show_losses(entries: Sequence[Entry], key: str, label: str) -> Figure | None:
    named, rows = [], []
    for entry in entries:
        curves = [
            [(_pick_x(point, key), point["loss"]) for point in curve if point["loss"] is not None]
            for curve in entry.curves
        ]
        curves = [curve for curve in curves if len(curve) > 1]
        if curves:
            named.append((entry.name, curves))
        rows += [
            [entry.name, f"{curve[0][1]:.4f}", f"{curve[-1][1]:.4f}", f"{curve[-1][0]:,.4g}"]
            for curve in curves
        ]
    if not named:
        return None
    what = "tokens" if key == "tokens" else "wall time"
    falls = "; ".join(f"{name} from {first} to {last} after {end} {key}" for name, first, last, end in rows)
    is_repeated = any(len(curves) > 1 for _, curves in named)
    return Figure(
        title=f"Held-out loss against {what}",
        svg=charts.draw_lines(named, x=label, y="held-out loss"),
        alt=f"Line chart of held-out loss against {label}: {falls}.",
        note="Nats per token, with loss.name: dpo or reward per pair of answers; lower is better."
        + (" One curve for each seed." if is_repeated else "")
        + (" Evaluation, loading and compiling are not in the time." if key == "seconds" else ""),
        table=Table(["", "first loss", "last loss", key], rows),
    )


def _pick_x(point: Point, key: str) -> float:
    return point["tokens"] if key == "tokens" else point["seconds"]


def _show_memory(entries: Sequence[Entry], note: str, card_bytes: int | None) -> Figure | None:
    shown = [(entry, entry.memory or {PEAK: round(entry.peak_bytes or 0)}) for entry in entries]
    shown = [(entry, parts) for entry, parts in shown if any(parts.values())]
    if not shown:
        return None
    whole = [entry.name for entry, _ in shown if not entry.memory]
    label = PEAK if len(whole) == len(shown) else f"{MEMORY}, or {PEAK}" if whole else MEMORY
    if whole and len(whole) < len(shown):
        note += f" Undivided, the peak of the whole run: {', '.join(whole)}."
    most = max(sum(parts.values()) for _, parts in shown)
    card = card_bytes or next((size * CARD_GB for size in CARDS if size * CARD_GB >= most), None)
    name = "" if card is None else f"card of {round(card / CARD_GB, 1):g} GB"
    limit = None if card is None or (card_bytes is None and card >= 8 * most) else card
    unit, divisor = ("GB", GB) if (limit or most) >= GB else ("MB", 10**6)
    bars = {
        entry.name: {part: size / divisor for part, size in parts.items() if size} for entry, parts in shown
    }
    parts_seen = list(dict.fromkeys(part for _, parts in shown for part, size in parts.items() if size))
    rows = [
        [entry.name, *(byte_text(parts.get(part, 0)) for part in parts_seen), byte_text(sum(parts.values()))]
        for entry, parts in shown
    ]
    above = [entry.name for entry, parts in shown if card is not None and sum(parts.values()) > card]
    if card is None:
        verdict = f"No single card of up to {CARDS[-1]} GB holds the largest."
    elif above:
        verdict = f"Above the {name}, the dashed line: {', '.join(above)}."
    else:
        where = ", far beyond the right edge of the chart." if limit is None else ": the dashed line."
        verdict = f"{'All fit' if len(shown) > 1 else 'It fits'} a {name}{where}"
    sums = "; ".join(f"{row[0]} {row[-1]}" for row in rows)
    return Figure(
        title="Memory by category" if any(entry.memory for entry, _ in shown) else "Memory",
        svg=charts.draw_stacked_bars(
            bars, x=f"{label}, {unit}", limit=None if limit is None else limit / divisor, limit_name=name
        ),
        alt=f"Stacked bars of {label}: {sums}. {verdict}",
        note=f"{note} {verdict}",
        table=Table(["", *parts_seen, "sum"], rows),
    )


def _show_quality(entries: Sequence[Entry], loss: str) -> Figure | None:
    by_part = all(entry.memory for entry in entries if entry.loss is not None)
    points = []
    for entry in entries:
        size = sum(entry.memory.values()) if by_part else entry.peak_bytes
        if entry.loss is not None and size:
            points.append((entry.name, size, entry.loss))
    if len(points) < 2:
        return None
    front = find_pareto_front([point[1:] for point in points])
    unit, divisor = ("GB", GB) if max(size for _, size, _ in points) >= GB else ("MB", 10**6)
    best = [name for name, *point in points if tuple(point) in front]
    label = MEMORY if by_part else PEAK
    rows = [
        [name, byte_text(size), f"{value:.4f}", "yes" if name in best else "no"]
        for name, size, value in points
    ]
    return Figure(
        title="Quality against memory",
        svg=charts.draw_scatter(
            [(name, size / divisor, value) for name, size, value in points],
            [(size / divisor, value) for size, value in front],
            x=f"{label}, {unit}",
            y=loss,
        ),
        alt=f"Scatter of {loss} against {label}; the Pareto front is {', '.join(best)}.",
        note="Lower and further left is better. Filled: the Pareto front, those that no other one beats in "
        "one value without being worse in the other.",
        table=Table(["", label, loss, "on the front"], rows),
    )


def _show_active_blocks(entry: Entry) -> Figure | None:
    if entry.blocks is None or not entry.blocks.visits:
        return None
    active, visits, word = entry.blocks.active, entry.blocks.visits, entry.blocks.word
    never = [block for block, count in enumerate(visits) if not count]
    unlogged = sorted(set(range(max(active, default=-1) + 1)) - set(active))
    blocks = plural(len(visits), word)
    alt = (
        f"Map of active {word}s of {entry.name}: {blocks} over {plural(len(active), 'period')}, with each "
        f"{word}'s number of visits, from {min(visits)} to {max(visits)}."
    )
    note = f"Left: a mark where a {word} trained in a period. Right: visits, the periods it trained in."
    if never:
        note += f" Never trained: {word}{'s' if len(never) > 1 else ''} {ranges_text(never)}."
    if unlogged:
        note += f" Shaded: {plural(len(unlogged), 'period')} without a logged step (see run.log_every)."
    if not active:
        note += " The periods are unknown because the run's metrics.jsonl is missing."
    periods = [
        ", ".join(str(period) for period, drawn in sorted(active.items()) if block in drawn)
        for block in range(len(visits))
    ]
    rows = [[str(block), str(visits[block]), periods[block]] for block in range(len(visits))]
    return Figure(
        title=f"Active {word}s: {entry.name}",
        svg=charts.draw_active_blocks(active, visits, word),
        alt=alt,
        note=note,
        table=Table([word, "visits", "in periods"], rows),
    )


def _show_movement(entries: Sequence[Entry]) -> Figure | None:
    moved = [(entry.name, entry.movement) for entry in entries if entry.movement]
    if not moved:
        return None
    most = max(len(movement) for _, movement in moved)
    rows = [
        [str(block), *(f"{each[block]:.2e}" if block < len(each) else "" for _, each in moved)]
        for block in range(most)
    ]
    peaks = "; ".join(
        f"{name} most in block {each.index(max(each))}, {max(each):.2e}" for name, each in moved
    )
    return Figure(
        title="Weight movement by block",
        svg=charts.draw_lines(
            [(name, [list(enumerate(each))]) for name, each in moved],
            x="block, 0 nearest the input",
            y="relative movement",
            from_zero=True,
        ),
        alt=f"Line chart of how far each block's weights moved: {peaks}.",
        note="Norm of the difference between a block's weights after and before training, as a share of "
        "their norm before. 0: never trained.",
        table=Table(["block", *(name for name, _ in moved)], rows),
    )
