"""An evaluation on the terminal: how far it is, and its scores as a table."""

import time
from collections.abc import Mapping
from typing import Any

from lisatune.console import grid, plural, terminal, time_left
from lisatune.evaluate.benchmark import Progress
from lisatune.evaluate.scores import figure_text, is_share
from lisatune.evaluate.tasks import OpenTask

__all__ = ["ScoreLines", "print_scores"]

SECONDS_BETWEEN_LINES = 10
"""Seconds between two lines on how far a task is."""


class ScoreLines(Progress):
    """Says how far an evaluation is, at most every few seconds."""

    def __init__(self, model: str, num_tasks: int) -> None:
        self._console, self._of, self._task = terminal(), num_tasks, 0
        self._console.print(f"evaluating {model}", soft_wrap=True, markup=False)

    def begin(self, task: OpenTask, *, done: int, questions: int) -> None:
        self._task += 1
        self._kept, self._done, self._questions = done, float(done), questions
        self._began = self._said = time.monotonic()
        text = f"[{self._task}/{self._of}] {task.name}: {plural(questions, 'question')}"
        text += f", {done:,} of them scored before" if done else ""
        for note in task.notes:
            text += f"; {note}"
        self._console.print(text, soft_wrap=True, markup=False)

    def advance(self, questions: float) -> None:
        self._done += questions
        now = time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            share = (self._done - self._kept) / (self._questions - self._kept)
            rest = time_left(now - self._began, share)
            self._console.print(f"    {self._done:,.0f} of {self._questions:,}, {rest}")


def print_scores(evaluation: Mapping[str, Any]) -> None:
    """Print a row for each metric of each task, and below it what the scores were made with."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    differences = evaluation.get("differences", {})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "shots", "items", "metric"):
        table.add_column(name, justify="right" if name in ("shots", "items") else "left")
    table.add_column("score", justify="right")
    if differences:
        table.add_column("base", justify="right")
        table.add_column("difference", justify="right")
    rows_of = {
        each: score
        for name, whole in evaluation["tasks"].items()
        for each, score in ({name: whole} if whole["metrics"] else whole.get("subtasks", {})).items()
    }  # a tag of the harness has no average
    for name, score in rows_of.items():
        settings = score["settings"]
        first = [name, str(settings["shots"]), f"{score['items']:,}"]
        for key, metric in score["metrics"].items():
            row = [*first, key, figure_text(key, metric["value"], metric["stderr"])]
            if differences:
                gain = differences.get(name, {}).get(key)
                row += (
                    ["", ""]
                    if gain is None
                    else [
                        figure_text(key, metric["value"] - gain["value"]),
                        figure_text(key, gain["value"], gain["stderr"], sign="+"),
                    ]
                )
            table.add_row(*map(Text, row))
            first = ["", "", ""]
    console = terminal()
    console.print(table)
    facts = evaluation["model"]
    templates = {score["settings"]["chat_template"] for score in evaluation["tasks"].values()}
    template = " and ".join("chat template" if each else "no chat template" for each in sorted(templates))
    versions = ", ".join(
        f"{name} {score['settings']['version']}" for name, score in evaluation["tasks"].items()
    )
    names = dict.fromkeys(key for score in rows_of.values() for key in score["metrics"])
    others = ", ".join(key for key in names if not is_share(key))
    rows = [
        ("scores", "in percent ± one standard error" + (f"; {others} as they are" if others else "")),
        ("made with", f"{evaluation['harness']}; {facts['dtype']} on {facts['device']}; {template}"),
        ("task versions", versions),
    ]
    if differences:
        rows.append(("difference", "score less base; its error is of the differences question by question"))
    for name, score in evaluation["tasks"].items():
        rows += [(name, text) for text in (score["about"], *score["notes"]) if text]
        if cut := score["settings"]["cut"]:
            rows.append((name, f"{plural(cut, 'prompt')} too long for the model lost the beginning"))
    console.print(grid(rows))
