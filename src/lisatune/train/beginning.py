"""How a run begins: what its folder holds already, and what a resumed run takes over from it."""

import dataclasses
import datetime
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from lisatune.distributed import ranks
from lisatune.recipe import Recipe
from lisatune.runs.folder import NEW_FOLDER, first_day, first_value, is_finished, is_run, is_untrained
from lisatune.runs.manifest import list_checkpoints, newest_checkpoint
from lisatune.runs.summary import Summary

__all__ = [
    "choose_start",
    "find_checkpoint",
    "find_places",
    "fix_compile",
    "fix_date",
    "read_finished",
]


def fix_date(recipe: Recipe, *, resume: bool) -> Recipe:
    """Return the recipe with the day that its chat template sees: its own, the resumed run's, or today."""
    began = first_day(Path(recipe.run.output or "")) if resume else None
    date = recipe.data.date or began or datetime.date.today().isoformat()
    date = ranks.broadcast_text(date)  # ranks may start on both sides of midnight
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, date=date))


def fix_compile(recipe: Recipe, *, resume: bool) -> Recipe:
    """Return the recipe with the resumed run's answer to `run.compile: auto`, so that it computes alike."""
    before = first_value(Path(recipe.run.output or ""), "run", "compile") if resume else None
    if recipe.run.compile != "auto" or not isinstance(before, bool):
        return recipe
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, compile=before))


def find_checkpoint(output: Path) -> Path:
    """Find the newest checkpoint of a run whose files all have the sizes that were written.

    Raises:
        ValueError: there is none.
    """
    found = newest_checkpoint(output / "checkpoints")
    if found is None and (output / "model").is_dir():  # written whole, and then the run may have been killed
        state = "it is finished" if is_finished(output) else "its model is written"
        raise ValueError(
            f"the run in {output} has no checkpoint to continue from, and {state}; to train its model "
            f"further, set model.name={output / 'model'} and name another run.output"
        )
    if found is None and not any((output / "checkpoints").glob("step-*")):  # also no damaged ones
        again = "without" if is_untrained(output) else "with --overwrite in place of"
        raise ValueError(
            f"the run in {output} was stopped before its first checkpoint, so there is nothing to resume; "
            f"start it again {again} --resume"
        )
    if found is None:
        raise ValueError(f"there is no complete checkpoint in {output}; {NEW_FOLDER}")
    return found


def find_places(output: Path) -> list[dict[str, int]]:
    """Find where the stream of a run continues; empty if it has none, or if the checkpoint is damaged."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        state = json.loads((find_checkpoint(output) / "state.json").read_text(encoding="utf-8"))
        return [{key: int(each[key]) for key in each} for each in state["extra"]["stream"]]
    return []


def choose_start(output: Path) -> tuple[bool, bool]:
    """Choose how `--resume=auto` starts: whether it resumes, and whether it overwrites.

    A run that has neither a checkpoint nor a model begins again, because it has nothing to lose. Anything
    else in the folder is resumed, or refused as without `auto`.
    """
    if not is_run(output):
        return False, False
    has_result = bool(list_checkpoints(output / "checkpoints")) or (output / "model").exists()
    return has_result, not has_result


def read_finished(output: Path, recipe: Mapping[str, Any]) -> Summary | None:
    """Read the summary of a finished run; None if it is not finished, or if the recipe makes it longer.

    Warns of tasks that would be asked after training.

    Args:
        output: the run folder.
        recipe: `Recipe.as_dict()`; only its `run.steps`, `run.epochs` and `run.stop_after` are compared.
    """
    if not is_finished(output):
        return None
    from lisatune.files import yaml

    try:
        before = yaml.load((output / "recipe.yaml").read_text(encoding="utf-8"))["run"]
        values = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        summary = cast("Summary", {key: value for key, value in values.items() if value is not None})
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # damaged, so it is resumed from its newest checkpoint
        return None
    is_as_long = all(before.get(key) == recipe["run"][key] for key in ("steps", "epochs", "stop_after"))
    if not is_as_long:
        return None
    if (tasks := recipe["run"]["evaluate"]) and "scores" not in summary:
        warnings.warn(
            f"the run in {output} had ended, so run.evaluate={tasks} is not asked; use `lisatune evaluate "
            f"{output} --tasks {tasks}`",
            stacklevel=3,
        )
    return summary
