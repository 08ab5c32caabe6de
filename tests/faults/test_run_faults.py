"""SIGTERM, two runs in one folder, clocks that jump, data that changes, numbers that are not finite."""

import importlib
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import lisatune.runs.folder
import lisatune.train.loop
from faults import kills, runs
from faults.kills import assert_as_undisturbed
from faults.runs import at_steps, train
from forks import ended
from lisatune.methods.step import TrainingStep

Say = Callable[[], str]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> kills.Series:
    return kills.Series(tmp_path_factory.mktemp("series"), "lisa, packed, evaluated")


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Say:
    """Return the last line of standard error."""
    capfd.readouterr()
    return lambda: capfd.readouterr().err.splitlines()[-1]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- SIGTERM


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def term_in(name: str, call: int) -> None:
    """Send SIGTERM to this process in the `call`-th call of a function in lisatune.train, from 1."""
    file, _, function = name.partition(".")
    module = importlib.import_module(f"lisatune.train.{file}")
    calls, act = 0, getattr(module, function)

    def pressed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            term()
        return act(*arguments)

    setattr(module, function, pressed)


@pytest.mark.parametrize(
    ("function", "call", "says", "resumes"),
    [
        (
            "loop._step",
            5,
            "stopped after step 5 of 8, which is saved; resume from ",
            True,
        ),
        (
            "evaluation.held_out",
            2,
            "stopped after step 3 of 8, which is saved; resume from ",
            True,
        ),
        (
            "evaluation.answer_samples",
            1,
            "stopped at once; nothing was trained yet, so start again with the same command",
            False,
        ),
        ("loop.assemble", 1, "interrupted", False),
    ],
)
def test_sigterm_saves_and_ends_with_143_and_the_run_goes_on_bit_equal(
    function: str, call: int, says: str, resumes: bool, series: kills.Series, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    pid = runs.attempt(series.recipe, run, "run.save_every=null", killer=lambda run: term_in(function, call))
    assert ended(pid, within=60) == 143
    assert log.read_text().splitlines()[-1].startswith(f"lisatune: {says}")
    flags = ["--resume"] if resumes else []
    assert ended(runs.attempt(series.recipe, run, *flags)) == 0, log.read_text()
    assert_as_undisturbed(series, run)


def test_sigterm_from_outside_ends_the_process_within_ten_seconds(
    series: kills.Series, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    read, write = os.pipe()
    pid = runs.attempt(
        series.recipe, run, "run.steps=5000", killer=lambda run: at_steps(_2=lambda: os.write(write, b"."))
    )
    assert os.read(read, 1) == b"."
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, within=10) == 143
    assert "which is saved" in (tmp_path / "run.log").read_text().splitlines()[-1]


def test_a_second_sigterm_stops_at_once(series: kills.Series, tmp_path: Path) -> None:
    def twice(run: Path) -> None:
        at_steps(_2=lambda: (term(), term()))

    run = tmp_path / "run"
    assert ended(runs.attempt(series.recipe, run, killer=twice)) == 143
    last = run / "checkpoints" / "step-000002"
    line = (tmp_path / "run.log").read_text().splitlines()[-1]
    assert line == f"lisatune: stopped at once; resume from {last} with the same command and --resume"
    assert ended(runs.attempt(series.recipe, run, "--resume")) == 0
    assert_as_undisturbed(series, run)


def test_sigterm_on_a_full_disk_says_from_where_to_go_on(
    series: kills.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Say
) -> None:
    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        make_step = lisatune.train.loop._step

        def step(parts: Any, done: Any, folder: Any) -> Any:
            if done.step == 2:
                patch.setattr("lisatune.train.saving.begin_checkpoint", no_space)
                term()
            return make_step(parts, done, folder)

        patch.setattr(lisatune.train.loop, "_step", step)
        assert train(series.recipe, tmp_path / "run", "run.on_save_error=continue") == 143
    last = tmp_path / "run" / "checkpoints" / "step-000002"
    assert said().endswith(
        f"step 3 of 8, which could not be saved; resume from {last} with the same command and --resume"
    )


# ---- kills at the end


def test_a_run_that_was_killed_after_its_model_was_written_is_not_advised_to_delete_it(
    series: kills.Series, tmp_path: Path, said: Say
) -> None:
    run = tmp_path / "run"

    def killer(run: Path) -> None:
        lisatune.runs.folder.RunFolder.write_summary = lambda *_: runs.die()  # type: ignore[method-assign]

    assert ended(runs.attempt(series.recipe, run, "run.save_every=0", killer=killer)) == -signal.SIGKILL
    before = files(run)
    for flag in ("--resume", "--resume=auto"):
        assert train(series.recipe, run, "run.save_every=0", flag) == 2
        assert said().endswith(
            f"the run in {run} has no checkpoint to continue from, and its model is written; to train its "
            f"model further, set model.name={run / 'model'} and name another run.output"
        )
    assert files(run) == before


# ---- held-out losses


@pytest.mark.parametrize("when", ["after an evaluated step was saved", "after the last evaluation"])
def test_a_held_out_loss_is_logged_once_however_the_run_was_killed(
    when: str, series: kills.Series, tmp_path: Path
) -> None:
    def die_at_the_end(run: Path) -> None:
        lisatune.train.loop.RunFolder.write_summary = lambda *_: runs.die()

    killer = die_at_the_end if "last" in when else kills.before_step(6)
    run = tmp_path / "run"
    assert ended(runs.attempt(series.recipe, run, killer=killer)) == -signal.SIGKILL
    assert ended(runs.attempt(series.recipe, run, "--resume")) == 0
    assert_as_undisturbed(series, run)


# ---- two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(
    series: kills.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Say
) -> None:
    run = tmp_path / "run"
    read, write = os.pipe()

    def stop_in_the_middle(run: Path) -> None:
        at_steps(_3=lambda: (os.write(write, b"."), os.kill(os.getpid(), signal.SIGSTOP)))

    pid = runs.attempt(series.recipe, run, killer=stop_in_the_middle)
    try:
        assert os.read(read, 1) == b"."
        before = files(run)
        monkeypatch.setattr(lisatune.train.loop, "assemble", pytest.fail)  # refused before anything loads
        for flag in ("--resume", "--overwrite"):
            assert train(series.recipe, run, flag) == 2
            assert f"run folder {run} is in use by process {pid} on " in said()
        assert files(run) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    monkeypatch.undo()
    assert train(series.recipe, run, "--resume") == 0
    assert_as_undisturbed(series, run)


# ---- clocks, data


def test_a_clock_that_jumps_changes_nothing(series: kills.Series, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def jump(run: Path) -> None:
        generator, now = random.Random(0), time.time
        time.time = lambda: now() + generator.choice([-1, 1]) * generator.uniform(0, 1e9)
        time.time_ns = lambda: int(time.time() * 1e9)

    assert (
        ended(runs.attempt(series.recipe, run, killer=lambda run: (jump(run), kills.before_step(5)(run))))
        == -9
    )
    for age, path in enumerate(sorted((run / "checkpoints").iterdir())):
        os.utime(path, (age * -1e6 + 1e9, age * -1e6 + 1e9))  # the newest is the oldest by its date
    assert ended(runs.attempt(series.recipe, run, "--resume", killer=jump)) == 0
    assert_as_undisturbed(series, run)


@pytest.mark.parametrize("row", [0, 13])
def test_data_that_changed_under_a_run_is_noticed(
    row: int, series: kills.Series, tmp_path: Path, said: Say
) -> None:
    run, rows = tmp_path / "run", series.folder / "rows.jsonl"
    shutil.copytree(series.folder / "straight", run)
    (run / "summary.json").unlink()  # as if it had been killed before its end
    before, lines = files(run), rows.read_text().splitlines(keepends=True)
    changed = json.loads(lines[row])
    changed["output"] = changed["output"].replace("1", "2")
    try:
        rows.write_text("".join([*lines[:row], json.dumps(changed) + "\n", *lines[row + 1 :]]))
        assert train(series.recipe, run, "--resume") == 2
        error = said()
    finally:
        rows.write_text("".join(lines))
    assert error.startswith("lisatune: error: data.")
    assert f"differs from what the run in {run} began with" in error
    assert files(run) == before
    rows.write_text("".join(line.rstrip() + " \n" for line in lines))  # the same records, written differently
    try:
        assert train(series.recipe, run, "--resume") == 0
    finally:
        rows.write_text("".join(lines))


# ---- numbers that are not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_left_out_up_to_a_bound(
    what: str, series: kills.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Say
) -> None:
    backward, steps = TrainingStep.backward, []

    def spoilt(self: TrainingStep, batches: Any) -> torch.Tensor:
        loss = backward(self, batches)
        if isinstance(loss, FakeTensor):  # the plan's
            return loss
        steps.append(loss)
        if len(steps) in bad and what == "gradient":
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[3] = math.inf
        return loss * math.nan if len(steps) in bad and what == "loss" else loss

    monkeypatch.setattr(TrainingStep, "backward", spoilt)
    options = ["run.on_nonfinite=skip", "run.max_skipped_steps=2"]
    bad = {2, 3, 5, 6}  # never three in a row
    assert train(series.recipe, tmp_path / "fine", *options) == 0
    assert json.loads((tmp_path / "fine" / "summary.json").read_text())["skipped_steps"] == 4
    steps.clear()
    bad = {3, 4, 5}
    run = tmp_path / "run"
    assert train(series.recipe, run, *options) == 2
    error = said()
    value = "loss nan" if what == "loss" else "gradient norm inf"
    assert error.startswith("lisatune: error: step 5: loss ")
    assert value in error
    assert "after 2 steps in a row that were left out (run.max_skipped_steps)" in error
    assert f"the last good checkpoint is {run}/checkpoints/step-000004" in error
    steps.clear()
    bad = {1}  # a resumed run continues the count
    assert train(series.recipe, run, *options, "--resume") == 2
    steps.clear()
    assert train(series.recipe, run, *options, "run.max_skipped_steps=3", "--resume") == 0


def test_skip_is_not_advised_to_a_run_that_updates_in_backward_and_skips(
    series: kills.Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Say
) -> None:
    monkeypatch.setattr(TrainingStep, "clip", lambda step: torch.tensor(math.inf))
    options = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null", "run.check_memory=false"]
    assert train(series.recipe, tmp_path / "run", *options, "run.on_nonfinite=skip") == 2
    error = said()
    assert "optimizer.in_backward has put it into the weights" in error
    assert "lower optimizer.lr, or set optimizer.in_backward: false" in error
