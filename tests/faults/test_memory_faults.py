"""A run that has no memory left ends in one sentence that says what to change, and keeps every checkpoint."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lisatune.memory.check
import lisatune.train.loop
from faults import kills, runs
from faults.kills import assert_as_undisturbed
from faults.runs import at_steps, train
from forks import ended
from lisatune.memory.check import is_out_of_memory
from lisatune.memory.process import limit_bytes


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> kills.Series:
    return kills.Series(tmp_path_factory.mktemp("series"), "lisa")


def test_the_sentence_names_what_the_plan_suggests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore")

    recipe = runs.prepare(tmp_path, "full")
    monkeypatch.setattr(lisatune.train.loop, "_step", full)
    monkeypatch.setattr(lisatune.memory.check, "limit_bytes", lambda device: 60 * 2**20)
    capfd.readouterr()
    assert train(recipe, tmp_path / "run", "run.batch_size=64", "data.max_length=256") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == (
        "lisatune: error: memory ran out (CUDA out of memory); `lisatune plan` suggests run.batch_size=32 "
        "run.accumulation=2 for 60 MiB"
    )


ALLOCATIONS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.zeros(2**38),
    "numpy": lambda: np.ones(2**38),
    "python": lambda: bytearray(2**40),
}


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_a_limit_on_the_process_is_one_sentence_and_costs_no_checkpoint(
    kind: str, series: kills.Series, tmp_path: Path
) -> None:
    def limit(run: Path) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        lisatune.memory.check._what_fits = lambda recipe: (
            f"the limit is {limit_bytes(torch.device('cpu')) == most}"
        )
        at_steps(_2=ALLOCATIONS[kind])

    run, log = tmp_path / "run", tmp_path / "run.log"
    assert ended(runs.attempt(series.recipe, run, killer=limit)) == 2, log.read_text()
    line = log.read_text().splitlines()[-1]
    assert line.startswith("lisatune: error: memory ran out (")
    assert line.endswith("; the limit is True")
    assert ended(runs.attempt(series.recipe, run, "--resume")) == 0
    assert_as_undisturbed(series, run)


def test_advice_that_fails_does_not_hide_what_happened(
    series: kills.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(lisatune.train.loop, "assemble", full)
    monkeypatch.setattr(lisatune.memory.check.subprocess, "run", full)
    assert train(series.recipe, tmp_path / "run") == 2
    says = (
        "memory ran out (no memory left); lower run.batch_size or data.max_length, or set run.activation_che"
    )
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
