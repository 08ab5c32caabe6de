"""Scores of benchmark tasks beside those of the base model, for a run and for the seeds of an arm."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lisatune.compare.measure import Measured
from lisatune.compare.results import TaskGain
from lisatune.evaluate.scores import TaskScore, difference, figure_text

__all__ = ["gain_text", "gains", "mean_gains"]


def gains(measured: Measured, base: Measured) -> dict[str, TaskGain]:
    """Put the scores of a model beside those of the base, which is empty for the base itself."""
    found = {}
    for name, score in measured.get("scores", {}).items():
        gain = None
        if name in base.get("scores", {}):
            gain = difference(_as_score(measured, name), _as_score(base, name), score["metric"])
        found[name] = TaskGain(
            metric=score["metric"],
            value=score["value"],
            stderr=score["stderr"],
            items=score["items"],
            gain=None if gain is None else gain["value"],
            gain_stderr=None if gain is None else gain["stderr"],
        )
    return found


def _as_score(measured: Measured, name: str) -> TaskScore:
    score = measured["scores"][name]
    metric: Any = {"value": score["value"], "stderr": score["stderr"], "higher_is_better": True}
    return {
        "items": score["items"],
        "metrics": {score["metric"]: metric},
        "per_item": {score["metric"]: measured["per_item"][name]},
    }


def mean_gains(runs: Sequence[dict[str, TaskGain]]) -> dict[str, TaskGain]:
    """Average scores over seeds.

    Errors are averaged and not divided by √seeds: all seeds answer the same questions.
    """
    runs = [run for run in runs if run]
    if not runs:
        return {}

    def average(name: str, key: str) -> float | None:
        values: list[Any] = [run[name][key] for run in runs]  # type: ignore[literal-required]
        return None if None in values else fmean(values)

    return {
        name: TaskGain(
            metric=first["metric"],
            value=fmean(run[name]["value"] for run in runs),
            stderr=average(name, "stderr"),
            items=first["items"],
            gain=average(name, "gain"),
            gain_stderr=average(name, "gain_stderr"),
        )
        for name, first in runs[0].items()
        if all(name in run for run in runs)
    }


def gain_text(gain: TaskGain | None) -> str:
    """Write a score, a share in percent: 51.0 ± 3.5 (+1.5 ± 1.2)."""
    if gain is None:
        return ""
    metric = gain["metric"]
    text = figure_text(metric, gain["value"], gain["stderr"])
    if gain["gain"] is None:
        return text
    return f"{text} ({figure_text(metric, gain['gain'], gain['gain_stderr'], sign='+')})"
