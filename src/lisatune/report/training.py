"""The figures of a run that its metrics.jsonl has without any evaluation: loss, learning rates, gradients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lisatune.report import charts
from lisatune.report.figures import Figure, Table

__all__ = ["make_training_figures"]

MOST_POINTS = 200
"""Most points of a curve. Of more steps, neighbours are averaged."""

RATES = {"lr": "lr", "ends_lr": "ends", "block_lr": "blocks"}
"""Keys of a line of metrics.jsonl with a learning rate, and what is shown of them."""

Metrics = Sequence[Mapping[str, Any]]
Curve = list[tuple[float, float]]


def make_training_figures(runs: Sequence[tuple[str, Metrics]]) -> list[Figure]:
    """Draw training loss, learning rates and gradient norm against optimizer steps.

    Args:
        runs: name and lines of metrics.jsonl of each run.

    Returns:
        The figures for which a run has at least two values.
    """
    rates = [
        (name if key == "lr" else f"{name}, {what}", _extract(metrics, key))
        for name, metrics in runs
        for key, what in RATES.items()
    ]
    made = [
        _show(
            "Training loss",
            "training loss",
            [(name, _extract(metrics, "loss")) for name, metrics in runs],
            "Nats per token that carries loss, or per pair of answers with dpo and reward, of the rows of "
            "the step itself: noisy, and no measure of what the model has learned.",
        ),
        _show(
            "Training loss by source",
            "training loss",
            _by_source(runs, "loss_by_source"),
            "Nats per token that carries loss, of each source of a mixture (data.train) in a step.",
        ),
        _show(
            "Held-out loss by source",
            "held-out loss",
            _by_source(runs, "held_out_loss_by_source"),
            "Nats per token that carries loss, of the held-out rows of each source.",
        ),
        _show("Learning rates", "learning rate", rates, "Of each step, with warm-up and schedule."),
        _show(
            "Gradient norm",
            "gradient norm",
            [(name, _extract(metrics, "grad_norm")) for name, metrics in runs],
            "Norm of all gradients of a step, before they are clipped to optimizer.max_grad_norm.",
        ),
    ]
    return [figure for figure in made if figure is not None]


def _by_source(runs: Sequence[tuple[str, Metrics]], key: str) -> list[tuple[str, Curve]]:
    """Take a value of each source of a mixture by step."""
    curves = []
    for name, metrics in runs:
        found = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), dict)]
        sources = dict.fromkeys(source for _, losses in found for source in losses)
        curves += [
            (f"{name}, {source}", [(step, losses[source]) for step, losses in found if source in losses])
            for source in sources
        ]
    return curves


def _extract(metrics: Metrics, key: str) -> Curve:
    """Take the finite values of a key by step."""
    values = [(line["step"], line.get(key)) for line in metrics]
    return [
        (step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)
    ]


def _show(title: str, y: str, curves: Sequence[tuple[str, Curve]], note: str) -> Figure | None:
    shown = [(name, curve) for name, curve in curves if len(curve) > 1]
    if not shown:
        return None
    if any(len(curve) > MOST_POINTS for _, curve in shown):
        note += f" Steps are averaged to at most {MOST_POINTS} points."
    rows = [
        [name, *(f"{value:.4g}" for value in (curve[0][1], min(ys), max(ys), curve[-1][1]))]
        for name, curve in shown
        for ys in [[value for _, value in curve]]
    ]
    words = "; ".join(f"{name} from {first} to {last}" for name, first, _, _, last in rows)
    return Figure(
        title=title,
        svg=charts.draw_lines(
            [(name, [_average(curve)]) for name, curve in shown],
            x="step",
            y=y,
            from_zero="loss" not in y,
            markers=False,
        ),
        alt=f"Line chart of {y} against steps: {words}.",
        note=note,
        table=Table(["", "first", "lowest", "highest", "last"], rows),
    )


def _average(curve: Curve) -> Curve:
    """Average neighbouring points, so that at most `MOST_POINTS` are left."""
    size = math.ceil(len(curve) / MOST_POINTS)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
