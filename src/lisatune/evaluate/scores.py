"""The scores of an evaluation: how they are kept on disk, averaged, compared and printed.

A folder of scores is of one model:

    model.json                the model, by name and by the hash of its weights
    tasks/NAME/TASK.json      the score of each task of the harness, with settings and the result per question
    evaluation.json           everything in one file, without the results per question
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from lisatune.console import percent_text
from lisatune.evaluate.tasks import OpenTask
from lisatune.files.disk import explain_write_errors, replace_file, sha256_of
from lisatune.models.locate import find_snapshot, is_adapter, locate
from lisatune.runs.summary import Score

__all__ = [
    "Metric",
    "ScoreFolder",
    "TaskScore",
    "average",
    "check_model",
    "difference",
    "differences",
    "figure_text",
    "identify",
    "is_share",
    "leaf_score",
    "score_text",
    "without_items",
    "write_evaluation",
]


OTHERS = ("bits_per_byte", "likelihood", "bleu", "chrf", "chrf++", "ter")
"""Metrics beside perplexities that are no shares, from 0 to 1, and so are not shown in percent."""


class Metric(TypedDict):
    """One figure of a task."""

    value: float
    stderr: float | None
    """Standard error over the questions; None where the harness gives none."""

    higher_is_better: bool


class TaskScore(TypedDict, total=False):
    """The score of a task or of a group of tasks."""

    task: str
    settings: dict[str, Any]
    """What the score depends on, and how it was made: shots, limit, template, versions, batch, seconds."""

    items: int
    """Questions asked."""

    metrics: dict[str, Metric]
    """By name; a filter is written behind a comma: `acc`, `exact_match,strict-match`."""

    per_item: dict[str, list[float]]
    """The result of each question, in order, for metrics that are means over questions."""

    subtasks: dict[str, "TaskScore"]
    about: str
    notes: list[str]


def leaf_score(result: Mapping[str, Any], name: str, settings: dict[str, Any]) -> TaskScore:
    """Read the score of one task from a result of the harness."""
    better = result["higher_is_better"].get(name, {})
    metrics = _read_metrics(result["results"][name], better)
    per_item: dict[str, list[float]] = {}
    for sample in sorted(result["samples"][name], key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], int | float):
                per_item.setdefault(_join(metric, sample["filter"]), []).append(float(value))
    kept = {key: values for key, values in per_item.items() if key in metrics}
    return {
        "task": name,
        "settings": settings,
        "items": int(result["n-samples"][name]["effective"]),
        "metrics": metrics,
        "per_item": kept,
    }


def _read_metrics(found: Mapping[str, Any], better: Mapping[str, bool | None]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
        higher = better.get(metric)
        metrics[_join(metric, filtered)] = {
            "value": float(value),
            "stderr": stderr,
            "higher_is_better": True if higher is None else higher,
        }
    return metrics


def _join(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def average(task: OpenTask, leaves: dict[str, TaskScore]) -> TaskScore:
    """Make a task's score of those of its leaves; a group is averaged as the harness does."""
    shared = {"about": task.about, "notes": task.notes}
    first = next(iter(leaves.values()))
    if task.group is None and len(leaves) == 1:
        return cast(TaskScore, first | shared | {"task": task.name})
    settings = {key: value for key, value in first["settings"].items() if key not in ("task", "questions")}
    shots = {leaf["settings"]["shots"] for leaf in leaves.values()}
    settings |= {
        "shots": shots.pop() if len(shots) == 1 else None,
        "questions": sum(leaf["settings"]["questions"] for leaf in leaves.values()),
        "cut": sum(leaf["settings"]["cut"] for leaf in leaves.values()),
        "seconds": round(sum(leaf["settings"]["seconds"] for leaf in leaves.values()), 3),
    }
    metrics: dict[str, Metric] = {}
    if task.group is not None:
        settings["version"] = task.group.version
        metrics = _read_metrics(
            task.group.aggregate({name: _as_found(leaf) for name, leaf in leaves.items()}), {}
        )
    per_item: dict[str, list[float]] = {}
    for key in metrics:
        if all(key in leaf["per_item"] for leaf in leaves.values()):
            per_item[key] = [value for leaf in leaves.values() for value in leaf["per_item"][key]]
    whole = {
        "task": task.name,
        "settings": settings,
        "items": sum(leaf["items"] for leaf in leaves.values()),
        "metrics": metrics,
        "per_item": per_item,
        "subtasks": leaves,
    }
    return cast(TaskScore, whole | shared)


def _as_found(leaf: TaskScore) -> dict[str, Any]:
    """Write a score as the harness would, for its averages."""
    found: dict[str, Any] = {"sample_len": leaf["items"]}
    for key, metric in leaf["metrics"].items():
        name, comma, filtered = key.partition(",")
        filtered = filtered if comma else "none"
        found[f"{name},{filtered}"] = metric["value"]
        found[f"{name}_stderr,{filtered}"] = "N/A" if metric["stderr"] is None else metric["stderr"]
    return found


def difference(score: TaskScore, base: TaskScore, metric: str) -> Metric | None:
    """Return how much better a score is than the base's on the same questions.

    The standard error is that of paired differences, sd(d) / √n: both models answer the same questions, so it
    is smaller than that of two independent scores. It is None where there are no results per question, or the
    score is no mean of them, as a perplexity.

    Returns:
        None if the base lacks the metric or was asked other questions.
    """
    if metric not in base["metrics"] or score["items"] != base["items"]:
        return None
    value = score["metrics"][metric]["value"] - base["metrics"][metric]["value"]
    mine, theirs = score["per_item"].get(metric), base["per_item"].get(metric)
    stderr = None
    if mine and theirs and len(mine) == len(theirs) > 1:
        gains = [a - b for a, b in zip(mine, theirs, strict=True)]
        mean = math.fsum(gains) / len(gains)
        if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
            variance = math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
            stderr = math.sqrt(variance / len(gains))
    return {
        "value": value,
        "stderr": stderr,
        "higher_is_better": score["metrics"][metric]["higher_is_better"],
    }


def differences(
    scores: Mapping[str, TaskScore], base: Mapping[str, TaskScore]
) -> dict[str, dict[str, Metric]]:
    """Return `difference` for each task and metric that both models have."""
    found: dict[str, dict[str, Metric]] = {}
    for name, score in scores.items():
        gains = {metric: difference(score, base[name], metric) for metric in score["metrics"]}
        found[name] = {metric: gain for metric, gain in gains.items() if gain is not None}
    return found


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1, as an accuracy does and a perplexity does not."""
    name = metric.partition(",")[0]
    return "perplexity" not in name and name not in OTHERS


def figure_text(metric: str, value: float, error: float | None = None, *, sign: str = "") -> str:
    """Write a figure and its standard error: a share in percent, anything else as it is."""
    if is_share(metric):
        return percent_text(value, error, sign=sign)
    return f"{value:{sign}.4g}" + ("" if error is None else f" ± {error:.2g}")


def score_text(score: Score) -> str:
    """Write the figure of a task with its standard error: 51.0 ± 3.5 %."""
    metric = score["metric"]
    return figure_text(metric, score["value"], score["stderr"]) + " %" * is_share(metric)


def write_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write evaluation.json."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")


def without_items(score: TaskScore) -> TaskScore:
    """Leave out the results per question, of the subtasks too."""
    short = cast(TaskScore, {key: value for key, value in score.items() if key != "per_item"})
    if "subtasks" in score:
        short["subtasks"] = {name: without_items(leaf) for name, leaf in score["subtasks"].items()}
    return short


def identify(name: str) -> dict[str, Any]:
    """Name a model by the hash of each file of weights, so that another model in its place is noticed.

    Reads all weights once, about a second per GB.

    Returns:
        The name, and `sha256` by file. It is empty for a model whose files are not found.
    """
    place = name if is_adapter(name) else locate(name)
    files = find_snapshot(place, None)
    weights = sorted(Path(files).glob("*.safetensors")) if files is not None else []
    return {"name": name, "sha256": {file.name: sha256_of(file) for file in weights}}


class ScoreFolder:
    """A folder of scores of one model.

    Args:
        path: the folder; it is created with the first score.
        name: the model's name, for messages.
        identity: what `identify` says of the model; None compares the name alone.

    Raises:
        ValueError: the folder holds scores of another model, or is damaged.
    """

    def __init__(self, path: Path, *, name: str, identity: dict[str, Any] | None = None) -> None:
        self.path = path
        self.model = identity or {"name": name, "sha256": {}}
        check_model(path / "model.json", self.model)

    def read(self, task: str, leaf: str, settings: Mapping[str, Any]) -> TaskScore | None:
        """Read a score that was made with these settings; None if there is none."""
        try:
            score = json.loads(self._file(task, leaf).read_text(encoding="utf-8"))
            same = all(score["settings"].get(key) == value for key, value in settings.items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # absent, or damaged: ask again
        return cast(TaskScore, score) if same else None

    def write(self, task: str, leaf: str, score: TaskScore) -> None:
        """Keep a score."""
        with explain_write_errors(self.path):
            file = self._file(task, leaf)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path / "model.json", json.dumps(self.model, indent=1) + "\n")
            replace_file(file, json.dumps(score) + "\n")

    def _file(self, task: str, leaf: str) -> Path:
        return (
            self.path / "tasks" / task.replace(":", "-").replace("/", "-") / f"{leaf.replace('/', '-')}.json"
        )


def check_model(file: Path, model: Mapping[str, Any]) -> None:
    """Refuse a folder that holds results of another model.

    Args:
        file: model.json in the folder.
        model: what `identify` says of the model.

    Raises:
        ValueError: it does, or the file is damaged.
    """
    if not file.exists():
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        same = there["sha256"] == model["sha256"] and (there["sha256"] or there["name"] == model["name"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); name another output folder") from None
    if not same:
        again = "" if there["name"] != model["name"] else " as it was before its weights changed"
        raise ValueError(
            f"{file.parent} holds results of {there['name']}{again}, and this is {model['name']}; name "
            "another output folder"
        )
