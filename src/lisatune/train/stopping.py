"""How a run ends before its time: Ctrl-C and SIGTERM, and what it then says."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lisatune.console import Terminated
from lisatune.distributed import ranks
from lisatune.runs.folder import RunFolder
from lisatune.runs.manifest import newest_checkpoint

__all__ = [
    "agreed_stop",
    "interruptible",
    "terminable",
    "way_back",
]

Stop = type[KeyboardInterrupt]


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, so that what is half written is taken back before the process ends."""
    with _handling({signal.SIGTERM: _terminate}):
        yield


@contextmanager
def interruptible() -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, read at the end of a step; the second stops at once.

    Yields:
        What tells the kind of error to end with, None as long as neither came.
    """
    asked: type[KeyboardInterrupt] | None = None

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        is_term = signum == signal.SIGTERM
        asked = Terminated if is_term else KeyboardInterrupt
        name = "SIGTERM" if is_term else "Ctrl-C"
        sys.stderr.write(f"\nlisatune: stopping after this step; {name} again stops at once\n")
        signal.signal(signum, _terminate if is_term else signal.default_int_handler)

    with _handling({signal.SIGINT: press, signal.SIGTERM: press}):
        yield lambda: asked


@contextmanager
def way_back(folder: RunFolder) -> Iterator[None]:
    """Say how to go on after Ctrl-C or SIGTERM outside the loop, or twice in it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        if folder.model.is_dir():
            raise type(stop)(f"stopped after training; the model is in {folder.model}") from None
        last = newest_checkpoint(folder.checkpoints)
        way_back = f"--resume, from {last}" if last else "--overwrite, for no checkpoint was saved yet"
        raise type(stop)(f"stopped at once; go on with the same command and {way_back}") from None


@contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def agreed_stop(asked: Callable[[], Stop | None]) -> Callable[[], Stop | None]:
    """Let all ranks stop where one is asked to; every rank must call the result as often."""
    if ranks.count() == 1:
        return asked
    kinds: tuple[Stop | None, ...] = (None, KeyboardInterrupt, Terminated)
    return lambda: kinds[ranks.max_over_ranks(kinds.index(asked()))]
