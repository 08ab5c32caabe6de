"""Prepared sources: tokenised once, found again, never stale, whole or not there."""

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forks import ended, forked
from lisatune.data import store
from lisatune.data.cache import clear, list_entries
from lisatune.data.records import RecordReader
from lisatune.data.rows import Rows
from lisatune.data.splitting import hash_prompt
from lisatune.data.store import Prepared, prepare_source
from tiny_run import write_rows
from tiny_text import CHATML, byte_tokenizer


def prepare(
    file: Path, cache: Path, *, tokenizer: Any = None, seed: int | None = None, **reading: Any
) -> Prepared:
    how = {key: reading.pop(key) for key in ("loss_on", "date") if key in reading}
    reader = RecordReader(str(file), **reading)
    return prepare_source(reader, tokenizer or byte_tokenizer(CHATML), folder=cache, seed=seed, **how)


def hash_of(prepared: Prepared) -> str:
    return Rows.whole(prepared.documents).sha256


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that were tokenised, one after the other."""
    found: list[str] = []
    encode = store.encode

    def count(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["source"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(store, "encode", count)
    return found


def test_a_source_is_tokenised_once_and_found_again_under_another_name(
    tmp_path: Path, counted: list[str]
) -> None:
    first = prepare(write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache")
    again = prepare(write_rows(tmp_path / "same.jsonl"), tmp_path / "cache")
    assert hash_of(again) == hash_of(first)
    assert (again.kind, again.is_chat, len(again.documents)) == ("alpaca", True, 12)
    assert counted == [str(tmp_path / "rows.jsonl")]


def test_whatever_changes_tokens_makes_another_entry(tmp_path: Path, counted: list[str]) -> None:
    file, cache = write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"
    dated = "{{ strftime_now('%d') }}" + CHATML
    ways: list[dict[str, Any]] = [
        {},
        {"tokenizer": byte_tokenizer(CHATML, merges=[("o", "u")])},
        {"tokenizer": byte_tokenizer(CHATML.replace("\n", " "))},
        {"loss_on": "all"},
        {"limit": 5},
        {"text_only": True},
        {"loss_on": ("user", "assistant")},
        {"fields": {"system": "input"}},
        {"tokenizer": byte_tokenizer(dated), "date": "2026-01-02"},
        {"tokenizer": byte_tokenizer(dated), "date": "2026-01-03"},
    ]
    for how in ways * 2:
        prepare(file, cache, **how)
    assert len(counted) == len(ways)
    write_rows(file, 13)
    assert len(prepare(file, cache).documents) == 13
    assert len(list_entries(cache)) == len(ways) + 1


def test_what_the_first_call_switches_off_in_a_tokenizer_changes_nothing(
    tmp_path: Path, counted: list[str]
) -> None:
    files = [write_rows(tmp_path / "a.jsonl"), write_rows(tmp_path / "b.jsonl", 5)]
    for _ in range(2):
        tokenizer = byte_tokenizer(CHATML)
        tokenizer.backend_tokenizer.enable_truncation(512)
        for file in files:
            prepare(file, tmp_path / "cache", tokenizer=tokenizer)
    assert counted == [str(file) for file in files]


def test_a_date_that_the_template_does_not_read_changes_nothing(tmp_path: Path, counted: list[str]) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    for day in ("2026-01-02", "2026-01-03"):
        prepare(file, tmp_path / "cache", date=day)
    assert len(counted) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "meta.json", "spans.bin"])
def test_an_entry_that_lacks_something_is_made_again(tmp_path: Path, counted: list[str], name: str) -> None:
    file, cache = write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"
    before = hash_of(prepare(file, cache))
    (entry,) = list_entries(cache)
    damaged = entry.path / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert hash_of(prepare(file, cache)) == before
    assert len(counted) == 2


def test_another_seed_adds_hashes_of_prompts_without_tokenising(tmp_path: Path, counted: list[str]) -> None:
    file, cache = write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"
    for seed in (0, 1, 1):
        prompts = prepare(file, cache, seed=seed).prompts
        assert prompts is not None
        expected = [hash_prompt(record, seed) for _, record in RecordReader(str(file))]
        assert prompts.tolist() == np.array(expected, "S16").tolist()
    assert len(counted) == 1


def test_warnings_and_bad_records_are_told_each_time(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", bad=(3,))
    with file.open("a") as rows:
        rows.write(json.dumps({"instruction": "a", "output": "", "score": 4}) + "\n")
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert prepare(file, tmp_path / "cache", on_bad_row="skip").skipped == 1
        texts = [str(each.message) for each in caught]
        assert len(texts) == 2
        assert "1 of 12 answers are empty" in texts[0]
        assert "nothing reads the field score" in texts[1]
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: .*'output' is missing"):
        prepare(file, tmp_path / "cache")


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write prepared tokens into the cache .*cache: File exists; name another"
    ):
        prepare(write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(
        OSError, match=r"No space left on device; free space, such as with `lisatune cache --clear`"
    ):
        prepare(write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def start(folder: Path, seconds: float) -> int:
    """Begin to prepare in another process; return when it is in the middle of writing."""
    sign, encode = folder / "begun", store.encode

    def slow(*args: Any, **kwargs: Any) -> Any:
        yield from encode(*args, **kwargs)
        sign.touch()
        time.sleep(seconds)
        (folder / "ended").touch()

    def act() -> int:
        store.encode = slow
        prepare(folder / "rows.jsonl", folder / "cache")
        return 0

    pid = forked(act, folder / "log")
    while not sign.exists():
        assert ended(pid, 0.02) is None, (folder / "log").read_text()
    return pid


def test_a_kill_in_the_middle_leaves_no_entry_and_the_next_run_cleans_up(
    tmp_path: Path, counted: list[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    pid = start(tmp_path, 600)
    assert list_entries(tmp_path / "cache") == []
    assert clear(tmp_path / "cache")[1] != []  # it is being made
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert [path.name[0] for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["."]
    fresh = hash_of(prepare(file, tmp_path / "other"))
    assert hash_of(prepare(file, tmp_path / "cache")) == fresh
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_second_run_waits_for_the_first_and_takes_its_tokens(
    tmp_path: Path, counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    pid = start(tmp_path, 0.3)
    prepared = prepare(file, tmp_path / "cache")
    assert (tmp_path / "ended").exists()
    assert ended(pid) == 0
    assert counted == []
    assert len(prepared.documents) == 12
    assert "waiting for another process, which prepares" in capsys.readouterr().out


def test_clearing_deletes_entries_alone_and_a_run_that_reads_one_goes_on(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepared = prepare(write_rows(tmp_path / "rows.jsonl"), cache)
    (cache / "mine.txt").write_text("not yours")
    (cache / f".{'0' * 24}.tmp-1").mkdir()
    before = hash_of(prepared)
    num_bytes, busy = clear(cache)
    assert num_bytes > 0 == len(busy)
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]
    assert hash_of(prepared) == before
    assert clear(tmp_path / "nowhere") == (0, [])


def test_a_large_vocabulary_is_kept_in_four_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens([f"<{index}>" for index in range(2**16)])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "<65500>"}) + "\n")
    rows = Rows.whole(prepare(file, tmp_path / "cache", tokenizer=tokenizer).documents)
    assert rows[0]["input_ids"].max() == tokenizer.convert_tokens_to_ids("<65500>") >= 2**16
