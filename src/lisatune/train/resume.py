"""A run's progress: saved with each checkpoint, restored from the newest intact one."""

import dataclasses
import datetime
import math
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks
from lisatune.optim.meter import StateMeter
from lisatune.recipe import Recipe
from lisatune.runs.checkpoint import load_checkpoint, save_checkpoint
from lisatune.runs.folder import RunFolder, first_day
from lisatune.runs.manifest import DamagedCheckpointError, list_checkpoints, newest_checkpoint, prune
from lisatune.train.assemble import Parts

__all__ = ["RunState", "begin", "find_checkpoint", "fix_date", "read_state", "restore", "save"]


@dataclass
class RunState:
    """The progress of a run. It goes into checkpoints, so it holds JSON values only."""

    step: int = 0
    """Optimizer steps state, those that were left out included."""
    num_tokens: int = 0
    skipped_steps: int = 0
    """Steps left out because loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    evaluated_step: int = 0
    """Step of the last evaluation."""
    train_seconds: float = 0.0
    peak_state_bytes: int = 0
    peak_state_elements: int = 0
    peak_trainable: int = 0
    held_out_before: float = math.nan
    answers_before: list[str] = field(default_factory=list)
    batch: int = 0
    """Sequences of a micro-step on all ranks together; 0 if an older version saved the run."""
    data: dict[str, str] = field(default_factory=dict)
    """`RunData.hashes` of the rows that the run began with."""

    def add_step(
        self, *, is_finite: bool, num_tokens: int, seconds: float, trainable: int, meter: StateMeter
    ) -> None:
        """Count a step that has just been made.

        Args:
            is_finite: whether its loss and gradients were finite; if not, it was left out.
            num_tokens: tokens in its batches, on all ranks together.
            seconds: wall time it took.
            trainable: parameters that trained in it.
            meter: has measured the optimizer's state after it.
        """
        self.step += 1
        self.num_tokens += num_tokens
        self.skipped_steps += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        self.train_seconds += seconds
        self.peak_trainable = max(self.peak_trainable, trainable)
        self.peak_state_bytes = max(self.peak_state_bytes, meter.bytes)
        self.peak_state_elements = max(self.peak_state_elements, meter.elements)


def fix_date(recipe: Recipe, *, resume: bool) -> Recipe:
    """Return the recipe with the day that its chat template sees: its own, the resumed run's, or today."""
    began = first_day(Path(recipe.run.output or "")) if resume else None
    date = recipe.data.date or began or datetime.date.today().isoformat()
    date = ranks.broadcast_text(date)  # ranks may start on both sides of midnight
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, date=date))


def find_checkpoint(output: Path) -> Path:
    """Find the newest checkpoint of a run whose files all have the sizes that were written.

    Raises:
        ValueError: there is none.
    """
    found = newest_checkpoint(output / "checkpoints")
    if found is None:
        raise ValueError(f"there is no complete checkpoint in {output}; start over with --overwrite")
    return found


def begin(parts: Parts) -> RunState:
    """Return the state of a new run."""
    return RunState(batch=parts.data.order.batch_size, data=parts.data.hashes)


def restore(parts: Parts, output: Path) -> tuple[RunState, list[Path]]:
    """Load the newest intact checkpoint; damaged ones are passed over with a warning.

    Returns:
        The run's progress at that checkpoint, and the damaged checkpoints that are newer.

    Raises:
        ValueError: no checkpoint is intact, it does not fit, or the data differs from the run's first data.
    """
    damaged: list[Path] = []
    problem = DamagedCheckpointError(f"there is no complete checkpoint in {output}")
    built = parts.built
    for path in list_checkpoints(output / "checkpoints"):
        try:
            extra = load_checkpoint(
                path, model=built.model, optimizer=built.step.optimizer, scheduler=parts.scheduler
            )
            state = read_state(path, extra)
        except DamagedCheckpointError as error:
            damaged.append(path)
            problem = error
            continue
        if damaged:
            warnings.warn(f"{problem}; resuming from {path.name} instead", stacklevel=2)
        _check_same_data(parts, state, output)
        _check_same_batch(parts, state)
        if state.step > parts.data.steps:
            raise ValueError(
                f"the run has done {state.step} steps and the recipe asks for {parts.data.steps}; give more "
                "run.steps (or run.epochs) to continue"
            )
        parts.set_learning_rates()
        return state, damaged
    raise ValueError(f"{problem}, and no other is intact; start over with --overwrite")


def save(parts: Parts, state: RunState, folder: RunFolder, say: Callable[[str], None]) -> bool:
    """Save a checkpoint, then delete the oldest ones.

    Returns:
        Whether it was saved.

    Raises:
        OSError: it could not be saved and `run.on_save_error` is `stop`; earlier ones are unchanged.
    """
    run = parts.recipe.run
    try:
        save_checkpoint(
            folder.checkpoints,
            step=state.step,
            model=parts.built.model,
            optimizer=parts.built.step.optimizer,
            scheduler=parts.scheduler,
            extra=asdict(state),
        )
        if ranks.is_rank0():
            prune(folder.checkpoints, run.keep_checkpoints)
    except OSError as error:
        if run.on_save_error == "stop":
            raise
        state.failed_saves += 1
        say(f"step {state.step}: {error}; continuing, as run.on_save_error says")
        return False
    return True


def read_state(path: Path, extra: Mapping[str, Any]) -> RunState:
    """Build a run's progress from a checkpoint. A field that an older version did not save has its default.

    Raises:
        DamagedCheckpointError: a value has a type that no run writes.
    """
    kinds = typing.get_type_hints(RunState)
    for name, value in extra.items():
        kind: Any = kinds.get(name, type(None))
        plain: Any = typing.get_origin(kind) or kind
        if not isinstance(value, int | float if plain is float else plain):
            reason = f"extra.{name} is {value!r:.80}"
            raise DamagedCheckpointError(f"checkpoint {path} holds what no run wrote ({reason})")
    return dataclasses.replace(RunState(), **extra)


def _check_same_batch(parts: Parts, state: RunState) -> None:
    now = parts.data.order.batch_size
    if state.batch not in (0, now):
        raise ValueError(
            f"the run began with {state.batch} sequences in a micro-step and would continue with {now}: "
            f"run.batch_size={parts.recipe.run.batch_size} on each of {ranks.count()} ranks; choose them so "
            "that their product stays the same, or start over with --overwrite"
        )


def _check_same_data(parts: Parts, state: RunState, output: Path) -> None:
    for name, was in state.data.items():
        if parts.data.hashes.get(name) != was:
            raise ValueError(
                f"{name} differs from what the run in {output} began with: its records, the tokenizer "
                "or data.date have changed since; put the former ones back, or start over with --overwrite"
            )
