"""What passes between a process and its terminal: overrides as arguments, short text, and the exit code.

Needs no torch, so that `lisatune --help` is fast.
"""

import math
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "BAD_INPUT",
    "DEFECT",
    "INTERRUPTED",
    "TERMINATED",
    "USER_ERRORS",
    "Terminated",
    "byte_text",
    "clock_text",
    "count_text",
    "exit_code",
    "expand_home",
    "first_line",
    "follow",
    "grid",
    "handle_signals",
    "is_override",
    "join_overrides",
    "percent_text",
    "plural",
    "print_line",
    "ranges_text",
    "split_override",
    "terminal",
    "terminate",
    "time_left",
]

WIDEST = 100
"""Columns of the widest output."""

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_UPDATES = 30, 0.2
"""Seconds between two lines on long work, or on a terminal between two states of the live line."""


def terminal() -> "Console":
    """Make a console on standard output, at most 100 columns wide.

    If its reader goes, what follows is dropped and the command goes on: Ctrl-C ends the `tee` behind a run
    too, and the run must still save a checkpoint.
    """
    from rich.console import Console  # rich comes with lisatune[train]; the other functions do without

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich's would end the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    console = Terminal(highlight=False)
    console.width = min(console.width, WIDEST) if console.is_terminal else WIDEST
    return console


@contextmanager
def follow(
    what: str, total: int | None = None, *, share: Callable[[], float] = lambda: 0.0
) -> Iterator[Callable[[int], None]]:
    """Show how far a long piece of work is, and how long the rest will take.

    Args:
        what: its name.
        total: number of its parts; None if it is unknown.
        share: returns which share of it is done, 0 to 1, if the number of parts is unknown.

    Yields:
        A function to call with the number of parts done. If the output is not a terminal, a line is printed
        each half minute, so that short work prints none.
    """
    console = terminal()
    began = said = shown = time.monotonic()
    status = console.status(what) if console.is_terminal else None

    def describe(done: int, now: float) -> str:
        rest = time_left(now - began, done / total if total else share())
        return f"{what}: {done:,}{f' of {total:,}' if total else ''}, {rest}"

    def advance(done: int) -> None:
        nonlocal said, shown
        now = time.monotonic()
        if status is not None and now - shown >= SECONDS_BETWEEN_UPDATES:
            shown = now
            status.update(describe(done, now))
        elif status is None and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            console.print(describe(done, now), soft_wrap=True, markup=False)

    with status or nullcontext():
        yield advance


def clock_text(seconds: float) -> str:
    """Write a time as 1:05 or 2:03:45; an unknown one as -:--."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(seconds: float, share: float) -> str:
    """Write how long the rest of some work will take: 1:05 left.

    Args:
        seconds: wall time of what is done.
        share: how much of the work that is, 0 to 1; 0 if it is unknown.
    """
    return f"{clock_text(seconds * (1 / share - 1) if share else math.nan)} left"


def count_text(count: float) -> str:
    """Abbreviate a count: 134.5M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.99995 * limit:
            return f"{count / limit:.1f}{unit}"
    return f"{count:.0f}"


def byte_text(num_bytes: float) -> str:
    """Write bytes in GiB, MiB or KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def percent_text(share: float, error: float | None = None, *, sign: str = "") -> str:
    """Write a share and its standard error in percent: 51.0 ± 3.5; with sign "+" as +51.0 ± 3.5."""
    return f"{100 * share:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print plain text and a line's end at once, to standard output or another stream."""
    stream = stream or sys.stdout
    stream.write(text + "\n")
    stream.flush()


def grid(rows: "Sequence[tuple[str, str | Text]]") -> "Table":
    """Lay out names and their values in two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return table


def ranges_text(numbers: Sequence[int]) -> str:
    """Abbreviate increasing numbers as ranges: 0–3 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs]
    return " ".join(texts) or "none"


def plural(count: int, word: str) -> str:
    """Write a count with its noun: 1 row, 2 rows."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def expand_home(path: str) -> str:
    """Write the home folder out in a path that begins with ~, as a shell does: every path a user gives.

    Raises:
        ValueError: there is no such user.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"there is no home folder for {path}; write the path out") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where the message is empty.

    The system's number of an error, such as [Errno 13], is left out.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
    return re.sub(r"\[Errno -?\d+\] ", "", line)


def split_override(text: str) -> tuple[str, str, str | None] | None:
    """Split `section.key=value`, which may also be written `--section.key=value`.

    Returns:
        Section, key and value. The value is None if there is no `=`. None for a text of another form.
    """
    match = re.fullmatch(r"(?:--)?([\w-]+)\.([\w-]+)(?:=(.*))?", text, flags=re.DOTALL)
    return None if match is None else (match[1], match[2].replace("-", "_"), match[3])


def is_override(text: str) -> bool:
    """Whether a command-line argument is an override with its value, and not a file or an option."""
    override = split_override(text)
    return override is not None and override[2] is not None


def join_overrides(arguments: Sequence[str]) -> list[str]:
    """Rewrite overrides that are written as options: `--run.steps 5` becomes `run.steps=5`.

    An option without a value means true: `--data.packing` becomes `data.packing=true`. All other arguments
    are returned unchanged.
    """
    joined = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        override = split_override(argument) if argument.startswith("--") else None
        if override is None:
            joined.append(argument)
            continue
        section, key, value = override
        if value is None:
            is_flag = not rest or rest[0].startswith("--") or is_override(rest[0])
            value = "true" if is_flag else rest.pop(0)
        joined.append(f"{section}.{key}={value}")
    return joined


DEFECT, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes. The last two are those of a process that SIGINT or SIGTERM ended."""

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
"""Errors with a sentence for the user: bad input, or a machine that lacks something."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. Code that treats it like Ctrl-C need not tell them apart."""


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return BAD_INPUT if isinstance(error, USER_ERRORS) else DEFECT


@contextmanager
def handle_signals(
    handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Install signal handlers, and put the former ones back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ending_signals() -> list[signal.Signals]:
    """Return SIGTERM, and SIGHUP, which a closed terminal sends, unless it is ignored as by `nohup`."""
    ignores = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignores else [signal.SIGTERM, signal.SIGHUP]


def terminate(signum: int, frame: FrameType | None) -> None:
    """Raise `Terminated`, so that half-written files are removed and other processes end before this one."""
    leave_closed_terminal(signum)
    raise Terminated


def leave_closed_terminal(signum: int) -> None:
    """After SIGHUP write no more to the terminal, which would fail; output to files and pipes goes on."""
    if signum != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(file).st_mode):
                os.dup2(nowhere, file)
