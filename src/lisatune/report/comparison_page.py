"""The report of a comparison."""

import json
from collections.abc import Callable
from pathlib import Path

from lisatune.compare.results import ArmResult, Results, RunResult, Spread
from lisatune.compare.tables import describe_scores, make_equal_time_table, make_overview
from lisatune.console import plural
from lisatune.files import yaml
from lisatune.recipe.data import describe_paths
from lisatune.report.figures import (
    BlockHistory,
    Entry,
    Table,
    extract_block_history,
    make_figures,
    mark_best,
    read_metrics,
)
from lisatune.report.page import Page, group_samples

__all__ = ["make_comparison_page"]

BEST: dict[str, tuple[Callable[[ArmResult], float | None], Callable[..., float]]] = {
    "test loss": (lambda arm: _mean_of(arm["test_loss"]), min),
    "gain": (lambda arm: arm["gain_share"], max),
    "forgetting": (lambda arm: _mean_of(arm["forgetting"]), min),
    "peak memory": (lambda arm: _mean_of(arm["peak_bytes"]), min),
    "tensors in a step": (lambda arm: None if arm["memory"] is None else arm["memory"]["peak_bytes"], min),
    "to save": (lambda arm: arm["delta_bytes"], min),
    "tokens/s": (lambda arm: _mean_of(arm["tokens_per_second"]), max),
    "training time": (lambda arm: _mean_of(arm["train_seconds"]), min),
}
"""Columns of the overview that have a best arm: an arm's figure, and which figure is the best."""


def make_comparison_page(results: Results, folder: Path, *, card_bytes: int | None = None) -> Page:
    """Make the page of a comparison.

    Args:
        results: the content of results.json.
        folder: folder of the comparison, which holds the run folders.
        card_bytes: as in `make_figures`.
    """
    problems = list(results["problems"])
    entries = [_make_entry(arm, results, folder, problems) for arm in results["arms"]]
    heads, rows = make_overview(results)
    best = {
        (row, heads.index(head))
        for head, (figure, pick) in BEST.items()
        if head in heads
        for row in mark_best([figure(arm) for arm in results["arms"]], pick)
    }
    data, before = results["data"], results["base"]["test_loss"]
    intro = [
        f"{results['recipe']['model']['name']} on {describe_paths(results['recipe']['data']['train'])}: "
        f"{plural(data['train'], 'record')}, seeds {', '.join(map(str, results['seeds']))}. Learning rates "
        f"were chosen on {plural(data['validation'], 'validation record')}; the test loss is measured on "
        f"{plural(data['test'], 'other record')}"
        + ("." if before is None else f", before training {before:.4f}.")
    ]
    if text := describe_scores(results):
        intro.append(text)
    return Page(
        title=f"Comparison {results['name']}",
        made=results["made"],
        intro=intro,
        problems=problems,
        overview=Table(heads, rows, frozenset(best)),
        overview_note="Mean ± standard deviation over seeds. Marked: the best of each column. gain: how far "
        f"the test loss fell, as a share of {results['reference'] or 'the reference'}'s. to save: touched "
        "tensors, or adapters. Time is that of training steps.",
        tables=[
            (f"At equal wall time: the end of {times['reference']}", Table(*make_equal_time_table(times)))
            for times in results["equal_time"]
        ],
        figures=make_figures(
            entries,
            loss="test loss",
            memory_note="Live tensors at the peak of one separate training step, measured."
            if any(entry.memory for entry in entries)
            else "Peak memory of the whole run, undivided: it was not measured by category.",
            card_bytes=card_bytes,
        ),
        samples=group_samples(entries),
        texts=_list_texts(results),
    )


def _make_entry(arm: ArmResult, results: Results, folder: Path, problems: list[str]) -> Entry:
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
        loss=_mean_of(arm["test_loss"]),
        peak_bytes=_mean_of(arm["peak_bytes"]),
        memory=memory["at_peak"] if memory is not None else {},
        blocks=None if first is None else _read_blocks(first, folder, problems),
        movement=None if first is None else first.get("movement"),
        samples=[] if first is None else first["samples"],
    )


def _mean_of(spread: Spread | None) -> float | None:
    return None if spread is None else spread["mean"]


def _read_blocks(run: RunResult, folder: Path, problems: list[str]) -> BlockHistory | None:
    if run["visits"] is None:
        return None
    try:
        metrics, damaged = read_metrics(folder / run["folder"])
    except OSError:
        metrics, damaged = [], 0
        problems.append(
            f"{run['folder']}/metrics.jsonl is missing; the periods that blocks trained in are left out"
        )
    if damaged:
        problems.append(f"{run['folder']}/metrics.jsonl has {plural(damaged, 'line')} that cannot be read")
    return extract_block_history(metrics, run["visits"])


def _list_texts(results: Results) -> list[tuple[str, str]]:
    arms = {
        arm["name"]: {"overrides": arm["overrides"], "lr": arm["lrs"], "chosen": arm["chosen_lr"]}
        for arm in results["arms"]
    }
    environment = results["environment"]
    return [
        ("Recipe that all arms start from", yaml.dump(results["recipe"])),
        ("Arms and their changes to the recipe", yaml.dump(arms)),
        ("Command", " ".join(environment.get("command", [])) or "not recorded"),
        (
            "Budget and data",
            yaml.dump({"budget": results["budget"], "seeds": results["seeds"], **results["data"]}),
        ),
        ("Environment", json.dumps(environment, indent=1, ensure_ascii=False)),
    ]
