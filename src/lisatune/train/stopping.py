"""How a run ends early: Ctrl-C, SIGTERM, a closed terminal, and the sentence that tells how to continue."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lisatune.console import (
    Terminated,
    ending_signals,
    handle_signals,
    leave_closed_terminal,
    terminate,
)
from lisatune.distributed import ranks
from lisatune.runs.folder import RunFolder, is_untrained
from lisatune.runs.manifest import newest_checkpoint

__all__ = ["agree_to_stop", "explain_interruption", "interruptible", "resume_hint"]

Stop = type[KeyboardInterrupt]
"""The kind of error that a run ends with after Ctrl-C, or after SIGTERM or SIGHUP."""


@contextmanager
def interruptible() -> Iterator[Callable[[], Stop | None]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a flag, read after a step. The second stops at once.

    Yields:
        A function that returns the kind of error to end with, or None as long as no signal came.
    """
    asked: Stop | None = None

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        leave_closed_terminal(signum)
        is_ctrl_c = signum == signal.SIGINT
        asked = KeyboardInterrupt if is_ctrl_c else Terminated
        name = "Ctrl-C" if is_ctrl_c else signal.Signals(signum).name
        notice = f"\nlisatune: stopping after this step; {name} again stops at once\n"
        with suppress(
            OSError, AttributeError
        ):  # Ctrl-C has ended the `tee` that reads this too; or it is closed
            os.write(
                sys.stderr.fileno(), notice.encode()
            )  # the signal may have come inside a write of stderr
        signal.signal(signum, signal.default_int_handler if is_ctrl_c else terminate)

    with handle_signals(dict.fromkeys([signal.SIGINT, *ending_signals()], press)):
        yield lambda: asked


@contextmanager
def explain_interruption(folder: RunFolder) -> Iterator[None]:
    """Say how to continue after a signal that came outside the loop, or twice inside it."""
    before = _identify(folder.model)
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        if _identify(folder.model) != before:
            raise type(stop)(f"stopped after training; the model is in {folder.model}") from None
        raise type(stop)(f"stopped at once; {resume_hint(folder)}") from None


def _identify(model: Path) -> tuple[int, int] | None:
    """Tell a written model from the one that a finished run had before it was made longer; None: no model."""
    if not model.is_dir():
        return None
    found = model.stat()
    return found.st_ino, found.st_mtime_ns


def resume_hint(folder: RunFolder) -> str:
    """Tell how to continue a run that was stopped."""
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None and is_untrained(folder.path):
        return "nothing was trained yet, so start again with the same command"
    if newest is None:
        return "no checkpoint was saved, so start over with the same command and --overwrite"
    return f"resume from {newest} with the same command and --resume"


def agree_to_stop(asked: Callable[[], Stop | None]) -> Callable[[], Stop | None]:
    """Let all ranks stop when one of them is asked to. Every rank must call the result equally often."""
    if ranks.count() == 1:
        return asked
    kinds: tuple[Stop | None, ...] = (None, KeyboardInterrupt, Terminated)
    return lambda: kinds[ranks.max_over_ranks(kinds.index(asked()))]
