"""How a run ends before its time, and what it then says: Ctrl-C, and memory that runs out."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from lisatune.checkpoint import newest_checkpoint
from lisatune.runs import RunFolder

__all__ = ["interruptible", "way_back"]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read at the end of a step; the second stops at once."""
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def way_back(folder: RunFolder) -> Iterator[None]:
    """Say how to go on after Ctrl-C outside the loop, or twice in it, and when memory runs out."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        if folder.model.is_dir():
            raise KeyboardInterrupt(f"stopped after training; the model is in {folder.model}") from None
        last = newest_checkpoint(folder.checkpoints)
        way_back = f"--resume, from {last}" if last else "--overwrite, for no checkpoint was saved yet"
        raise KeyboardInterrupt(f"stopped at once; go on with the same command and {way_back}") from None
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise RuntimeError(
            f"the device's memory is full ({reason}); lower run.batch_size or data.max_length, or set "
            "run.activation_checkpointing: true"
        ) from error
