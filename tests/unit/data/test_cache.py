"""`lisatune cache` shows what is kept, and deletes it when asked."""

from pathlib import Path

import pytest

from lisatune.cli.app import main
from lisatune.data.records import RecordReader
from lisatune.data.store import prepare_source
from tiny_run import write_rows
from tiny_text import CHATML, byte_tokenizer


def test_the_cache_is_shown_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows[1].jsonl")
    prepare_source(RecordReader(str(rows)), byte_tokenizer(CHATML), folder=tmp_path / "cache")
    folder = ["--folder", str(tmp_path / "cache")]
    assert main(["cache", *folder]) == 0
    shown = capsys.readouterr().out
    assert "rows[1].jsonl" in shown
    assert f"1 prepared source, 3 KiB in {tmp_path / 'cache'}" in shown
    assert main(["cache", "--clear", *folder]) == 0
    assert capsys.readouterr().out == f"3 KiB deleted in {tmp_path / 'cache'}\n"
    assert main(["cache", *folder]) == 0
    assert capsys.readouterr().out == f"0 prepared sources, 0 KiB in {tmp_path / 'cache'}\n"


def test_a_recipe_and_the_environment_move_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"LISATUNE_TOKENS": "tokens", "LISATUNE_CACHE": "all", "XDG_CACHE_HOME": "user"}
    for name, folder in places.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr("sys.platform", "linux")
    for name, expected in zip(places, ("tokens", "all/tokens", "user/lisatune/tokens"), strict=True):
        assert main(["cache"]) == 0
        assert capsys.readouterr().out.endswith(f" in {tmp_path / expected}\n")
        monkeypatch.delenv(name)
