"""The page of run folders, as `lisatune train` leaves them, finished or not."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.compare.outcome import held_out_curve
from lisatune.console import byte_text, count_text, plural
from lisatune.files import yaml
from lisatune.report.figures import Entry, Table, block_history, make_figures, mark_best, read_metrics
from lisatune.report.page import Page, group_samples

__all__ = ["runs_page"]

Pick = Callable[..., float]


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
"""Columns of the overview: key of summary.json, its text, and which is best."""


@dataclass
class _Run:
    """What could be read of a run folder."""

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def runs_page(folders: Sequence[Path], *, card_bytes: int | None = None, weights: bool = True) -> Page:
    """Gather runs.

    Args:
        folders: run folders; of those that are missing or half written the page says so.
        card_bytes: as in `make_figures`.
        weights: whether to load models for the movement of their weights.

    Raises:
        FileNotFoundError: no folder is that of a run.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if not any(run.recipe for run in runs):
        raise FileNotFoundError(f"nothing to report: {'; '.join(p for run in runs for p in run.problems)}")
    found = [run for run in runs if run.recipe or run.metrics or run.summary]
    entries = [_entry(run, weights) for run in found]
    return Page(
        title=f"Run {found[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        intro=[f"{run.name}: {_words(run)}" for run in found],
        problems=[problem for run in runs for problem in run.problems],
        overview=_overview(found),
        overview_note="Loss is that of each run's own held-out records, in nats per token. "
        + (
            "Marked: the best of each column; runs on other data or lengths don't compare. "
            if found[1:]
            else ""
        )
        + "peak memory: of the process on a CPU, loading included, else allocated on the device.",
        tables=[],
        figures=make_figures(
            entries,
            loss="held-out loss",
            memory="tensors in a step",
            memory_note="By the run's plan. `lisatune compare` measures them."
            if any(entry.memory for entry in entries)
            else "Peak memory of the whole run, not split: there is no plan in its summary.",
            card_bytes=card_bytes,
        ),
        samples=group_samples(entries),
        texts=[text for run in found for text in _texts(run)],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Shortest ends of the paths that differ."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}; name each once")


def _read(folder: Path, name: str) -> _Run:
    run = _Run(name, folder)
    if not folder.is_dir():
        run.problems.append(f"{folder} is not there: name the folder of a run, as run.output says")
        return run
    if (text := _text(run, "recipe.yaml")) is not None:
        try:
            recipe = yaml.load(text)
        except ValueError:
            recipe = None
        if isinstance(recipe, dict) and all(isinstance(section, dict) for section in recipe.values()):
            run.recipe = recipe
        else:
            run.problems.append(f"{name}: recipe.yaml is damaged")
    for file in ("environment.json", "summary.json"):
        if (text := _text(run, file)) is not None:
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
        run.problems.append(f"{name}: metrics.jsonl is missing: there are no curves")
    else:
        if damaged:
            run.problems.append(f"{name}: metrics.jsonl has {plural(damaged, 'line')} that can't be read")
    return run


def _text(run: _Run, file: str) -> str | None:
    try:
        return (run.folder / file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        what = (
            "the run has not ended: there are no final figures" if file == "summary.json" else "is it a run?"
        )
        run.problems.append(f"{run.name}: {file} is missing; {what}")
        return None


def _entry(run: _Run, weights: bool) -> Entry:
    curve = held_out_curve(run.metrics)
    return Entry(
        name=run.name,
        curves=[curve],
        loss=run.summary.get("held_out_loss_after"),
        peak_bytes=run.summary.get("peak_bytes"),
        memory=run.summary.get("planned_at_peak", {}),
        blocks=block_history(run.metrics, run.summary.get("visits")),
        movement=_movement(run) if weights and run.recipe else None,
        samples=run.summary.get("samples", []),
    )


def _movement(run: _Run) -> list[float] | None:
    """Movement of the run's weights, where its model and the one it began with are on this disk."""
    folder, began = run.folder / "model", str(run.recipe.get("model", {}).get("name", ""))
    if (folder / "adapter_config.json").exists():
        return None
    if not folder.is_dir():
        run.problems.append(f"{run.name}: model is missing: weight movement is left out")
        return None
    if not Path(began).exists() and began != "smollm2-135m":
        run.problems.append(f"{run.name}: {began} is not on this disk: weight movement is left out")
        return None
    import torch

    from lisatune.lisa.statistics import block_movement
    from lisatune.models.load import load_model, stored_dtype

    try:
        # Of the written model: rounding to it is no movement.
        dtype = stored_dtype(str(folder)) or torch.float32
        return block_movement(load_model(began, dtype=dtype), load_model(str(folder), dtype=dtype))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        run.problems.append(f"{run.name}: weight movement is left out: {reason}")
        return None


def _words(run: _Run) -> str:
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
        f"{model.get('name', 'an unknown model')} on {data.get('train', 'unknown data')}, "
        f"lr {optimizer.get('lr', 'unknown')}{state}"
    )


def _overview(runs: Sequence[_Run]) -> Table:
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
    return Table(heads, rows, frozenset(best))


def _texts(run: _Run) -> list[tuple[str, str]]:
    environment = run.environment
    return [
        (f"{run.name}: recipe", yaml.dump(run.recipe) if run.recipe else "missing"),
        (f"{run.name}: command", " ".join(environment.get("command", [])) or "not recorded"),
        (f"{run.name}: environment", json.dumps(environment, indent=1, ensure_ascii=False)),
    ]
