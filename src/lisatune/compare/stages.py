"""Compare methods on the same records: choose learning rates on one slice, report losses of another.

Stages: first the losses of the model before training. Then, with the first seed, each arm trains with every
learning rate, the validation loss chooses one, and the chosen run is measured. Then the other seeds train at
the chosen learning rate. Every run is a process, and a finished run is not repeated.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from lisatune.compare.arms import Comparison, check_folder, claim_folder, fix_date
from lisatune.compare.board import Board
from lisatune.compare.measure import Measured
from lisatune.compare.outcome import build_results, choose_lr, list_runs
from lisatune.compare.processes import (
    CONTINUE_HINT,
    NOT_FINITE,
    FailedError,
    Run,
    measure_base,
    measure_run,
    train_run,
)
from lisatune.compare.results import Results, Slices
from lisatune.compare.slices import Lengths, read_slices, use_slices, write_slices
from lisatune.compare.tables import format_markdown
from lisatune.console import plural
from lisatune.files import yaml
from lisatune.files.disk import explain_write_errors, replace_file, take_lock
from lisatune.models.hf import check_attention
from lisatune.recipe import DataConfig
from lisatune.train.benchmarks import check_tasks

__all__ = ["compare"]


def compare(
    comparison: Comparison, output: str | Path, *, keep_models: bool = False, retry_failed: bool = False
) -> Results:
    """Make all missing runs, and write results.json and results.md.

    Args:
        comparison: what to compare.
        output: folder. A comparison in it is continued, and may have got new arms, learning rates and seeds.
        keep_models: keep the models of chosen runs, which are otherwise deleted after they are measured.
        retry_failed: repeat failed runs.

    Raises:
        ValueError, FileNotFoundError: the data cannot be used, the folder holds another comparison or
            other files, an arm would train on other records per step than the rest, or `run.stop_after` could
            end runs early.
        RuntimeError: another process works in the folder.
        OSError: the folder cannot be written.
        KeyboardInterrupt: Ctrl-C, after the run in progress has saved a checkpoint.
    """
    output = Path(output).absolute()  # so that it may continue from another working directory
    if (stop_after := comparison.recipe.run.stop_after) is not None:
        raise ValueError(
            f"run.stop_after={stop_after} could end runs at different steps, and a comparison gives all of "
            "them the same tokens; set it to null"
        )
    comparison = fix_date(comparison, output)
    check_folder(output, comparison)
    check_attention(comparison.recipe.model.attention)
    if comparison.evaluate is not None:
        check_tasks(comparison.evaluate, comparison.evaluate_data)
    with explain_write_errors(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
        lock = take_lock(output / ".lock", what="comparison", option="--output")
    try:
        return _compare(comparison, output, lock, keep_models, retry_failed)
    finally:
        os.close(lock)


def _compare(
    comparison: Comparison, output: Path, lock: int, keep_models: bool, retry_failed: bool
) -> Results:
    data, runs = output / "data", output / "runs"
    if not data.exists() or not (output / "compare.json").exists():
        write_slices(comparison, data)
    slices = read_slices(data)
    config = use_slices(comparison.recipe.data, data)
    lengths = _count_tokens(comparison, config)
    claim_folder(output, comparison, slices)
    runs.mkdir(exist_ok=True)
    board = Board(comparison)
    work = _Work(comparison, output, runs, config, lengths, lock, board, slices, keep_models, retry_failed)
    try:
        with board:
            work.print_outline()
            work.measure_base()
            work.choose_learning_rates()
            work.repeat_with_seeds()
    except KeyboardInterrupt as stop:
        results = work.write()
        done = sum(run["status"] == "done" for run in results["runs"])
        hint = f"stopped, {done} of {len(results['runs'])} runs are done; {CONTINUE_HINT}"
        raise type(stop)(stop.args[0] if stop.args else hint) from None
    return work.write()


@dataclass
class _Work:
    """The stages of a comparison, and what they share."""

    comparison: Comparison
    output: Path
    runs: Path
    data_config: DataConfig
    """The section `data` of every run."""
    lengths: dict[int, list[int]]
    """Tokens trained on up to each step, by seed."""
    lock: int
    board: Board
    slices: Slices
    keep_models: bool
    retry_failed: bool
    base: Measured | None = None

    def print_outline(self) -> None:
        """Print how much there is to do."""
        arms, seeds = self.comparison.arms, self.comparison.seeds
        first = self.lengths[seeds[0]]
        num_runs = sum(len(arm.lrs) + len(seeds) - 1 for arm in arms)
        self.board.print(
            f"{plural(len(arms), 'arm')}, {plural(num_runs, 'run')} of {plural(len(first), 'step')} and "
            f"{first[-1]:,} tokens; {plural(self.slices['validation'], 'record')} to choose learning rates, "
            f"{self.slices['test']:,} to report"
        )

    def measure_base(self) -> None:
        """Measure the losses of the model before training."""
        recipe = replace(self.comparison.recipe, data=self.data_config)
        file = self.runs / "base.yaml"
        replace_file(file, yaml.dump(recipe.as_dict()))
        self.board.say("measuring the model before training")
        try:
            self.base = measure_base(file, self._slice_files, self._tasks, self.board.refresh, self.lock)
        except FailedError as error:
            raise RuntimeError(f"the model before training cannot be measured: {error}") from None

    def choose_learning_rates(self) -> None:
        """Make the runs of the first seed, and measure the one with the best learning rate."""
        first = self.comparison.seeds[0]
        for arm in self.comparison.arms:
            runs = list_runs(arm, first, self.runs)
            for run in runs:
                self._train(run)
            while (chosen := choose_lr(arm, first, self.runs)) is not None:
                run = Run(arm, chosen, first, self.runs)
                self._measure(run, with_memory=True)
                if run.read_failure() is None:
                    break
            for run in runs:
                if run.lr != chosen:
                    run.drop_model()
            self.write()

    def repeat_with_seeds(self) -> None:
        """Make the runs of the other seeds at the chosen learning rates."""
        for seed in self.comparison.seeds[1:]:
            for arm in self.comparison.arms:
                chosen = choose_lr(arm, self.comparison.seeds[0], self.runs)
                if chosen is not None:
                    run = Run(arm, chosen, seed, self.runs)
                    self._train(run)
                    self._measure(run, with_memory=False)
                    self.write()

    def write(self) -> Results:
        """Write results.json and results.md with the runs that are done."""
        results = build_results(self.comparison, self.runs, self.slices, self.base or Measured())
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        replace_file(self.output / "results.json", text + "\n")
        replace_file(self.output / "results.md", format_markdown(results))
        self.board.refresh()
        return results

    def _train(self, run: Run) -> None:
        has_failed, summary = run.read_failure() is not None, run.read_summary()
        if has_failed and self.retry_failed:
            run.forget()
        elif has_failed or summary is not None:
            if summary is not None and not has_failed and summary["held_out_loss_after"] is None:
                run.fail(NOT_FINITE)  # it ended after the command that had started it was killed
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
        if run.read_failure() is not None or run.read_measured() is not None:
            return
        if not (run.folder / "model").exists():  # deleted when another learning rate was the best
            run.forget()
            self._train(run)
            if run.read_failure() is not None:
                return
        self.board.say(f"measuring {run.arm.name}, lr {run.lr:g}, seed {run.seed}")
        try:
            recipe, poll = run.beside(".yaml"), self.board.refresh
            measure_run(run, recipe, self._slice_files, self._tasks, poll, self.lock, with_memory=with_memory)
        except FailedError as error:
            run.fail(f"its model cannot be measured: {error}")
        if not self.keep_models:
            run.drop_model()

    @property
    def _tasks(self) -> tuple[str | None, str | None]:
        return self.comparison.evaluate, self.comparison.evaluate_data

    @property
    def _slice_files(self) -> dict[str, str]:
        files = {name: self.output / "data" / f"{name}.jsonl" for name in ("test", "general")}
        return {name: str(file) for name, file in files.items() if file.exists()}


def _count_tokens(comparison: Comparison, config: DataConfig) -> dict[int, list[int]]:
    """Count the tokens up to each step by seed, which must be the same for every arm."""
    lengths = Lengths(replace(comparison.recipe, data=config), comparison.budget)
    totals = {seed: lengths.count_tokens(seed) for seed in comparison.seeds}
    base = (comparison.recipe.run.batch_size, comparison.recipe.run.accumulation)
    for arm in comparison.arms:
        if (arm.recipe.run.batch_size, arm.recipe.run.accumulation) == base:
            continue
        own = Lengths(replace(arm.recipe, data=config), {"steps": len(totals[comparison.seeds[0]])})
        for seed, expected in totals.items():
            if own.count_tokens(seed)[: len(expected)] != expected:
                raise ValueError(
                    f"arm {arm.name!r} would train on other records in a step than the rest; give it the "
                    f"product run.batch_size × run.accumulation of the recipe, {base[0]} × {base[1]}"
                )
    return totals


def _check_tokens(run: Run, totals: list[int]) -> None:
    """Compare the tokens that the run logged with those that each run of its seed must train on."""
    logged = [line["tokens"] for line in run.read_metrics() if "tokens" in line]
    if logged != totals:
        step = next(
            (step for step, pair in enumerate(zip(logged, totals, strict=False), 1) if pair[0] != pair[1]),
            min(len(logged), len(totals)),
        )
        raise FailedError(
            f"it trained on other records than the rest: after step {step} it logged "
            f"{logged[step - 1] if step else 0} tokens in {len(logged)} steps, and {totals[step - 1]} in "
            f"{len(totals)} were expected"
        )
