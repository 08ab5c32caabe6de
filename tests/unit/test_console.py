"""Text for people, and overrides as they stand on a command line."""

import time
from typing import Any

import pytest

from lisatune.console import first_line, follow, is_override, join_overrides, split_override


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("one"), "one"),
        (ValueError("one \ntwo"), "one"),
        (ValueError("\n  one\r\ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: BaseException, says: str) -> None:
    assert first_line(error) == says


@pytest.mark.parametrize(
    ("given", "done", "says"),
    [
        ({"total": 400}, 100, "work: 100 of 400, 3:00 left"),
        ({"total": 400}, 400, "work: 400 of 400, 0:00 left"),
        ({"share": lambda: 0.75}, 4000, "work: 4,000, 0:20 left"),
        ({}, 4000, "work: 4,000, -:-- left"),
    ],
)
def test_long_work_says_each_half_minute_how_long_the_rest_takes(
    given: dict[str, Any],
    done: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with follow("work", **given) as advance:
        now += 29
        advance(1)
        now += 31
        advance(done)
        now += 2
        advance(done + 1)
    assert capsys.readouterr().out == f"{says}\n"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--run.steps", "5"], ["run.steps=5"]),
        (["--run.steps=5", "run.seed=1"], ["run.steps=5", "run.seed=1"]),
        (["--optimizer.lr", "-1"], ["optimizer.lr=-1"]),
        (["--data.packing"], ["data.packing=true"]),
        (["--data.packing", "--resume"], ["data.packing=true", "--resume"]),
        (["--data.packing", "run.steps=5"], ["data.packing=true", "run.steps=5"]),
        (["--run.batch-size", "4"], ["run.batch_size=4"]),
        (["--run.steps", "", "run.seed=1"], ["run.steps=", "run.seed=1"]),
        (["--general", "text.jsonl", "", "-h"], ["--general", "text.jsonl", "", "-h"]),
        (
            ["train", "a.yaml", "--model.name", "x/y", "--debug"],
            ["train", "a.yaml", "model.name=x/y", "--debug"],
        ),
    ],
)
def test_overrides_may_be_written_as_options(given: list[str], meant: list[str]) -> None:
    assert join_overrides(given) == meant


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run.steps=5", ("run", "steps", "5")),
        ("--run.steps=5", ("run", "steps", "5")),
        ("run.batch-size=5", ("run", "batch_size", "5")),
        ("data.train=a=b\nc", ("data", "train", "a=b\nc")),
        ("run.output=", ("run", "output", "")),
        ("--data.packing", ("data", "packing", None)),
        ("steps=5", None),
        ("runs/a.b=c", None),
        ("a=b.yaml", None),
        ("", None),
    ],
)
def test_an_override_is_split_into_section_key_and_value(
    text: str, parts: tuple[str, str, str | None] | None
) -> None:
    assert split_override(text) == parts
    assert is_override(text) == (parts is not None and parts[2] is not None)
