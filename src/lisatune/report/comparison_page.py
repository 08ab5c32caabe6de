"""The page of a comparison."""

import json
from collections.abc import Callable
from pathlib import Path

from lisatune.compare.results import ArmResult, Results, RunResult, Spread
from lisatune.compare.tables import equal_time_table, overview
from lisatune.console import plural
from lisatune.files import yaml
from lisatune.report.figures import (
    BlockHistory,
    Entry,
    Table,
    block_history,
    make_figures,
    mark_best,
    read_metrics,
)
from lisatune.report.page import Page, group_samples

__all__ = ["comparison_page"]

Figure = tuple[Callable[[ArmResult], float | None], Callable[..., float]]

BEST: dict[str, Figure] = {
    "test loss": (lambda arm: _mean(arm["test_loss"]), min),
    "gain": (lambda arm: arm["gain_share"], max),
    "forgetting": (lambda arm: _mean(arm["forgetting"]), min),
    "peak memory": (lambda arm: _mean(arm["peak_bytes"]), min),
    "tensors in a step": (lambda arm: None if arm["memory"] is None else arm["memory"]["peak_bytes"], min),
    "to save": (lambda arm: arm["delta_bytes"], min),
    "tokens/s": (lambda arm: _mean(arm["tokens_per_second"]), max),
    "training time": (lambda arm: _mean(arm["train_seconds"]), min),
}
"""Columns of `overview` that have a best arm: its figure, and which is best."""


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread["mean"]


def comparison_page(results: Results, folder: Path, *, card_bytes: int | None = None) -> Page:
    """Gather a comparison.

    Args:
        results: what results.json holds.
        folder: where it lies; run folders are looked for there.
        card_bytes: as in `make_figures`.
    """
    problems = list(results["problems"])
    entries = [_entry(arm, results, folder, problems) for arm in results["arms"]]
    heads, rows = overview(results)
    best = {
        (row, heads.index(head))
        for head, (figure, pick) in BEST.items()
        if head in heads
        for row in mark_best([figure(arm) for arm in results["arms"]], pick)
    }
    data, before = results["data"], results["base"]["test_loss"]
    intro = [
        f"{results['recipe']['model']['name']} on {results['recipe']['data']['train']}: "
        f"{plural(data['train'], 'record')}, seeds {', '.join(map(str, results['seeds']))}. Learning rates "
        f"were chosen on {plural(data['validation'], 'validation record')}; the test loss is that of "
        f"{plural(data['test'], 'other record')}"
        + ("." if before is None else f", before training {before:.4f}.")
    ]
    return Page(
        title=f"Comparison {results['name']}",
        made=results["made"],
        intro=intro,
        problems=problems,
        overview=Table(heads, rows, frozenset(best)),
        overview_note="Mean ± standard deviation over seeds. Marked: the best of each column. gain: share of "
        f"the loss that {results['reference'] or 'the reference'} takes off. to save: touched tensors, or "
        "adapters. Time is that of training steps.",
        tables=[
            (f"At equal wall time: the end of {times['reference']}", Table(*equal_time_table(results, times)))
            for times in results["equal_time"]
        ],
        figures=make_figures(
            entries,
            loss="test loss",
            memory="tensors in a step",
            memory_note="Live tensors at the peak of one training step of its own, measured.",
            card_bytes=card_bytes,
        ),
        samples=group_samples(entries),
        texts=_texts(results),
    )


def _entry(arm: ArmResult, results: Results, folder: Path, problems: list[str]) -> Entry:
    runs = [
        run
        for run in results["runs"]
        if run["arm"] == arm["name"] and run["chosen"] and run["status"] == "done"
    ]
    memory = arm["memory"]
    first = runs[0] if runs else None
    return Entry(
        name=arm["name"],
        curves=[run["held_out"] for run in runs],
        loss=_mean(arm["test_loss"]),
        peak_bytes=_mean(arm["peak_bytes"]),
        memory=memory["at_peak"] if memory is not None else {},
        blocks=None if first is None else _blocks(first, folder, problems),
        movement=None if first is None else first.get("movement"),
        samples=[] if first is None else first["samples"],
    )


def _blocks(run: RunResult, folder: Path, problems: list[str]) -> BlockHistory | None:
    if run["visits"] is None:
        return None
    try:
        metrics, damaged = read_metrics(folder / run["folder"])
    except OSError:
        metrics, damaged = [], 0
        problems.append(
            f"{run['folder']}/metrics.jsonl is missing: which periods blocks trained in is left out"
        )
    if damaged:
        problems.append(f"{run['folder']}/metrics.jsonl has {plural(damaged, 'line')} that can't be read")
    return block_history(metrics, run["visits"])


def _texts(results: Results) -> list[tuple[str, str]]:
    arms = {
        arm["name"]: {"overrides": arm["overrides"], "lr": arm["lrs"], "chosen": arm["chosen_lr"]}
        for arm in results["arms"]
    }
    environment = results["environment"]
    return [
        ("Recipe that all arms start from", yaml.dump(results["recipe"])),
        ("Arms: what each changes in it", yaml.dump(arms)),
        ("Command", " ".join(environment.get("command", [])) or "not recorded"),
        (
            "Budget and data",
            yaml.dump({"budget": results["budget"], "seeds": results["seeds"], **results["data"]}),
        ),
        ("Environment", json.dumps(environment, indent=1, ensure_ascii=False)),
    ]
