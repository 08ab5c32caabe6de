"""Methods side by side on the same records, learning rates chosen on one slice and judged on another.

Order: the base model's losses; for each arm a run for each learning rate with the first seed, the choice by
validation loss, the chosen run's test loss; then the other seeds at the chosen rate. Every run is a process;
what is finished is not done again.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lisatune.compare.arms import Comparison, check_folder, claim
from lisatune.compare.measure import Measured
from lisatune.compare.outcome import build_results, choose, runs_of
from lisatune.compare.processes import FailedError, Run, measure_base, measure_run, train_run
from lisatune.compare.results import Data, Results
from lisatune.compare.slices import Lengths, data_of_runs, read_slices, write_slices
from lisatune.compare.tables import markdown
from lisatune.console import plural, terminal
from lisatune.files import yaml
from lisatune.files.disk import replace_file, take_lock
from lisatune.models.hf import check_attention
from lisatune.recipe import DataConfig

__all__ = ["Board", "compare"]


class Board:
    """The table that moves while a comparison runs. Use as a context manager.

    Where the output is no terminal, each run gives a line when it starts and one when it ends.
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
            Live(console=self._console, refresh_per_second=4, get_renderable=self._table)
            if self._console.is_terminal
            else None
        )

    def start(self, run: Run, steps: int) -> None:
        """A run of so many steps begins, or goes on."""
        self._running = run, steps
        self.say(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed}: {plural(steps, 'step')}")
        self.refresh()

    def end(self, run: Run) -> None:
        """The run is done or has failed."""
        self._running = None
        summary, reason = run.summary, run.failed
        if reason is not None:
            self._cell(run, Text("failed", style="bold red"))
            self.print(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed} failed: {reason}")
        elif summary is not None:
            loss = summary["held_out_loss_after"]
            self._cell(run, Text(f"{loss:.4f}", style="green"))
            if self._live is None:
                self.print(f"{run.arm.name}, lr {run.lr:g}, seed {run.seed}: validation loss {loss:.4f}")

    def say(self, text: str) -> None:
        """What is being done now."""
        self._now = text
        if self._live is None:
            self.print(text)

    def refresh(self) -> None:
        """Look at how far the run in progress has come."""
        if self._running is None or self._live is None:
            return
        run, steps = self._running
        lines = run.metrics()[-1:]
        self._cell(run, Text(f"{lines[0]['step'] if lines else 0}/{steps}", style="cyan"))

    def draw(self) -> None:
        """Draw the table now, not only four times a second."""
        if self._live is not None:
            self._live.refresh()

    def _cell(self, run: Run, text: Text) -> None:
        column = f"lr {run.lr:g}, seed {run.seed}"
        if column not in self._columns:
            self._columns.append(column)
        self._cells[run.arm.name, column] = text

    def _table(self) -> Table:
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        table = Table(box=box.ROUNDED, title=f"{minutes}:{seconds:02} · {self._now}", title_justify="left")
        table.add_column("validation loss", style="cyan")
        for column in self._columns:
            table.add_column(column, justify="right")
        for arm in self._arms:
            table.add_row(arm, *(self._cells.get((arm, column), "") for column in self._columns))
        return table

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def compare(
    comparison: Comparison, output: str | Path, *, keep_models: bool = False, retry_failed: bool = False
) -> Results:
    """Make all runs that are missing, and write results.json and results.md.

    Args:
        comparison: what to compare.
        output: folder; one with a comparison in it is gone on with. Arms, learning rates and seeds may have
            been added since.
        keep_models: keep the models of chosen runs, which are deleted once they are measured.
        retry_failed: make failed runs again.

    Raises:
        ValueError, FileNotFoundError: the data can't be used, the folder holds another comparison or
            something else, or an arm would train on other records per step than the rest.
        RuntimeError: another process works in the folder.
        KeyboardInterrupt: Ctrl-C, after the run in progress has saved a checkpoint.
    """
    output = Path(output).absolute()  # runs may be gone on with from elsewhere
    check_folder(output, comparison)
    check_attention(comparison.recipe.model.attention)
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(output / ".lock")
    except RuntimeError as error:
        raise RuntimeError(
            str(error).replace("run folder", "comparison").replace("another run.output", "another --output")
        ) from None
    try:
        return _compare(comparison, output, lock, keep_models, retry_failed)
    finally:
        os.close(lock)


def _compare(
    comparison: Comparison, output: Path, lock: int, keep_models: bool, retry_failed: bool
) -> Results:
    slices, runs = output / "data", output / "runs"
    if not slices.exists() or not (output / "compare.json").exists():
        write_slices(comparison, slices)
    data = read_slices(slices)
    config = data_of_runs(comparison.recipe.data, slices)
    lengths = _lengths(comparison, config)
    claim(output, comparison, data)
    runs.mkdir(exist_ok=True)
    board = Board(comparison)
    work = _Work(comparison, output, runs, config, lengths, lock, board, data, keep_models, retry_failed)
    try:
        with board:
            work.outline()
            work.measure_base()
            work.choose_learning_rates()
            work.repeat_with_seeds()
    except KeyboardInterrupt as stop:
        results = work.write()
        done = sum(run["status"] == "done" for run in results["runs"])
        way_on = f"stopped, {done} of {len(results['runs'])} runs are done; go on with the same command"
        raise type(stop)(stop.args[0] if stop.args else way_on) from None
    return work.write()


@dataclass
class _Work:
    """What the stages share."""

    comparison: Comparison
    output: Path
    runs: Path
    data_config: DataConfig
    lengths: dict[int, list[int]]
    lock: int
    board: Board
    data: Data
    keep_models: bool
    retry_failed: bool
    base: Measured | None = None

    def outline(self) -> None:
        """Say how much there is to do."""
        arms, seeds = self.comparison.arms, self.comparison.seeds
        first = self.lengths[seeds[0]]
        num_runs = sum(len(arm.lrs) + len(seeds) - 1 for arm in arms)
        self.board.print(
            f"{plural(len(arms), 'arm')}, {plural(num_runs, 'run')} of {plural(len(first), 'step')} and "
            f"{first[-1]:,} tokens; {plural(self.data['validation'], 'record')} to choose learning rates by, "
            f"{self.data['test']:,} to report"
        )

    def measure_base(self) -> None:
        """Take the losses of the model before training."""
        recipe = replace(self.comparison.recipe, data=self.data_config)
        file = self.runs / "base.yaml"
        replace_file(file, yaml.dump(recipe.as_dict()))
        self.board.say("the model before training")
        try:
            self.base = measure_base(file, self._slices, self.board.refresh, self.lock)
        except FailedError as error:
            raise RuntimeError(f"the model before training can't be measured: {error}") from None

    def choose_learning_rates(self) -> None:
        """Make the first seed's runs, and measure the one with the best learning rate."""
        first = self.comparison.seeds[0]
        for arm in self.comparison.arms:
            runs = runs_of(arm, first, self.runs)
            for run in runs:
                self._train(run)
            while (chosen := choose(arm, first, self.runs)) is not None:
                run = Run(arm, chosen, first, self.runs)
                self._measure(run, with_memory=True)
                if run.failed is None:
                    break
            for run in runs:
                if run.lr != chosen:
                    run.drop_model()
            self.write()

    def repeat_with_seeds(self) -> None:
        """Make the chosen learning rates' runs with the other seeds."""
        for seed in self.comparison.seeds[1:]:
            for arm in self.comparison.arms:
                chosen = choose(arm, self.comparison.seeds[0], self.runs)
                if chosen is not None:
                    run = Run(arm, chosen, seed, self.runs)
                    self._train(run)
                    self._measure(run, with_memory=False)
                    self.write()

    def write(self) -> Results:
        """Write results.json and results.md as far as they go."""
        results = build_results(self.comparison, self.runs, self.data, self.base or Measured())
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        replace_file(self.output / "results.json", text + "\n")
        replace_file(self.output / "results.md", markdown(results))
        self.board.refresh()
        return results

    def _train(self, run: Run) -> None:
        if run.failed is not None and self.retry_failed:
            run.forget()
        if run.failed is not None or run.summary is not None:
            self.board.end(run)
            return
        totals = self.lengths[run.seed]
        recipe = run.write_recipe(
            self.data_config,
            base_seed=self.comparison.seeds[0],
            steps=len(totals),
            evaluations=self.comparison.evaluations,
        )
        self.board.start(run, len(totals))
        try:
            train_run(run, recipe, self.board.refresh, self.lock)
            _check_tokens(run, totals)
        except FailedError as error:
            run.fail(str(error))
        self.board.end(run)

    def _measure(self, run: Run, *, with_memory: bool) -> None:
        if run.failed is not None or run.measured is not None:
            return
        if not (run.folder / "model").exists():  # its learning rate wasn't the best one before
            run.forget()
            self._train(run)
            if run.failed is not None:
                return
        self.board.say(f"measuring {run.arm.name}, lr {run.lr:g}, seed {run.seed}")
        try:
            recipe, poll = run.beside(".yaml"), self.board.refresh
            measure_run(run, recipe, self._slices, poll, self.lock, with_memory=with_memory)
        except FailedError as error:
            run.fail(f"its model can't be measured: {error}")
        if not self.keep_models:
            run.drop_model()

    @property
    def _slices(self) -> dict[str, str]:
        files = {name: self.output / "data" / f"{name}.jsonl" for name in ("test", "general")}
        return {name: str(file) for name, file in files.items() if file.exists()}


def _lengths(comparison: Comparison, config: DataConfig) -> dict[int, list[int]]:
    """Tokens after each step by seed, the same for every arm."""
    lengths = Lengths(replace(comparison.recipe, data=config), comparison.budget)
    totals = {seed: lengths.of(seed) for seed in comparison.seeds}
    base = (comparison.recipe.run.batch_size, comparison.recipe.run.accumulation)
    for arm in comparison.arms:
        if (arm.recipe.run.batch_size, arm.recipe.run.accumulation) == base:
            continue
        own = Lengths(replace(arm.recipe, data=config), {"steps": len(totals[comparison.seeds[0]])})
        for seed, expected in totals.items():
            if own.of(seed)[: len(expected)] != expected:
                raise ValueError(
                    f"arm {arm.name!r} would train on other records in a step than the rest; let "
                    f"run.batch_size × run.accumulation be {base[0]} × {base[1]} in sum, or set it for all"
                )
    return totals


def _check_tokens(run: Run, totals: list[int]) -> None:
    """Hold what the run logged against what every run with its seed must train on."""
    logged = [line["tokens"] for line in run.metrics() if "tokens" in line]
    if logged != totals:
        step = next(
            (step for step, pair in enumerate(zip(logged, totals, strict=False), 1) if pair[0] != pair[1]),
            min(len(logged), len(totals)),
        )
        raise FailedError(
            f"it trained on other records than the rest: after step {step} it logged "
            f"{logged[step - 1] if step else 0} tokens in {len(logged)} steps, due are "
            f"{totals[step - 1]} in {len(totals)}"
        )
