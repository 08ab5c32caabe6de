"""How far a run has come: saved in checkpoints, and taken up again from the newest one that is whole."""

import dataclasses
import math
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks
from lisatune.runs.checkpoint import load_checkpoint, save_checkpoint
from lisatune.runs.folder import RunFolder
from lisatune.runs.manifest import DamagedCheckpointError, list_checkpoints, newest_checkpoint, prune
from lisatune.train.assemble import Parts

__all__ = ["RunState", "begin", "find_checkpoint", "read_state", "restore", "save"]


@dataclass
class RunState:
    """How far a run has come: goes into checkpoints, so only JSON values."""

    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
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
    """Sequences of a micro-step on all ranks together; 0 where an older run did not say."""
    data: dict[str, str] = field(default_factory=dict)
    """`RunData.hashes` of the rows that the run began with."""


def find_checkpoint(output: Path) -> Path:
    """Find the newest checkpoint of a run whose files have their sizes.

    Raises:
        ValueError: there is none.
    """
    found = newest_checkpoint(output / "checkpoints")
    if found is None:
        raise ValueError(f"there is no complete checkpoint in {output}; start again with --overwrite")
    return found


def begin(parts: Parts) -> RunState:
    """Note what a new run begins with."""
    return RunState(batch=parts.data.order.batch_size, data=parts.data.hashes)


def restore(parts: Parts, output: Path) -> tuple[RunState, list[Path]]:
    """Load the newest checkpoint that is what was written; what is damaged is passed over with a warning.

    Returns:
        How far the run had come then, and the damaged checkpoints after it.

    Raises:
        ValueError: no checkpoint is whole, it does not fit, or the data is not what the run began with.
    """
    damaged: list[Path] = []
    problem = DamagedCheckpointError(f"there is no complete checkpoint in {output}")
    built = parts.built
    for path in list_checkpoints(output / "checkpoints"):
        try:
            extra = load_checkpoint(
                path, model=built.model, optimizer=built.step.optimizer, scheduler=parts.scheduler
            )
            done = read_state(path, extra)
        except DamagedCheckpointError as error:
            damaged.append(path)
            problem = error
            continue
        if damaged:
            warnings.warn(f"{problem}; going on from {path.name} instead", stacklevel=2)
        _check_same_data(parts, done, output)
        _check_same_batch(parts, done)
        if done.step > parts.data.steps:
            raise ValueError(
                f"the run has done {done.step} steps and the recipe asks for {parts.data.steps}; give more "
                "run.steps (or run.epochs) to go on"
            )
        parts.set_learning_rates()
        return done, damaged
    raise ValueError(f"{problem}, and no other is whole; start again with --overwrite")


def save(parts: Parts, done: RunState, folder: RunFolder, say: Callable[[str], None]) -> bool:
    """Save a checkpoint, and delete older ones once it is complete.

    Returns:
        Whether it was saved.

    Raises:
        OSError: it could not be saved, and `run.on_save_error` is `stop`; earlier ones are as they were.
    """
    run = parts.recipe.run
    try:
        save_checkpoint(
            folder.checkpoints,
            step=done.step,
            model=parts.built.model,
            optimizer=parts.built.step.optimizer,
            scheduler=parts.scheduler,
            extra=asdict(done),
        )
        if ranks.is_rank0():
            prune(folder.checkpoints, run.keep_checkpoints)
    except OSError as error:
        if run.on_save_error == "stop":
            raise
        done.failed_saves += 1
        say(f"step {done.step}: {error}; going on, as run.on_save_error says")
        return False
    return True


def read_state(path: Path, extra: Mapping[str, Any]) -> RunState:
    """Check the types of what a checkpoint holds: a run without some field is an older one."""
    kinds = typing.get_type_hints(RunState)
    for name, value in extra.items():
        kind: Any = kinds.get(name, type(None))
        plain: Any = typing.get_origin(kind) or kind
        if not isinstance(value, int | float if plain is float else plain):
            reason = f"extra.{name} is {value!r:.80}"
            raise DamagedCheckpointError(f"checkpoint {path} holds what no run wrote ({reason})")
    return dataclasses.replace(RunState(), **extra)


def _check_same_batch(parts: Parts, done: RunState) -> None:
    now = parts.data.order.batch_size
    if done.batch not in (0, now):
        raise ValueError(
            f"the run began with {done.batch} sequences in a micro-step and would go on with {now}: "
            f"run.batch_size={parts.recipe.run.batch_size} on each of {ranks.count()} ranks; choose them so "
            "that their product is the former one, or start again with --overwrite"
        )


def _check_same_data(parts: Parts, done: RunState, output: Path) -> None:
    for name, was in done.data.items():
        if parts.data.hashes.get(name) != was:
            raise ValueError(
                f"{name} is not what the run in {output} began with: its records, or the tokenizer, have "
                "changed since; put the former ones back, or start again with --overwrite"
            )
