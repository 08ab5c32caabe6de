"""What a run says on the terminal: a live line during, the outcome after. For before: `lisatune.outline`.

Plain data in, Rich output out, nothing decided here. At most 100 columns. Where the output is no
terminal, the live line becomes one plain line for each update, and there is no colour.
"""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypedDict

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "Bar",
    "Sample",
    "Summary",
    "byte_text",
    "count_text",
    "grid",
    "plural",
    "print_summary",
    "ranges_text",
    "terminal",
]

WIDEST = 100
LONGEST_SAMPLE = 400


class Sample(TypedDict):
    """A held-out question and what the model answers to it."""

    prompt: str
    reference: str
    """What the held-out record answers."""
    before: str
    after: str


class Summary(TypedDict, total=False):
    """Figures a run ended with, as in summary.json. What is absent is not printed."""

    steps: int
    tokens: int
    """Tokens trained on, padding left out."""
    skipped_steps: int
    failed_saves: int
    """Checkpoints that could not be written."""
    train_seconds: float
    compile_seconds: float
    """Wall time of compiling the blocks, before the first step; not part of train_seconds."""
    tokens_per_second: float
    held_out_loss_before: float
    held_out_loss_after: float
    peak_bytes: int
    """Most memory in use: resident, or the accelerator's."""
    planned_bytes: int
    """Most bytes of tensors in a training step, by the plan."""
    planned_at_peak: dict[str, int]
    """The same by category."""
    plan: str
    """How that was planned: traced, or arithmetic."""
    measured_bytes: int
    measured: str
    """What measured_bytes is: tensors in a step, or growth of resident memory."""
    peak_state_bytes: int
    peak_state_elements: int
    peak_trainable: int
    """Most parameters that trained at once."""
    visits: list[int]
    """In how many periods each block trained."""
    proof: str
    samples: list[Sample]
    model: str
    """Folder of the fine-tuned model."""


def terminal() -> Console:
    """Make a console on standard output, no wider than 100 columns."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST) if console.is_terminal else WIDEST
    return console


def count_text(count: float) -> str:
    """Write a count in short: 134.5M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.99995 * limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"


def byte_text(num_bytes: float) -> str:
    """Write bytes in GiB, MiB or KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


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
        **unshown: Any,
    ) -> None:
        """Show the state after optimizer step `step` (1 is the first). Takes a line of metrics.jsonl."""
        done = step - self._start
        left = (time.monotonic() - self._began) / done * (self._total - step) if done > 0 else math.nan
        facts = [f"loss {loss:.3f}", f"lr {lr:.1e}", f"{tokens_per_second:,.0f} tok/s"]
        if active_blocks is not None:
            facts.append(f"blocks {ranges_text(active_blocks)}")
        facts += [byte_text(resident_bytes), f"{_clock(left)} left"]
        if self._progress is None:
            width = len(str(self._total))
            self._say(f"step {step:>{width}}/{self._total}  {'  '.join(facts)}")
        else:
            self._progress.update(self._task, completed=step, description="· " + " · ".join(facts))

    def print(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self._progress is None:
            self._say(text)
        else:
            self._progress.console.print(Text(text))

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print what came out of a run."""
    console = console or terminal()
    rows: list[tuple[str, str | Text]] = []
    if "held_out_loss_before" in summary and "held_out_loss_after" in summary:
        before, after = summary["held_out_loss_before"], summary["held_out_loss_after"]
        style = "bold green" if after < before else "bold red"
        loss = Text.assemble(f"{before:.3f} → ", (f"{after:.3f}", style), f" ({after - before:+.3f})")
        rows.append(("held-out loss", loss))
        rows.append(("perplexity", f"{_perplexity(before)} → {_perplexity(after)}"))
    if "steps" in summary and "train_seconds" in summary:
        speed = f", {summary['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in summary else ""
        rows.append(
            ("time", f"{_clock(summary['train_seconds'])} for {plural(summary['steps'], 'step')}{speed}")
        )
    if "compile_seconds" in summary:
        rows.append(("compiling", f"{_clock(summary['compile_seconds'])} before the first step"))
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
        rows.append(("model", summary["model"]))
    for sample in summary.get("samples", []):
        console.print(_answers(sample))
    console.print(
        Panel(grid(rows), title="result", title_align="left", border_style="green", box=box.ROUNDED)
    )


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


def grid(rows: Sequence[tuple[str, str | Text]]) -> Table:
    """Lay out names and what they stand for in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return table


def _short(text: str) -> str:
    """Cut a model's text to a few lines, without characters that a terminal would obey."""
    clean = "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text.strip())
    return clean if len(clean) <= LONGEST_SAMPLE else clean[:LONGEST_SAMPLE].rstrip() + " …"


def ranges_text(numbers: Sequence[int]) -> str:
    """Write rising numbers in short: 0–3 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs]
    return " ".join(texts) or "none"


def plural(count: int, word: str) -> str:
    """Write a count with its word: 1 row, 2 rows."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _perplexity(loss: float) -> str:
    return "∞" if loss >= 50 else f"{math.exp(loss):,.1f}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
