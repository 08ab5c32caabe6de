"""Starts the ranks of a test over gloo, without a launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent


def launch(
    count: int, folder: Path, jobs: list[dict[str, Any]], *, dies: int | None = None
) -> list[list[Any]]:
    """Make the jobs on `count` ranks; return each rank's results.

    The rank `dies` is killed in the last job, of which it then has the result None.
    """
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
    common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "rank_worker.py"), str(path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        texts = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = [-signal.SIGKILL if rank == dies else 0 for rank in range(count)]
    assert [process.returncode for process in processes] == expected, "\n".join(texts)
    results = [json.loads(path.with_name(f"{path.name}.{rank}").read_text()) for rank in range(count)]
    return [[*each, *[None] * (len(jobs) - len(each))] for each in results]
