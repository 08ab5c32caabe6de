"""The live table of a comparison: which run is in progress, and the validation loss of each finished one."""

import time
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lisatune.compare.arms import Comparison
from lisatune.compare.processes import Run
from lisatune.console import clock_text, plural, terminal

__all__ = ["Board"]


class Board:
    """A table of arms and runs, drawn again whenever something changes. Use it as a context manager.

    If the output is not a terminal, each run prints one line when it starts and one when it ends.
    """

    def __init__(self, comparison: Comparison, *, console: Console | None = None) -> None:
        self._console = console or terminal()
        self._arms = [arm.name for arm in comparison.arms]
        self._cells: dict[tuple[str, str], Text] = {}
        self._columns: list[str] = []
        self._running: tuple[Run, int] | None = None
        self._now = ""
        self._began = time.monotonic()
        self._live = (
            Live(console=self._console, auto_refresh=False, get_renderable=self._make_table)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def start(self, run: Run, steps: int) -> None:
        """Show that a run of `steps` steps starts or resumes."""
        self._running = run, steps
        self.say(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed}: {plural(steps, 'step')}")

    def end(self, run: Run) -> None:
        """Show the result of a run that has finished or failed."""
        self._running = None
        summary, reason = run.read_summary(), run.read_failure()
        if reason is not None:
            self._set_cell(run, Text("failed", style="bold red"))
            self.print(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed} failed: {reason}")
        elif summary is not None:
            loss = summary["held_out_loss_after"]
            self._set_cell(run, Text(f"{loss:.4f}", style="green"))
            if self._live is None:
                self.print(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed}: validation loss {loss:.4f}")
        self.refresh()

    def say(self, text: str) -> None:
        """Show the current activity."""
        self._now = text
        if self._live is None:
            self.print(text)
        self.refresh()

    def print(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(Text(text), soft_wrap=True)

    def refresh(self) -> None:
        """Look up the step that the run in progress has reached, and draw the table."""
        if self._live is None or not self._live.is_started:
            return
        if self._running is not None:
            run, steps = self._running
            self._set_cell(run, Text(f"{run.read_last_step()}/{steps}", style="cyan"))
        self._live.refresh()

    def _set_cell(self, run: Run, text: Text) -> None:
        column = f"lr {run.lr:g}, seed {run.seed}"
        if column not in self._columns:
            self._columns.append(column)
        self._cells[run.arm.name, column] = text

    def _make_table(self) -> Table:
        clock = clock_text(time.monotonic() - self._began)
        # As Text, because an arm such as lora:targets=[q_proj] would read as markup.
        table = Table(box=box.ROUNDED, title=Text(f"{clock} · {self._now}"), title_justify="left")
        table.add_column("validation loss", style="cyan")
        for column in self._columns:
            table.add_column(column, justify="right")
        for arm in self._arms:
            table.add_row(Text(arm), *(self._cells.get((arm, column), "") for column in self._columns))
        return table
