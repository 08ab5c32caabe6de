"""Processes forked from this one, which has done the imports: they take six CPU seconds."""

import gc
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path


def forked(act: Callable[[], int], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Call a function in a forked process whose output goes to a file; its result is the exit code.

    Args:
        act: what the process does.
        log: gets its output and its traceback.
        environment: variables that it has in addition.

    Returns:
        The number of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # a collection would write to all that this process shares with the other, and so copy it
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment or {})
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, within: float | None = None) -> int | None:
    """Wait for a process; return its exit code, negative for a signal, or None if it still runs."""
    return first_ended([pid], within).get(pid)


def first_ended(pids: Collection[int], within: float | None = None) -> dict[int, int]:
    """Wait until a process ends; return the exit codes of those that have, none if all still run."""
    watched = {os.pidfd_open(pid): pid for pid in pids}
    try:
        over = select.select([*watched], [], [], within)[0]
    finally:
        for file in watched:
            os.close(file)
    pids = [watched[file] for file in over]
    return {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
