"""Everything that can be wrong with a run, found before any weights load: behind `lisatune check`.

It takes the steps that `train` takes, with a model on the meta device in place of the real one, and goes
on after a failure as far as it can: one call lists all problems.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.text import Text

from lisatune.console import USER_ERRORS, plural, terminal
from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.records import read_records
from lisatune.distributed.ranks import pick_device
from lisatune.models.hf import announce_remote_code
from lisatune.models.load import load_tokenizer
from lisatune.recipe import Recipe
from lisatune.runs.folder import check_output
from lisatune.train.assemble import check_fits, rehearse
from lisatune.train.outline import Outline, make_outline, print_outline
from lisatune.train.progress import check_trackers

__all__ = ["CheckReport", "check", "print_report"]

P = ParamSpec("P")


T = TypeVar("T")


REHEARSED_STEPS = 10_000
"""Steps of the rehearsal if the data cannot be read. Enough to cause no warning about a short run."""


@dataclass
class CheckReport:
    """What `check` found."""

    problems: list[str] = field(default_factory=list)
    """What would stop the run, a sentence each."""

    warnings: list[str] = field(default_factory=list)
    """What the run would do that may not be meant."""

    outline: Outline | None = None
    """The outline of the run; None when a problem keeps it from being made."""

    def attempt(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call something; note its warnings, and a failure as a problem, each once."""
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


def check(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> CheckReport:
    """Look for everything that would stop a run, and say what it would do.

    Reads the model's config and tokenizer and every record, writes nothing.

    Args:
        recipe: the recipe; `run.output` must be set.
        resume, overwrite: as for `train`.
    """
    report = CheckReport()
    output = Path(recipe.run.output or "")
    report.attempt(check_output, output, recipe.as_dict(), resume=resume, overwrite=overwrite)
    report.attempt(check_trackers, recipe.run.report_to)
    report.attempt(announce_remote_code, recipe.model.name, recipe.model.trust_remote_code)
    device = report.attempt(pick_device, recipe.run.device)
    if device is not None:
        report.attempt(recipe.method.check_device, device)
    data = _check_data(recipe, report)
    steps = recipe.run.steps if data is None else data.steps
    attached = report.attempt(rehearse, recipe, steps or REHEARSED_STEPS)
    if attached is not None and data is not None:
        report.attempt(check_fits, attached[0], data)
    if attached is not None and data is not None and device is not None:
        report.outline = make_outline(recipe, *attached, data, device=str(device))
    return report


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print the outline, then what is doubtful, then what is wrong."""
    console = console or terminal()
    if report.outline is not None:
        print_outline(report.outline, console)
    for text in report.warnings:
        console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)
    for text in report.problems:
        console.print(Text(f"problem: {text}", style="red"), soft_wrap=True)
    if report.problems:
        console.print(
            Text(f"{plural(len(report.problems), 'problem')}; nothing was written", style="bold red")
        )
    else:
        console.print(Text("nothing is in the way of this run", style="bold green"))


def _check_data(recipe: Recipe, report: CheckReport) -> RunData | None:
    """Read every record of every source; go on without those that can't be used."""
    config = recipe.data
    if config.validation == config.train:
        report.warnings.append("data.validation is data.train: held-out loss will be loss on training data")
    sources = [(config.train, config.limit), (config.validation, config.validation_limit)]
    for source, limit in sources:
        if source is not None:
            records = report.attempt(
                read_records, source, kind=config.kind, split=config.split, limit=limit, on_bad_row="skip"
            )
            if records is not None and records.skipped and config.on_bad_row == "error":
                more = f" (and {records.skipped - 1:,} more like it)" if records.skipped > 1 else ""
                report.problems.append(f"{records.first_skipped}{more}; fix it, or set data.on_bad_row=skip")
    tokenizer = report.attempt(load_tokenizer, recipe.model.name, **_source(recipe))
    if tokenizer is None:
        return None
    usable = dataclasses.replace(recipe, data=dataclasses.replace(config, on_bad_row="skip"))
    data = report.attempt(prepare_data, usable, tokenizer)
    if data is not None and data.train.num_cut:
        report.warnings.append(
            f"{plural(data.train.num_cut, 'training record')} of more than data.max_length="
            f"{config.max_length} tokens will be cut"
        )
    if data is not None and data.train.num_without_loss:
        report.warnings.append(
            f"{plural(data.train.num_without_loss, 'training record')} will be left out: data.max_length="
            f"{config.max_length} cuts off the whole answer"
        )
    return data


def _source(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
