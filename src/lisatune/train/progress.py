"""The terminal during and after a run.

This file turns plain data into Rich output and decides nothing. Lines have at most 100 columns. If the output
is not a terminal, the live line becomes one plain line for each update, without colour.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lisatune.console import byte_text, clock_text, grid, plural, ranges_text, terminal, time_left
from lisatune.evaluate.scores import score_text
from lisatune.runs.summary import Sample, Summary

__all__ = ["Bar", "print_finished", "print_summary"]

LONGEST_SAMPLE = 400

SECONDS_BETWEEN_LINES = 30
"""Seconds between two lines on an evaluation, where the output is not a terminal."""


class Bar:
    """The line that moves while a run trains. Use as a context manager.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before this process began.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, console: Console | None = None) -> None:
        self._console = console or terminal()
        self._total, self._start = total_steps, start_step
        self._began = time.monotonic()
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                BarColumn(bar_width=16, complete_style="cyan", finished_style="green"),
                TextColumn("{task.completed}/{task.total} {task.description}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens_per_second: float,
        active_blocks: Sequence[int] | None = None,
        resident_bytes: int,
        mfu: float | None = None,
        **unshown: Any,
    ) -> None:
        """Show the progress after optimizer step `step` (1 is the first). Takes a line of metrics.jsonl."""
        done = step - self._start
        rest = time_left(time.monotonic() - self._began, done / (self._total - self._start))
        facts = [f"loss {loss:.3f}", f"lr {lr:.1e}", f"{tokens_per_second:,.0f} tok/s"]
        if mfu is not None:
            facts.append(f"{mfu:.0%} MFU")
        if active_blocks is not None:
            facts.append(f"blocks {ranges_text(active_blocks)}")
        facts.append(byte_text(resident_bytes))
        if self._progress is None:
            width = len(str(self._total))
            self._say(f"step {step:>{width}}/{self._total}  {'  '.join([*facts, rest])}")
        else:  # a narrow terminal cuts the end of the line off
            text = "· " + " · ".join([rest, *facts])
            self._progress.update(self._task, completed=step, description=text)

    @contextmanager
    def follow(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Show how far something is that a step waits for, such as an evaluation.

        Args:
            what: its name.
            total: number of its parts.

        Yields:
            A function to call after each part. If the output is not a terminal, a line is printed for the
            parts done in each half minute, so that a short evaluation prints none.
        """
        began = said = time.monotonic()
        done = 0
        task = None if self._progress is None else self._progress.add_task(f"· {what}", total=total)

        def advance() -> None:
            nonlocal said, done
            done += 1
            if self._progress is not None and task is not None:
                self._progress.advance(task)
            elif (now := time.monotonic()) - said >= SECONDS_BETWEEN_LINES:
                said = now
                self._say(f"{what}: {done} of {total} batches, {time_left(now - began, done / total)}")

        try:
            yield advance
        finally:
            if self._progress is not None and task is not None:
                self._progress.remove_task(task)

    def print(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self._progress is None:
            self._say(text)
        else:
            self._progress.console.print(Text(text))

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def start_clock(self) -> None:
        """Begin to count the time of steps, from which the time left is known."""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def print_finished(output: Path, summary: Summary) -> None:
    """Say that a run needs no more steps, and print its result."""
    console = terminal()
    text = f"the run in {output} is finished; for more steps give a larger run.steps or run.epochs"
    console.print(Text(text), soft_wrap=True)
    print_summary(summary, console)


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the result of a run."""
    console = console or terminal()
    rows = _quality_rows(summary)
    if "stream" in summary:
        rows.append(("stream", summary["stream"]))
    if "best_step" in summary:
        last = f"; the last step's held-out loss is {summary['held_out_loss_last']:.3f}"
        is_last = summary["best_step"] == summary["steps"]
        best = f"step {summary['best_step']:,} of {summary['steps']:,}, whose model was written"
        rows.append(("best", best + ("" if is_last else last)))
    if "planned_steps" in summary:
        ended = f"after step {summary['steps']:,} of {summary['planned_steps']:,}"
        rows.append(("stopped", f"{ended}: the held-out loss no longer fell (run.stop_after)"))
    if "steps" in summary and "train_seconds" in summary:
        speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in summary else ""
        rows.append(
            ("time", f"{clock_text(summary['train_seconds'])} for {plural(summary['steps'], 'step')}{speed}")
        )
    if "compile_seconds" in summary:
        rows.append(("compiling", f"{clock_text(summary['compile_seconds'])} before the first step"))
    if summary.get("skipped_steps"):
        rows.append(("skipped", f"{plural(summary['skipped_steps'], 'step')}: loss or gradients not finite"))
    if summary.get("failed_saves"):
        rows.append(("not saved", f"{plural(summary['failed_saves'], 'checkpoint')}: see the lines above"))
    if "peak_bytes" in summary:
        rows.append(("peak memory", byte_text(summary["peak_bytes"])))
    if "planned_bytes" in summary:
        rows.append(("memory plan", _plan_text(summary)))
    if "peak_state_bytes" in summary:
        state = f"{byte_text(summary['peak_state_bytes'])} at most"
        if "peak_state_elements" in summary and "peak_trainable" in summary:
            state += (
                f": {summary['peak_state_elements']:,} numbers for {summary['peak_trainable']:,} parameters"
            )
        rows.append(("optimizer state", state))
    if "proof" in summary:
        rows.append(("proof", summary["proof"]))
    if "model" in summary:
        dtype = f", in {summary['model_dtype']}" if "model_dtype" in summary else ""
        rows.append(("model", summary["model"] + dtype))
    for sample in summary.get("samples", []):
        console.print(_answers(sample))
    console.print(
        Panel(grid(rows), title="result", title_align="left", border_style="green", box=box.ROUNDED)
    )


def _quality_rows(summary: Summary) -> list[tuple[str, str | Text]]:
    """Say how good the model was before and after training."""
    rows: list[tuple[str, str | Text]] = []
    if "held_out_loss_before" in summary and "held_out_loss_after" in summary:
        before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
        style = "bold green" if after < before else "bold red"
        loss = Text.assemble(f"{before:.3f} → ", (f"{after:.3f}", style), f" ({after - before:+.3f})")
        rows.append(("held-out loss", loss))
        if "held_out_margin_after" not in summary:  # the loss of a pair is of no token
            rows.append(("perplexity", f"{_perplexity(before)} → {_perplexity(after)}"))
    if "held_out_accuracy_before" in summary and "held_out_accuracy_after" in summary:
        shares = [100 * summary["held_out_accuracy_before"], 100 * summary["held_out_accuracy_after"]]
        rows.append(("pairs in order", f"{shares[0]:.1f} % → {shares[1]:.1f} %"))
    if "held_out_margin_before" in summary and "held_out_margin_after" in summary:
        margins = summary["held_out_margin_before"], summary["held_out_margin_after"]
        rows.append(("margin", f"{margins[0]:.3f} → {margins[1]:.3f}"))
    for name, score in summary.get("scores", {}).items():
        rows.append((name, f"{score_text(score)} {score['metric']}, {plural(score['items'], 'question')}"))
    losses_before = summary.get("held_out_loss_by_source_before", {})
    for name, after in summary.get("held_out_loss_by_source_after", {}).items():
        rows.append((f"  {name}", f"{losses_before.get(name, math.nan):.3f} → {after:.3f}"))
    return rows


def _plan_text(summary: Summary) -> str:
    planned, measured = summary["planned_bytes"], summary["measured_bytes"]
    text = f"{byte_text(planned)} of tensors in a step ({summary['plan']}); "
    if summary["measured"] == "tensors in a step":
        return text + f"measured {byte_text(measured)}, {measured / planned - 1:+.1%}"
    return (
        text + f"resident memory grew by {byte_text(measured)}, evaluation, libraries and allocator included"
    )


def _answers(sample: Sample) -> Padding:
    answers = grid(
        [
            ("before", Text(_short(sample["before"]), style="dim")),
            ("after", _short(sample["after"])),
            ("reference", Text(_short(sample["reference"]), style="italic")),
        ]
    )
    return Padding(Group(Text(_short(sample["prompt"]), style="bold"), answers), (0, 1, 1, 1))


def _short(text: str) -> str:
    """Cut a model's text to a few lines, and remove the control characters that a terminal would obey."""
    clean = "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text.strip())
    return clean if len(clean) <= LONGEST_SAMPLE else clean[:LONGEST_SAMPLE].rstrip() + " …"


def _perplexity(loss: float) -> str:
    return "∞" if loss >= 50 else f"{math.exp(loss):,.1f}"
