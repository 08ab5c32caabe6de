"""A run's progress: saved with each checkpoint, restored from the newest intact one."""

import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks
from lisatune.optim.meter import StateMeter
from lisatune.runs.checkpoint import load_checkpoint, load_weights
from lisatune.runs.folder import NEW_FOLDER, RunFolder
from lisatune.runs.manifest import DamagedCheckpointError, checkpoint_name, is_complete, list_checkpoints
from lisatune.train.assemble import Parts
from lisatune.train.schedule import lr_factor

__all__ = ["RunState", "begin", "read_state", "restore", "restore_best"]


@dataclass
class RunState:
    """The progress of a run. It goes into checkpoints, so it holds JSON values only."""

    step: int = 0
    """Optimizer steps that were made, those that were left out included."""
    num_tokens: int = 0
    skipped_steps: int = 0
    """Steps left out because loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    evaluated_step: int = 0
    """Step of the last evaluation."""
    held_out: float = math.nan
    """Held-out loss of the last evaluation."""
    lowest_held_out: float = math.inf
    """Lowest held-out loss of all evaluations while the run trained."""
    evaluations_without_gain: int = 0
    """Evaluations since that one."""
    best: dict[str, float] = field(default_factory=dict)
    """Held-out loss by the step, as text, of every checkpoint that was the best when it was saved."""
    train_seconds: float = 0.0
    peak_state_bytes: int = 0
    peak_state_elements: int = 0
    peak_trainable: int = 0
    held_out_before: float = math.nan
    answers_before: list[str] = field(default_factory=list)
    total_steps: int = 0
    """Steps that the learning-rate schedule is made for; 0 if an older version saved the run."""
    batch: int = 0
    """Sequences of a micro-step on all ranks together; 0 if an older version saved the run."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further held-out figures of the last evaluation by name, such as `held_out_accuracy`."""
    more_before: dict[str, Any] = field(default_factory=dict)
    """The same before the first step."""
    reference: str = ""
    """Hash of the file with the reference's log-probabilities; empty without a reference."""
    stream: list[dict[str, int]] = field(default_factory=list)
    """`Stream.places` of the next step; empty without a stream."""
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

    def add_evaluation(self, held_out: float) -> None:
        """Note this step's held-out loss."""
        self.evaluated_step, self.held_out = self.step, held_out
        has_gained = held_out < self.lowest_held_out
        self.lowest_held_out = held_out if has_gained else self.lowest_held_out
        self.evaluations_without_gain = 0 if has_gained else self.evaluations_without_gain + 1

    def is_best(self) -> bool:
        """Whether the last evaluation's loss is below that of every checkpoint in `best`.

        A lower one may have been seen whose checkpoint could not be saved.
        """
        return self.held_out < min(self.best.values(), default=math.inf)

    def has_stalled(self, stop_after: int | None) -> bool:
        """Whether `run.stop_after` ends the run now."""
        return stop_after is not None and self.evaluations_without_gain >= stop_after

    def best_steps(self) -> list[int]:
        """Return the steps of `best`."""
        return [int(step) for step in self.best if step.isdecimal()]


def begin(parts: Parts) -> RunState:
    """Return the state of a new run."""
    return RunState(total_steps=parts.data.steps, batch=parts.data.order.batch_size, data=parts.data.hashes)


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
        if parts.data.stream is not None:
            parts.data.stream.seek(state.stream)
        _forget_lost_best(state, output / "checkpoints")
        _warn_of_new_schedule(parts, state)
        state.total_steps = parts.data.steps
        parts.set_learning_rates()
        return state, damaged
    raise ValueError(f"{problem}, and no other is intact; {NEW_FOLDER}")


def restore_best(parts: Parts, state: RunState, folder: RunFolder) -> int:
    """Load the weights of the best checkpoint, if its held-out loss is below that of the last step.

    Returns:
        The step that the weights are of.
    """
    best = min(state.best_steps(), key=lambda step: state.best[str(step)], default=state.step)
    if best == state.step or state.held_out <= state.best[str(best)]:
        return state.step
    try:
        load_weights(folder.checkpoints / checkpoint_name(best), model=parts.built.model)
    except DamagedCheckpointError as error:
        warnings.warn(f"{error}; the model is that of the last step, not of the best", stacklevel=2)
        return state.step
    return best


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


def _forget_lost_best(state: RunState, folder: Path) -> None:
    """Forget the best checkpoint if it is gone, so that a later one can take its place."""
    by_loss = sorted(state.best_steps(), key=lambda step: state.best[str(step)])
    lost = list(takewhile(lambda step: not is_complete(folder / checkpoint_name(step)), by_loss))
    lost = json.loads(ranks.broadcast_text(json.dumps(lost)))  # of the first rank, for all
    for step in lost:
        del state.best[str(step)]
    if lost:
        warnings.warn(
            f"the best checkpoint, {folder / checkpoint_name(lost[0])}, is gone or incomplete; the best of "
            "those that follow takes its place",
            stacklevel=3,
        )


def _warn_of_new_schedule(parts: Parts, state: RunState) -> None:
    """Say what another number of steps does to the learning rates."""
    config, was, now = parts.recipe.optimizer, state.total_steps, parts.data.steps
    old, new = (config.lr * lr_factor(config, state.step, steps) for steps in (was or now, now))
    if was not in (0, now) and (config.schedule != "constant" or old != new):
        warnings.warn(
            f"the run began with {was:,} steps and now has {now:,}, so from here the learning rate follows "
            f"optimizer.schedule={config.schedule} over {now:,} steps: {new:.3g} in the next step, where it "
            f"would have been {old:.3g}",
            stacklevel=3,
        )


def _check_same_batch(parts: Parts, state: RunState) -> None:
    now = parts.data.order.batch_size
    if state.batch not in (0, now):
        raise ValueError(
            f"the run began with {state.batch} sequences in a micro-step and would continue with {now}: "
            f"run.batch_size={parts.recipe.run.batch_size} on each of {ranks.count()} ranks; choose them so "
            f"that their product stays the same, or {NEW_FOLDER}"
        )


def _check_same_data(parts: Parts, state: RunState, output: Path) -> None:
    for name, was in state.data.items():
        if parts.data.hashes.get(name) != was:
            raise ValueError(
                f"{name} differs from what the run in {output} began with: its records, the tokenizer "
                f"or data.date have changed since; put the former ones back, or {NEW_FOLDER}"
            )
