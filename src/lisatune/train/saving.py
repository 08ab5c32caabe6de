"""When a run saves checkpoints, and how: while training stands still, or beside it (`run.save_async`)."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from lisatune.distributed import ranks
from lisatune.runs.checkpoint import begin_checkpoint
from lisatune.runs.folder import RunFolder
from lisatune.runs.left_out import hash_fixed
from lisatune.runs.manifest import prune
from lisatune.runs.together import CheckpointWriter
from lisatune.train.assemble import Parts
from lisatune.train.resume import RunState

__all__ = ["SaveClock", "Saver"]

AUTOSAVE_SECONDS = 600
"""Seconds between two checkpoints where `run.save_every` is not set."""

AUTOSAVE_FACTOR = 20
"""How many times as long as a checkpoint takes the next one waits at least."""


class SaveClock:
    """Tells when to save a checkpoint: every N steps, or by the clock.

    By the clock that is `AUTOSAVE_SECONDS` after the last one, or later if saving took more than a
    twentieth of that time. So a kill costs minutes, and saving costs at most 5 % of the time.

    Args:
        every: `run.save_every`.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._since = time.monotonic()
        self._wait: float = AUTOSAVE_SECONDS

    @property
    def is_asked_for(self) -> bool:
        """Whether the recipe asks for these checkpoints."""
        return self._every is not None

    def is_due(self, step: int) -> bool:
        """Whether to save a checkpoint after `step`; the same on all ranks, which must all call it."""
        if self._every is not None:
            return self._every > 0 and step % self._every == 0
        return bool(ranks.max_over_ranks(int(time.monotonic() - self._since >= self._wait)))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long saving takes, and start the clock again."""
        began = time.monotonic()
        yield
        self._since = time.monotonic()
        self._wait = max(AUTOSAVE_SECONDS, AUTOSAVE_FACTOR * (self._since - began))


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that is being written."""

    step: int
    writer: CheckpointWriter
    thread: threading.Thread | None
    """Writes it; None if nobody has begun to."""
    must: bool
    """Whether it may stop the run if it cannot be saved."""
    is_best: bool


class Saver:
    """Saves a run's checkpoints, and deletes the oldest ones. Use it as a context manager.

    With `run.save_async` values are copied and a thread writes them. At most one checkpoint is being written:
    the next one, and the end of the run, wait for it. Errors are raised, or said, by the next call.

    On several ranks each has a thread for its own files. The threads exchange nothing: the ranks complete the
    checkpoint between two steps, in the first `collect` that finds all of them done.

    Args:
        parts, state, folder: the run.
        say: prints a line.
    """

    def __init__(self, parts: Parts, state: RunState, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._parts, self._state, self._folder, self._say = parts, state, folder, say
        self._begun: _Begun | None = None
        self._fixed: dict[str, int] | None = None

    def save(self, *, must: bool = True, now: bool = False, is_best: bool = False) -> bool:
        """Save a checkpoint of this step, or begin to.

        Args:
            must: whether a checkpoint that cannot be saved may stop the run at all.
            now: return once it is saved, also with `run.save_async`.
            is_best: it has the lowest held-out loss so far.

        Returns:
            False if it could not be saved.

        Raises:
            OSError: it, or the one before, could not be saved, it must be, and `run.on_save_error` is `stop`;
                earlier ones are unchanged.
        """
        self.collect(wait=True)
        parts, state = self._parts, self._state
        is_async = parts.recipe.run.save_async and not now
        if parts.data.stream is not None:
            state.stream = parts.data.stream.places(state.step * parts.recipe.run.accumulation)
        if is_best:
            state.best[str(state.step)] = state.held_out
        if self._fixed is None:
            self._fixed = hash_fixed(parts.built.model, parts.built.step.optimizer)
        try:
            writer = begin_checkpoint(
                self._folder.checkpoints,
                step=state.step,
                model=parts.built.model,
                optimizer=parts.built.step.optimizer,
                scheduler=parts.scheduler,
                extra=asdict(state),
                left_out=self._fixed,
                copies=is_async,
            )
        except OSError as error:
            return self._fail(error, state.step, must=must, is_best=is_best)
        # A daemon, so that a third Ctrl-C ends the process.
        thread = threading.Thread(target=writer.write, daemon=True) if is_async else None
        self._begun = _Begun(state.step, writer, thread, must, is_best)
        if thread is None:
            writer.write()
            return self.collect(wait=True)
        thread.start()
        return True

    def collect(self, *, wait: bool = False) -> bool:
        """Complete the checkpoint that is being written, once it is written; every rank must call this.

        Args:
            wait: wait for it. Otherwise one that is not written yet is left for a later call.

        Returns:
            False if it could not be saved.

        Raises:
            OSError: as in `save`.
        """
        begun = self._begun
        if begun is None:
            return True
        if begun.thread is not None:
            if not wait and ranks.max_over_ranks(int(begun.thread.is_alive())):
                return True
            begun.thread.join()
        self._begun = None
        run = self._parts.recipe.run
        try:
            begun.writer.finish()
            if ranks.is_rank0():
                prune(self._folder.checkpoints, run.keep_checkpoints, best=self._state.best_steps())
        except OSError as error:
            return self._fail(error, begun.step, must=begun.must, is_best=begun.is_best)
        return True

    def _fail(self, error: OSError, step: int, *, must: bool, is_best: bool) -> bool:
        """Raise the error of a checkpoint that could not be saved, or say it and go on."""
        if is_best:
            del self._state.best[str(step)]
        if must and self._parts.recipe.run.on_save_error == "stop":
            raise error
        self._state.failed_saves += 1
        why = "because run.save_every is not set" if not must else "as run.on_save_error says"
        self._say(f"step {step}: {error}; continuing, {why}")
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.collect(wait=True)
        elif self._begun is not None and self._begun.thread is not None:
            self._begun.thread.join()
            if ranks.count() > 1:  # one of which may have gone
                self._begun.writer.give_up()
                return
            try:
                self._begun.writer.finish()
            except Exception as failure:
                self._say(f"step {self._begun.step}: {failure}")
