"""The report of run folders that `lisatune train` made, finished or not."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.compare.outcome import extract_held_out_curve
from lisatune.console import byte_text, count_text, first_line, plural
from lisatune.evaluate.scores import score_text
from lisatune.files import yaml
from lisatune.recipe.data import describe_paths
from lisatune.report.figures import Entry, Table, extract_block_history, make_figures, mark_best, read_metrics
from lisatune.report.page import Page, group_samples
from lisatune.report.training import make_training_figures

__all__ = ["make_runs_page"]

Pick = Callable[..., float]
"""`min` or `max`: which value is the best."""

COLUMNS: dict[str, tuple[str, Callable[[float], str], Pick | None]] = {
    "steps": ("steps", lambda value: f"{value:,}", None),
    "tokens": ("tokens", lambda value: f"{value:,}", None),
    "loss before": ("held_out_loss_before", lambda value: f"{value:.4f}", None),
    "loss after": ("held_out_loss_after", lambda value: f"{value:.4f}", min),
    "peak memory": ("peak_bytes", byte_text, min),
    "optimizer state": ("peak_state_bytes", byte_text, min),
    "trainable": ("peak_trainable", count_text, None),
    "tokens/s": ("tokens_per_second", lambda value: f"{value:,.0f}", max),
    "training time": ("train_seconds", lambda value: f"{value:,.1f} s", min),
}
"""Columns of the overview: key in summary.json, how to format it, and which value is the best."""


@dataclass
class _RunFiles:
    """The files of a run folder that could be read."""

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def make_runs_page(folders: Sequence[Path], *, card_bytes: int | None = None, weights: bool = True) -> Page:
    """Make the page of one or several runs.

    Args:
        folders: run folders. The page lists the files that are missing or damaged.
        card_bytes: as in `make_figures`.
        weights: whether to load models to see how far their weights moved.

    Raises:
        FileNotFoundError: none of the folders is a run folder.
    """
    names = _shorten_paths(folders)
    runs = [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    if not any(run.recipe for run in runs):
        raise FileNotFoundError(f"nothing to report: {'; '.join(p for run in runs for p in run.problems)}")
    found = [run for run in runs if run.recipe or run.metrics or run.summary]
    entries = [_make_entry(run, weights) for run in found]
    return Page(
        title=f"Run {found[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        intro=[f"{run.name}: {_describe(run)}" for run in found],
        problems=[problem for run in runs for problem in run.problems],
        overview=_make_overview(found),
        overview_note="Loss is measured on each run's own held-out records, in nats per token, or per "
        "pair of answers with loss.name: dpo or reward. "
        + (
            "Marked: the best of each column; runs on different data or lengths cannot be compared. "
            if found[1:]
            else ""
        )
        + "peak memory: on a CPU of the process, loading included; else as allocated on the device.",
        tables=[],
        figures=[
            *make_training_figures([(run.name, run.metrics) for run in found]),
            *make_figures(
                entries,
                loss="held-out loss",
                memory_note="As planned before the run. `lisatune compare` measures them."
                if any(entry.memory for entry in entries)
                else "Peak memory of the whole run, undivided: its summary has no plan.",
                card_bytes=card_bytes,
            ),
        ],
        samples=group_samples(entries),
        texts=[text for run in found for text in _list_texts(run)],
    )


def _shorten_paths(folders: Sequence[Path]) -> list[str]:
    """Shorten the paths to their last parts, as many as are needed to tell them apart."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}; name each once")


def _read_run(folder: Path, name: str) -> _RunFiles:
    run = _RunFiles(name, folder)
    if not folder.is_dir():
        run.problems.append(f"{folder} does not exist; name the folder of a run, its run.output")
        return run
    files = ("recipe.yaml", "environment.json", "summary.json", "metrics.jsonl")
    if not any((folder / file).exists() for file in files):
        run.problems.append(f"{folder} holds no run; name the folder of one, its run.output")
        return run
    if (text := _read_text(run, "recipe.yaml")) is not None:
        try:
            recipe = yaml.load(text)
        except ValueError:
            recipe = None
        if isinstance(recipe, dict) and all(isinstance(section, dict) for section in recipe.values()):
            run.recipe = recipe
        else:
            run.problems.append(f"{name}: recipe.yaml is damaged")
    for file in ("environment.json", "summary.json"):
        if (text := _read_text(run, file)) is not None:
            try:
                values = json.loads(text)
            except ValueError:
                values = None
            if isinstance(values, dict):
                setattr(run, file.removesuffix(".json"), values)
            else:
                run.problems.append(f"{name}: {file} is damaged")
    try:
        run.metrics, damaged = read_metrics(folder)
    except OSError:
        run.problems.append(f"{name}: metrics.jsonl is missing, so there are no curves")
    else:
        if damaged:
            run.problems.append(f"{name}: metrics.jsonl has {plural(damaged, 'line')} that cannot be read")
    return run


def _read_text(run: _RunFiles, file: str) -> str | None:
    try:
        return (run.folder / file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        is_summary = file == "summary.json"
        why = "the run has not finished, so there are no final figures" if is_summary else "is it a run?"
        run.problems.append(f"{run.name}: {file} is missing; {why}")
        return None


def _make_entry(run: _RunFiles, weights: bool) -> Entry:
    curve = extract_held_out_curve(run.metrics)
    return Entry(
        name=run.name,
        curves=[curve],
        loss=run.summary.get("held_out_loss_after"),
        peak_bytes=run.summary.get("peak_bytes"),
        memory=run.summary.get("planned_at_peak", {}),
        blocks=extract_block_history(run.metrics, run.summary.get("visits")),
        movement=_measure_movement(run) if weights and run.recipe else None,
        samples=run.summary.get("samples", []),
    )


def _measure_movement(run: _RunFiles) -> list[float] | None:
    """Measure how far the weights moved, if the run's model and the one it started from are on this disk."""
    from lisatune.models.locate import is_adapter

    folder, base = run.folder / "model", str(run.recipe.get("model", {}).get("name", ""))
    if is_adapter(str(folder)):
        return None
    if not folder.is_dir():
        run.problems.append(f"{run.name}: model is missing; weight movement is left out")
        return None
    if not Path(base).exists() and base != "smollm2-135m":
        run.problems.append(f"{run.name}: {base} is not on this disk; weight movement is left out")
        return None
    import torch

    from lisatune.models.load import load_model, stored_dtype
    from lisatune.study.movement import measure_movement

    try:
        # Both in the dtype of the written model, so that rounding to it does not count as movement.
        dtype = stored_dtype(str(folder)) or torch.float32
        how: dict[str, Any] = {"dtype": dtype, "score_seed": _score_seed(run.recipe)}
        return measure_movement(load_model(base, **how), load_model(str(folder), **how))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        run.problems.append(f"{run.name}: weight movement is left out: {first_line(error)}")
        return None


def _score_seed(recipe: dict[str, Any]) -> int | None:
    """Return the seed that a reward model's score was drawn from; None if the run made another model."""
    scores = recipe.get("loss", {}).get("name") == "reward"
    return int(recipe.get("run", {}).get("seed", 0)) if scores else None


def _describe(run: _RunFiles) -> str:
    """Describe the run in one line: method, model, data and learning rate."""
    model, data, settings, optimizer = (
        run.recipe.get(name, {}) for name in ("model", "data", "method", "optimizer")
    )
    method = ", ".join(
        f"{key} {value}" for key, value in settings.items() if key != "name" and value is not None
    )
    steps = run.metrics[-1]["step"] if run.metrics else 0
    state = "" if run.summary else f"; not finished, {plural(steps, 'step')} logged"
    return (
        f"{settings.get('name', 'unknown method')}{f' ({method})' if method else ''} of "
        f"{model.get('name', 'an unknown model')} on {describe_paths(data.get('train', 'unknown data'))}, "
        f"lr {optimizer.get('lr', 'unknown')}{state}"
    )


def _make_overview(runs: Sequence[_RunFiles]) -> Table:
    heads, rows, best = ["run"], [[run.name] for run in runs], set()
    for head, (key, text, pick) in COLUMNS.items():
        values = [run.summary.get(key) for run in runs]
        if all(value is None for value in values):
            continue
        if pick is not None:
            best |= {(row, len(heads)) for row in mark_best(values, pick)}
        heads.append(head)
        for row, value in zip(rows, values, strict=True):
            row.append("" if value is None else text(value))
    tasks = dict.fromkeys(name for run in runs for name in run.summary.get("scores", {}))
    for name in tasks:
        heads.append(name)
        for row, run in zip(rows, runs, strict=True):
            score = run.summary.get("scores", {}).get(name)
            row.append("" if score is None else score_text(score))
    return Table(heads, rows, frozenset(best))


def _list_texts(run: _RunFiles) -> list[tuple[str, str]]:
    environment = run.environment
    return [
        (f"{run.name}: recipe", yaml.dump(run.recipe) if run.recipe else "missing"),
        (f"{run.name}: command", " ".join(environment.get("command", [])) or "not recorded"),
        (f"{run.name}: environment", json.dumps(environment, indent=1, ensure_ascii=False)),
    ]
