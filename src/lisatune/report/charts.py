"""Draw charts as SVG for a page: text and axes in the page's text colour, on a transparent background.

The same values give the same bytes. Text stays text, so that it can be read aloud, searched and scaled.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Line", "draw_active_blocks", "draw_lines", "draw_scatter", "draw_stacked_bars"]

WIDTH = 4.1
"""Inches. Narrow, because a phone scales the whole chart down."""

INK = "#0a0b0c"
"""Is replaced by the page's `currentColor`. No other colour here may equal it."""

COLOURS = ("#3f87d6", "#dc7a28", "#2c9f70", "#c657a6", "#8d72dc", "#ae8a08", "#d9534f", "#3aa3b3")
"""Readable on white and on black."""

DASHES = ("-", "--", ":", "-.")

MARKERS = "os^Dv"

STYLE = {
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.color": INK,
}

Line = tuple[str, Sequence[Sequence[tuple[float, float]]]]
"""A name and its curves of (x, y), for example one for each seed."""


def draw_lines(
    named: Sequence[Line],
    *,
    x: str,
    y: str,
    from_zero: bool = False,
    markers: bool = True,
    log: bool = False,
) -> str:
    """Draw curves, in one colour for each name, with or without markers; `log`: both axes are logarithmic."""

    def draw(figure: Any) -> None:
        axes = _add_axes(figure, x, y)
        handles = []
        for index, (_, curves) in enumerate(named):
            look = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // 8 % len(DASHES)]}
            for curve in curves:
                marker = MARKERS[index % len(MARKERS)] if markers else ""
                (handle,) = axes.plot(*zip(*curve, strict=True), marker=marker, markersize=3, lw=1.4, **look)
            handles.append(handle)
        if from_zero:
            axes.set_ylim(
                0, 1.1 * max(value for _, curves in named for curve in curves for _, value in curve) or 1
            )
        if log:
            axes.set(xscale="log", yscale="log")
        _add_legend(figure, handles, [name for name, _ in named])

    return _render(2.8 + _legend_height([name for name, _ in named]), f"{x} {y}", draw)


def draw_stacked_bars(
    bars: Mapping[str, Mapping[str, float]], *, x: str, limit: float | None, limit_name: str
) -> str:
    """Draw one bar of named parts for each name, and a dashed line at `limit`."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))

    def draw(figure: Any) -> None:
        axes = _add_axes(figure, x, "")
        handles, ends = [], [0.0] * len(bars)
        for index, part in enumerate(parts):
            sizes = [bar.get(part, 0) for bar in bars.values()]
            colour = COLOURS[index % len(COLOURS)]
            handles.append(axes.barh(range(len(bars)), sizes, 0.65, ends, color=colour))
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        if limit is not None:
            handles.append(axes.axvline(limit, color=INK, linestyle="--", lw=1.2))
        axes.set_yticks(range(len(bars)), [_shorten(name, 26) for name in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _add_legend(figure, handles, parts + ([limit_name] if limit is not None else []))

    return _render(0.9 + 0.3 * len(bars) + _legend_height([*parts, limit_name]), x, draw)


def draw_scatter(
    points: Sequence[tuple[str, float, float]], front: Sequence[tuple[float, float]], *, x: str, y: str
) -> str:
    """Draw named points (name, x, y), and a staircase through those on the front."""

    def draw(figure: Any) -> None:
        axes = _add_axes(figure, x, y)
        if len(front) > 1:
            axes.step(*zip(*front, strict=True), where="post", color=INK, alpha=0.5, lw=1)
        handles = []
        for index, (_, at, value) in enumerate(points):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            is_hollow = (at, value) not in front
            face = "none" if is_hollow else colour
            (handle,) = axes.plot(
                at, value, marker, color=colour, markerfacecolor=face, markersize=8, linestyle="none"
            )
            handles.append(handle)
        axes.margins(0.12)
        _add_legend(figure, handles, [name for name, _, _ in points])

    return _render(2.8 + _legend_height([name for name, _, _ in points]), f"{x} {y}", draw)


def draw_active_blocks(
    active: Mapping[int, Sequence[int]], visits: Sequence[int], word: str = "block"
) -> str:
    """Draw the active blocks of each period, and beside them in how many periods each block trained."""
    height = 1.0 + min(4.0, max(1.2, 0.13 * len(visits)))

    def draw(figure: Any) -> None:
        heat, counts = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        last = max(active, default=0)
        for period in sorted(set(range(last + 1)) - set(active)):
            heat.axvspan(period - 0.5, period + 0.5, color=INK, alpha=0.12, lw=0)
        for block in range(len(visits)):
            spans = [(period - 0.5, 1) for period, blocks in sorted(active.items()) if block in blocks]
            if spans:
                heat.broken_barh(spans, (block - 0.45, 0.9), facecolor=COLOURS[0], edgecolor="none")
        counts.barh(range(len(visits)), visits, 0.8, color=COLOURS[1])
        heat.set(xlabel="period", ylabel=word, xlim=(-0.5, last + 0.5), ylim=(-0.6, len(visits) - 0.4))
        counts.set(xlabel="visits")
        for axes in (heat, counts):
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=7 if axes is heat else 2)
            axes.grid(axis="y", visible=False)
        heat.yaxis.get_major_locator().set_params(integer=True)

    return _render(height, f"{sorted(active.items())}", draw)


def _shorten(text: str, length: int = 34) -> str:
    """Cut a text to fit a chart. Matplotlib hides a label with a leading underscore, so a space is added."""
    text = " ".join(text.split())
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return f" {text}" if text.startswith("_") else text


def _add_axes(figure: Any, x: str, y: str) -> Any:
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.get_major_locator().set_params(nbins=6)
    return axes


def _count_columns(names: Sequence[str]) -> int:
    longest = max(map(len, map(_shorten, names)), default=1)
    return 1 if longest > 24 else 2 if longest > 15 else 3


def _legend_height(names: Sequence[str]) -> float:
    return 0.19 * -(-len(names) // _count_columns(names))


def _add_legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    figure.legend(
        handles, [_shorten(name) for name in names], loc="outside lower left", ncols=_count_columns(names)
    )


def _render(height: float, salt: str, draw: Callable[[Any], None]) -> str:
    """Make a figure, let `draw` fill it, and return SVG that can be placed inside HTML."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{error}; a report needs more packages: pip install "lisatune[report]"') from None

    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # Matplotlib measures text with its own font, and the page shows it in the reader's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[a-zA-Z]+[\w.]*_\d+"', r"\1", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} aria-hidden="true">', text, count=1)
    return text.replace(INK, "currentColor").replace("xlink:href", "href").strip()
