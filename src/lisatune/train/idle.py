"""Settings that do nothing beside the other ones: a run warns of them before it begins."""

import warnings
from pathlib import Path

from torch import nn

from lisatune.console import plural
from lisatune.data.sources import has_splits
from lisatune.lisa.schedule import BlockSchedule
from lisatune.models.gguf import SMOLLM2
from lisatune.nn.layers import LayerMap
from lisatune.recipe import DataConfig, Recipe
from lisatune.recipe.data import list_paths

__all__ = ["warn_of_idle_checkpointing", "warn_of_idle_evaluations", "warn_of_idle_settings"]


def warn_of_idle_settings(recipe: Recipe) -> None:
    """Warn of a revision of a local model, of a split of local data, and of rounding float32 weights."""
    source, data, run = recipe.model, recipe.data, recipe.run
    is_local = source.name == SMOLLM2 or Path(source.name).expanduser().exists()
    if source.revision is not None and is_local:
        _warn(
            f"model.revision={source.revision}",
            f"{source.name} is on this machine, and only models on the hub have revisions",
        )
    paths = [*list_paths(data.train), *([] if data.validation is None else [data.validation])]
    if data.split != DataConfig.split and not any(map(has_splits, paths)):
        _warn(f"data.split={data.split}", "only data sets on the hub have splits, and none is named")
    for each in () if isinstance(data.train, str) else data.train:
        if each.split is not None and not has_splits(each.path):
            _warn(f"data.train {each.path}: split={each.split}", "only data sets on the hub have splits")
    rounds = recipe.optimizer.name == "adamw" and recipe.optimizer.rounding != "exact"  # others refuse it
    if rounds and run.precision != "bf16":
        _warn(
            f"optimizer.rounding={recipe.optimizer.rounding}",
            f"it is how bf16 weights are updated, and under run.precision={run.precision} they are float32",
        )


def warn_of_idle_checkpointing(
    recipe: Recipe, model: nn.Module, layers: LayerMap, schedule: BlockSchedule
) -> None:
    """Warn if only frozen blocks would compute their activations again, and none ever is frozen."""
    if recipe.run.activation_checkpointing != "frozen" or type(schedule) is not BlockSchedule:
        return
    if all(any(p.requires_grad for p in block.values()) for block in layers.block_parameters(model)):
        _warn(
            "run.activation_checkpointing=frozen",
            f"method {recipe.method.name} trains something in every block all the time; true saves memory "
            "there",
        )


def warn_of_idle_evaluations(recipe: Recipe, steps: int) -> None:
    """Warn of evaluations that a run of so many optimizer steps does not come to, and of what needs them."""
    run = recipe.run
    if run.eval_every is None:
        return
    evaluations = (steps - 1) // run.eval_every  # that of the last step is made in any case
    every, stop = f"run.eval_every={run.eval_every}", f"run.stop_after={run.stop_after}"
    if evaluations == 0:
        needing = [] if run.stop_after is None else [stop]
        needing += ["run.keep_best"] if run.keep_best else []
        beside = f" with {' and '.join(needing)}" if needing else ""
        _warn(every + beside, f"the run has {plural(steps, 'step')}, and the last one is evaluated anyway")
    elif run.stop_after is not None and evaluations < run.stop_after:
        times = "once" if evaluations == 1 else f"{evaluations} times"
        _warn(stop, f"{every} evaluates {times} before the last step")


def _warn(setting: str, why: str) -> None:
    warnings.warn(f"{setting} does nothing: {why}", stacklevel=3)
