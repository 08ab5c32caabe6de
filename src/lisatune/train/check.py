"""Find everything that can be wrong with a run before any weights load: the code behind `lisatune check`.

It takes the same steps as `train`, with a model on the meta device instead of the real one. After a failure
it continues as far as it can, so one call lists all problems.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from rich.console import Console
from rich.text import Text

from lisatune.console import USER_ERRORS, plural, terminal
from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.readers import held_out_source, open_reader
from lisatune.data.records import RecordReader
from lisatune.data.shown import MarkedText, show_loss
from lisatune.distributed.ranks import pick_device
from lisatune.models.hf import announce_remote_code
from lisatune.models.load import load_tokenizer
from lisatune.recipe import DataConfig, Recipe, SourceConfig
from lisatune.runs.folder import check_output
from lisatune.train.assemble import check_fits, rehearse, warn_of_slow_bf16
from lisatune.train.beginning import choose_start, find_checkpoint, fix_compile, fix_date, read_finished
from lisatune.train.benchmarks import check_tasks
from lisatune.train.compiling import choose_compile
from lisatune.train.idle import warn_of_idle_evaluations, warn_of_idle_settings
from lisatune.train.outline import Outline, make_outline, print_outline
from lisatune.train.trackers import check_trackers

__all__ = ["CheckReport", "check", "print_report"]

P = ParamSpec("P")


T = TypeVar("T")


REHEARSED_STEPS = 10_000
"""Steps of the rehearsal if the data cannot be read. Enough to cause no warning about a short run."""


@dataclass
class CheckReport:
    """The result of `check`."""

    problems: list[str] = field(default_factory=list)
    """Problems that would stop the run, a sentence each."""

    warnings: list[str] = field(default_factory=list)
    """Things that the run would do and that may not be meant."""

    outline: Outline | None = None
    """The outline of the run; None if a problem prevents it."""

    shown: list[MarkedText] = field(default_factory=list)
    """The first training rows as text, as many as were asked for."""

    def attempt(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a function. Its warnings are noted, and an error becomes a problem; each is noted once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                return act(*args, **kwargs)
            except USER_ERRORS as error:
                self._note(self.problems, str(error))
            finally:
                for warning in caught:
                    if issubclass(warning.category, UserWarning):
                        self._note(self.warnings, str(warning.message))
        return None

    @staticmethod
    def _note(notes: list[str], text: str) -> None:
        if text not in notes:
            notes.append(text)


def check(
    recipe: Recipe, *, resume: bool | Literal["auto"] = False, overwrite: bool = False, show: int = 0
) -> CheckReport:
    """Look for everything that would stop a run, and outline the run.

    It reads the model's config and tokenizer and every record. It writes nothing but prepared tokens.

    Args:
        recipe: the recipe; `run.output` must be set.
        resume, overwrite: as for `train`.
        show: how many training rows to return as text.
    """
    report = CheckReport()
    output = Path(recipe.run.output or "")
    if resume == "auto" and not overwrite:
        resume, overwrite = choose_start(output)
    resume = bool(resume)
    recipe = fix_compile(fix_date(recipe, resume=resume), resume=resume)
    finished = read_finished(output, recipe.as_dict()) if resume else None
    writes = finished is None
    report.attempt(check_output, output, recipe.as_dict(), resume=resume, overwrite=overwrite, writes=writes)
    if resume and not report.problems and finished is None:
        report.attempt(find_checkpoint, output)
    report.attempt(check_trackers, recipe.run.report_to)
    if recipe.run.evaluate is not None:
        report.attempt(check_tasks, recipe.run.evaluate, recipe.run.evaluate_data)
    report.attempt(announce_remote_code, recipe.model.name, recipe.model.trust_remote_code)
    report.attempt(warn_of_idle_settings, recipe)
    device = report.attempt(pick_device, recipe.run.device)
    if device is not None:
        report.attempt(recipe.method.check_device, device)
        report.attempt(warn_of_slow_bf16, recipe, device)
    data = _check_data(recipe, report)
    if data is not None:
        report.shown = [data.mark(index) for index in range(min(show, len(data.train.rows)))]
    steps = recipe.run.steps if data is None else data.steps
    attached = report.attempt(rehearse, recipe, steps or REHEARSED_STEPS, device)
    if attached is not None and data is not None:
        report.attempt(check_fits, attached[0], data, recipe.data.max_length)
        report.attempt(warn_of_idle_evaluations, recipe, data.steps)
    if attached is not None and data is not None and device is not None:
        model, layers, schedule = attached
        blocks = choose_compile(recipe, device, model, layers, data).why
        report.outline = make_outline(
            recipe, model, layers, schedule, data, device=str(device), blocks=blocks
        )
    if data is not None and data.stream is not None:
        data.stream.close()
    return report


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print the rows that were asked for, then the outline, warnings and problems."""
    console = console or terminal()
    for number, parts in enumerate(report.shown, 1):
        console.print(Text(f"row {number}, loss on what stands in ⟦ ⟧:", style="cyan"))
        console.print(show_loss(parts), soft_wrap=True)
    if report.outline is not None:
        print_outline(report.outline, console)
    for text in report.warnings:
        console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)
    for text in report.problems:
        console.print(Text(f"problem: {text}", style="red"), soft_wrap=True)
    if report.problems:
        console.print(Text(f"{plural(len(report.problems), 'problem')}; no run was begun", style="bold red"))
    else:
        console.print(Text("no problems found", style="bold green"))


def _check_data(recipe: Recipe, report: CheckReport) -> RunData | None:
    """Read every record of every source; continue without those that cannot be used."""
    config = recipe.data
    if config.validation == config.train:
        report.warnings.append("data.validation is data.train: held-out loss will be loss on training data")
    held_out = held_out_source(recipe) if config.validation is not None else None
    for source in (*(() if config.streaming else config.sources), *(() if held_out is None else (held_out,))):
        found = report.attempt(_read_through, recipe, source)
        if found is not None and found.skipped and config.on_bad_row == "error":
            more = f" (and {found.skipped - 1:,} more like it)" if found.skipped > 1 else ""
            report.problems.append(f"{found.first_skipped}{more}; fix it, or set data.on_bad_row=skip")
    tokenizer = report.attempt(load_tokenizer, **recipe.model.tokenizer)
    if tokenizer is None:
        return None
    usable = dataclasses.replace(recipe, data=dataclasses.replace(config, on_bad_row="skip"))
    data = report.attempt(prepare_data, usable, tokenizer)
    if data is not None:
        report.warnings += _warn_of_long_records(data, config)
    return data


def _read_through(recipe: Recipe, source: SourceConfig) -> RecordReader:
    """Read and check all records of a source."""
    reader = open_reader(recipe, source, "skip")
    reader.read_through()
    return reader


def _warn_of_long_records(data: RunData, config: DataConfig) -> list[str]:
    """Say what happens to records that are longer than `max_length`."""
    max_length = config.max_length
    examples = data.train
    long, lost = f"more than data.max_length={max_length} tokens", f"{examples.lost_share:.1%} of all tokens"
    warnings = []
    if examples.num_cut:
        records = plural(examples.num_cut, "training record")
        warnings.append(f"{records} of {long} will be cut; {lost} will not train (data.long)")
    if examples.num_dropped:
        records = plural(examples.num_dropped, "training record")
        warnings.append(f"{records} of {long} will be left out; {lost} will not train (data.long)")
    if examples.num_without_loss:
        what = "the whole answer" if data.rows_per_record == 1 else "all in which the answers differ"
        if isinstance(config.loss_on, tuple):
            what = "all messages of the roles in data.loss_on, or there are none"
        warnings.append(
            f"{plural(examples.num_without_loss, 'training record')} will be left out: data.max_length="
            f"{max_length} cuts off {what}"
        )
    return warnings
