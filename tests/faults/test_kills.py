"""SIGKILL at any moment costs nothing but the steps since the last checkpoint. The long run: long.py."""

import random
import shutil
import signal
from functools import partial
from itertools import count
from pathlib import Path

import pytest

import tiny_run
from faults import kills, runs
from forks import ended, forked
from lisatune.data.records import RecordReader
from lisatune.data.rows import Rows
from lisatune.data.store import prepare_source
from tiny_text import CHATML, byte_tokenizer


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


def test_a_run_killed_at_any_change_of_the_cache_leaves_none_that_is_wrong(tmp_path: Path) -> None:
    rows, cache = tiny_run.write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"

    def read() -> str:
        reader = RecordReader(str(rows))
        prepared = prepare_source(reader, byte_tokenizer(CHATML), folder=cache, seed=0)
        assert prepared.prompts is not None
        return Rows.whole(prepared.documents).sha256 + prepared.prompts.tobytes().hex()

    def act(change: int) -> int:
        kills.before_file(change)(cache)
        read()
        return 0

    whole = read()
    for number in count(1):
        shutil.rmtree(cache)
        code = ended(forked(partial(act, number), tmp_path / "log"))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert read() == whole
        assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    assert number > 8, "folder, tokens, spans, digests, offsets, prompts, meta, name"


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
