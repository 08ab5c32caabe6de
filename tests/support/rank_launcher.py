"""Starts the ranks of a test over gloo, without a launcher: forked from this process."""

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count as count_up
from pathlib import Path
from typing import Any

import rank_worker
from forks import ended, first_ended, forked

_numbers = count_up()


def start(
    count: int, act: Callable[[], int], folder: Path, environments: Sequence[Mapping[str, str]] = ()
) -> list[int]:
    """Call a function on `count` ranks, whose output goes to `folder`/rank-N.log.

    Args:
        count: number of ranks.
        act: what each does; the result is its exit code.
        folder: gets their output.
        environments: variables that each has beside those that name its rank and port.

    Returns:
        The numbers of their processes.
    """
    port = find_port()

    def rank() -> int:
        warnings.resetwarnings()  # a process of its own would not make errors of them
        if "accelerate" in sys.modules:  # an earlier test may have used it in one process
            from accelerate.state import AcceleratorState, PartialState

            PartialState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
        return act()

    port_and_count = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = []
    for number in range(count):
        given = environments[number] if environments else {}
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        pids.append(forked(rank, folder / f"rank-{number}.log", {**given, **port_and_count, **own}))
    return pids


def find_port() -> int:
    """Find a free port, another one in each process that asks at the same time.

    The system's own choice may be given to another process before the ranks listen there, and then ranks of
    two tests meet. These ports are below those that the system chooses from.
    """
    for number in _numbers:
        port = 10_000 + (os.getpid() * 101 + number) % 20_000
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def launch(
    count: int, folder: Path, jobs: list[dict[str, Any]], *, dies: int | None = None
) -> list[list[Any]]:
    """Make the jobs of `rank_worker` on `count` ranks; return each rank's results.

    The rank `dies` is killed in the last job, of which it then has the result None.
    """
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    wait_for_all(start(count, lambda: rank_worker.main(path), folder), folder, dies=dies)
    results = [json.loads(path.with_name(f"{path.name}.{number}").read_text()) for number in range(count)]
    return [[*each, *[None] * (len(jobs) - len(each))] for each in results]


def wait_for_all(pids: Sequence[int], folder: Path, *, dies: int | None = None, within: float = 400) -> None:
    """Wait until the ranks of `start` end; the first that fails ends the others, and its output is shown.

    Args:
        pids: the ranks' processes.
        folder: has their output.
        dies: the rank that must be killed; the exit code of the others must be 0.
        within: seconds until one more of them must end.
    """
    running = {pid: number for number, pid in enumerate(pids)}
    try:
        while running:
            codes = first_ended(running, within)
            over = {running.pop(pid): code for pid, code in codes.items()}
            wrong = {n: code for n, code in over.items() if code != (-signal.SIGKILL if n == dies else 0)}
            hang = [] if over else sorted(running.values())
            shown = {n: (folder / f"rank-{n}.log").read_text() for n in (*wrong, *hang)}
            assert over, f"ranks hang: {shown}"
            assert not wrong, f"exit codes of ranks {wrong}: {shown}"
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
