"""A test on several ranks must end, and say why, when one of them fails."""

import os
import signal
from pathlib import Path

import pytest

from rank_launcher import start, wait_for_all


def hang_or_fail() -> int:
    """Wait on rank 0 for a message that never comes; fail on rank 1."""
    if os.environ["RANK"] == "0":
        signal.pause()
    print("the disk is full")
    return 3


def test_failing_rank_ends_the_others_and_its_output_is_shown(tmp_path: Path) -> None:
    pids = start(2, hang_or_fail, tmp_path)
    with pytest.raises(AssertionError, match=r"\{1: 3\}.*the disk is full"):
        wait_for_all(pids, tmp_path, within=100)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], 0)


def test_ranks_that_hang_are_named_with_their_output(tmp_path: Path) -> None:
    pids = start(1, hang_or_fail, tmp_path)
    with pytest.raises(AssertionError, match=r"ranks hang: \{0: ''\}"):
        wait_for_all(pids, tmp_path, within=0.1)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], 0)
