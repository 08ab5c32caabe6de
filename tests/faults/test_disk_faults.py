"""Checkpoints on disks that fill up, turn read-only, tear and rot: an earlier one is left to resume from."""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import kills, mounts, runs
from faults.kills import assert_as_undisturbed
from faults.runs import at_steps, train
from forks import ended
from lisatune.cli import app
from lisatune.runs.manifest import FILES

TWO = "run.save_every=2"


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> kills.Series:
    return kills.Series(tmp_path_factory.mktemp("series"), "lisa")


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not mounts.can_mount(tmp_path_factory.mktemp("mount")):
        pytest.skip("no right to mount a disk here")


def assert_intact(run: Path, name: str, log: Path) -> None:
    assert [path.name for path in (run / "checkpoints").iterdir()] == [name], log.read_text()


# ---- no space, no permission to write


@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_gives_out_costs_the_steps_since_the_last_checkpoint(
    fault: str, series: kills.Series, tmp_path: Path
) -> None:
    def act(disk: mounts.Disk) -> int:
        run = disk.path / "run"
        folder = run / "checkpoints"
        act = {
            "full": lambda: disk.fill(left=60_000),
            "read-only": lambda: disk.read_only(run / "checkpoints"),
        }[fault]
        at_steps(_2=act)
        code = train(series.recipe, run, TWO)
        shutil.copytree(run, tmp_path / "failed", ignore=shutil.ignore_patterns("ballast"))
        disk.writable(folder) if fault == "read-only" else disk.empty()
        assert code == 2, code
        assert train(series.recipe, run, "run.save_every=1", "--resume") == 0
        shutil.copytree(run, tmp_path / "resumed")
        return 0

    assert mounts.on_a_disk(tmp_path, 2**21, act) == 0, (tmp_path / "log").read_text()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "lisatune: error" in line]
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
    assert len(said) == 1
    assert reason in said[0]
    assert_intact(tmp_path / "failed", "step-000002", tmp_path / "log")
    assert_as_undisturbed(series, tmp_path / "resumed")


@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_run_may_go_on_without_saving_until_the_disk_is_back(
    fault: str, series: kills.Series, tmp_path: Path
) -> None:
    def act(disk: mounts.Disk) -> int:
        run = disk.path / "run"
        if fault == "full":
            at_steps(_2=lambda: disk.fill(left=60_000), _5=disk.empty)
        else:
            folder = run / "checkpoints"
            at_steps(_2=lambda: disk.read_only(folder), _5=lambda: disk.writable(folder))
        code = train(series.recipe, run, "run.on_save_error=continue")
        shutil.copytree(run, tmp_path / "run")
        return code

    assert mounts.on_a_disk(tmp_path, 2**21, act) == 0, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_saves"] == 3
    log = (tmp_path / "log").read_text()
    assert log.count("continuing, as run.on_save_error says") >= 3
    assert "3 checkpoints: see the lines above" in log
    series.straight["checkpoint/state.json"]["extra"]["failed_saves"] = 3
    try:
        assert_as_undisturbed(series, tmp_path / "run")
    finally:
        series.straight["checkpoint/state.json"]["extra"]["failed_saves"] = 0


@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_cache_of_tokens_that_cannot_be_written_is_one_sentence_and_one_that_is_there_is_read(
    fault: str, series: kills.Series, tmp_path: Path
) -> None:
    def act(disk: mounts.Disk) -> int:
        cache = disk.path / "cache"
        cache.mkdir()
        disk.fill(left=0) if fault == "full" else disk.read_only(cache)
        assert train(series.recipe, tmp_path / "refused", f"data.cache={cache}") == 2
        disk.empty() if fault == "full" else disk.writable(cache)
        assert train(series.recipe, tmp_path / "prepared", f"data.cache={cache}") == 0
        disk.fill(left=0) if fault == "full" else disk.read_only(cache)
        return train(series.recipe, tmp_path / "run", f"data.cache={cache}")

    assert mounts.on_a_disk(tmp_path, 2**21, act) == 0, (tmp_path / "log").read_text()
    (said,) = [line for line in (tmp_path / "log").read_text().splitlines() if "lisatune: error" in line]
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
    cache = tmp_path / "disk/cache"
    advice = {"full": "free space, such", "read-only": "name another folder"}[fault]
    assert f"cannot write prepared tokens into the cache {cache}: {reason}; {advice}" in said
    assert_as_undisturbed(series, tmp_path / "run")


@pytest.mark.usefixtures("can_mount")
def test_a_finished_run_that_is_read_only_is_left_as_it_is(series: kills.Series, tmp_path: Path) -> None:
    def act(disk: mounts.Disk) -> int:
        run = disk.path / "run"
        shutil.copytree(series.folder / "straight", run)
        disk.read_only(run)
        assert [train(series.recipe, run, flag) for flag in ("--resume=auto", "--resume")] == [0, 0]
        assert train(series.recipe, run, "--resume", "run.steps=9") == 2, "a longer run has to write"
        return train(series.recipe, run, "--overwrite")

    assert mounts.on_a_disk(tmp_path, 2**21, act) == 2, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("is finished; for more steps give") == 2
    assert said.count("error: cannot write to ") == 2


@pytest.mark.usefixtures("can_mount")
def test_a_full_disk_leaves_no_empty_recipe_and_its_error_names_the_file_of_answers(
    series: kills.Series, tmp_path: Path
) -> None:
    def act(disk: mounts.Disk) -> int:
        recipe, answers = disk.path / "new.yaml", disk.path / "answers.jsonl"
        init = ["init", "--data", str(series.folder / "rows.jsonl"), "--output", str(recipe)]
        ask = ["generate", str(series.folder / "tiny"), "--prompt", "x", "--max-new-tokens", "2"]
        disk.fill(left=0)
        assert app.main([*ask, "--output", str(answers)]) == 2
        assert app.main(init) == 2
        assert not recipe.exists()
        disk.empty()
        return app.main(init)

    assert mounts.on_a_disk(tmp_path, 2**21, act) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    for name in ("answers.jsonl", "new.yaml"):
        assert f"cannot write {tmp_path / 'disk' / name}: No space left on device; free space or name" in said


def test_a_file_that_may_not_grow_any_more_leaves_the_checkpoint_before(
    series: kills.Series, tmp_path: Path
) -> None:
    """The error of a disk quota; this needs no right to mount."""
    run = tmp_path / "run"

    def limit(run: Path) -> None:
        at_steps(_2=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))

    assert ended(runs.attempt(series.recipe, run, TWO, killer=limit)) == 2
    log = tmp_path / "run.log"
    assert "File too large" in log.read_text().splitlines()[-1]
    assert_intact(run, "step-000002", log)
    assert ended(runs.attempt(series.recipe, run, "--resume")) == 0
    assert_as_undisturbed(series, run)


# ---- files that change after they were written


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def link_outside(file: Path) -> None:
    outside = file.parents[2] / file.name
    shutil.move(file, outside)
    file.symlink_to(outside)


@pytest.mark.parametrize("damage", [flip, tear, Path.unlink, link_outside])
@pytest.mark.parametrize("name", [*FILES[1:2], FILES[3], "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_in_one_line(
    damage: Callable[[Path], None],
    name: str,
    series: kills.Series,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    if not (series.folder / "cut").exists():
        killer = kills.before_step(6)
        assert ended(runs.attempt(series.recipe, series.folder / "cut", killer=killer)) == -signal.SIGKILL
    shutil.copytree(series.folder / "cut", run)
    newest = run / "checkpoints" / "step-000006"
    damage(newest / name)
    capfd.readouterr()
    with pytest.warns(UserWarning, match=r"step-000006.*resuming from step-000005 instead") as caught:
        assert train(series.recipe, run, "--resume") == 0
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert_as_undisturbed(series, run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000007", "step-000008"]


def test_when_every_checkpoint_is_damaged_nothing_is_touched(
    series: kills.Series, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(series.folder / "straight", tmp_path / "run")
    (run / "summary.json").unlink()  # as if it had been killed before its end
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / "weights.safetensors")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train(series.recipe, run, "--resume") == 2
    error = capfd.readouterr().err
    assert "is damaged: weights.safetensors changed after it was written" in error
    assert "no other is intact; name another run.output to start a new run" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
