"""SIGKILL at any moment costs nothing but the steps since the last checkpoint. The long run: long.py."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from faults import kills, runs
from forks import ended


@pytest.mark.parametrize(
    "variant",
    ["lisa, saved while it trains", "lisa, packed, evaluated", "lisa, codes, exact weights on disk"],
)
def test_killed_and_resumed_runs_end_bit_equal(variant: str, tmp_path: Path) -> None:
    series = kills.Series(tmp_path, variant)
    generator, tally = random.Random(variant), kills.Tally()
    for _ in range(2):
        tally.add(series.kill_and_compare(generator, ["before a file", *kills.KINDS, "before a file"]))
    assert tally.mismatches == []
    assert tally.finished == 2
    assert tally.kills["before a file"] >= 2, "on a busy machine a run can end before the clock strikes"
    assert tally.resumes >= 1


def test_a_run_killed_while_it_starts_or_overwrites_can_be_started_again(tmp_path: Path) -> None:
    recipe, run = runs.prepare(tmp_path, "lisa"), tmp_path / "run"
    for begun in ("never", "before"):
        for change in (2, 3, 5, 8):  # lock, recipe, environment, metrics; or old files, one by one
            flags = ["--overwrite"] if begun == "before" else []
            code = ended(runs.attempt(recipe, run, *flags, killer=kills.before_file(change)))
            assert code == -signal.SIGKILL
            code = ended(runs.attempt(recipe, run, "--overwrite", "run.steps=4"))
            assert code == 0, run.with_name("run.log").read_text()
            assert [path.name for path in run.iterdir() if ".tmp" in path.name] == []
            if begun == "never":
                shutil.rmtree(run)
