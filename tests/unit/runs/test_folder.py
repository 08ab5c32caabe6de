"""The run folder: nothing is lost, nothing is half written, nothing secret is kept."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisatune.files import yaml
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, Recipe
from lisatune.runs.differences import differences
from lisatune.runs.folder import RunFolder, check_output, is_finished
from lisatune.runs.summary import describe_environment, mask_secrets

RECIPE: dict[str, Any] = {
    "model": {"name": "m", "revision": None},
    "method": {"name": "lisa", "probabilities": [0.5, 0.5], "verify": "off"},
    "optimizer": {"lr": 1e-5},
    "run": {"output": "runs/x", "steps": 10, "seed": 0},
}


def changed(**keys: Any) -> dict[str, Any]:
    recipe = {section: dict(values) for section, values in RECIPE.items()}
    for key, value in keys.items():
        section, name = key.split("__")
        recipe[section][name] = value
    return recipe


def test_a_new_run_holds_recipe_and_environment_at_once(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "deep" / "run", RECIPE) as run:
        assert yaml.load((run.path / "recipe.yaml").read_text()) == RECIPE
        assert json.loads((run.path / "environment.json").read_text())["python"]
        run.write_summary({"loss": 1.5, "blocks": (1, 2)})
        assert json.loads((run.path / "summary.json").read_text()) == {"loss": 1.5, "blocks": [1, 2]}
        assert (run.checkpoints, run.model) == (run.path / "checkpoints", run.path / "model")
    assert not [entry for entry in run.path.iterdir() if entry.name.startswith(".") and entry.name != ".lock"]


def test_an_existing_run_is_left_alone_without_a_flag(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, RECIPE) as run:
        run.log({"step": 1})
    with pytest.raises(ValueError, match=r"exists; use --resume to continue it, or name another"):
        RunFolder.open(tmp_path, RECIPE)
    assert run.metrics.read_text() == '{"step": 1}\n'


def test_a_run_stopped_before_its_first_step_begins_again_without_a_flag(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, RECIPE) as run:
        run.log({"step": 0, "held_out_loss": 2.5})
        run.reference.mkdir()
        (tmp_path / ".reference.tmp-1").mkdir()
    with RunFolder.open(tmp_path, RECIPE) as run:
        assert not run.metrics.exists()
        assert not run.reference.exists()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists; use --resume"):
        RunFolder.open(tmp_path, RECIPE)


def test_a_finished_run_that_is_made_longer_is_not_finished_any_more(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, RECIPE) as run:
        run.model.mkdir()
        run.write_summary({"steps": 4})
    assert is_finished(tmp_path)
    RunFolder.open(tmp_path, RECIPE, resume=True).close()
    assert not is_finished(tmp_path)


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    path = tmp_path / "run"
    with RunFolder.open(path, RECIPE) as run:
        run.log({"step": 1})
        run.write_summary({})
        (run.checkpoints / "step-1").mkdir(parents=True)
        run.model.symlink_to(outside)
        (path / "notes.txt").write_text("mine")
    with RunFolder.open(path, RECIPE, overwrite=True):
        kept = sorted(entry.name for entry in path.iterdir())
    assert kept == [".lock", "environment.json", "notes.txt", "recipe.yaml"]
    assert (outside / "precious").exists()


def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ValueError, match="does not look like a run folder"):
        RunFolder.open(tmp_path, RECIPE, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "recipe.yaml"]


def test_resume_keeps_the_run_and_takes_a_new_length(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, RECIPE) as run:
        run.log({"step": 1})
    for _ in range(2):
        with RunFolder.open(tmp_path, changed(run__steps=20), resume=True) as run:
            assert run.metrics.read_text() == '{"step": 1}\n'
    assert yaml.load((tmp_path / "recipe.yaml").read_text())["run"]["steps"] == 20
    assert len(json.loads((tmp_path / "environment.json").read_text())["resumed"]) == 2


def test_resume_with_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, RECIPE).close()
    other = changed(optimizer__lr=2e-5, method__probabilities=[1, 0], run__steps=11, method__extra=1)
    with pytest.raises(ValueError, match="the recipe differs") as caught:
        RunFolder.open(tmp_path, other, resume=True)
    keys = "method.extra: not set → 1; method.probabilities: [0.5, 0.5] → [1, 0]; optimizer.lr: 1e-05 → 2e-05"
    assert f": {keys}; undo that" in str(caught.value)
    assert yaml.load((tmp_path / "recipe.yaml").read_text()) == RECIPE
    assert differences(RECIPE, changed(run__steps=3, run__output="y")) == []
    assert differences(RECIPE, changed(method__new_key=None)) == []  # saved before there was such a key
    assert differences(RECIPE, changed(run__seed=1)) == ["run.seed: 0 → 1"]


def test_values_that_differ_are_written_as_in_a_recipe() -> None:
    data = {"train": [{"path": "a.jsonl", "weight": 2.0}, {"path": "b.jsonl"}], "packing": False, "limit": 9}
    now = {"train": "a.jsonl", "packing": True, "limit": None}
    assert differences({"data": data}, {"data": now}) == [
        "data.limit: 9 → null",
        "data.packing: false → true",
        "data.train: [{path: a.jsonl, weight: 2.0}, {path: b.jsonl}] → a.jsonl",
    ]


def test_a_run_from_before_there_were_other_optimizers_resumes_with_adamw_alone() -> None:
    before = {"optimizer": {"lr": 0.1}}
    assert differences(before, {"optimizer": {"lr": 0.1, "name": "adamw"}}) == []
    now = {"optimizer": {"lr": 0.1, "name": "sgd"}}
    assert differences(before, now) == ["optimizer.name: adamw → sgd"]


def test_a_run_from_before_there_were_corrections_resumes_without_one() -> None:
    now = Recipe(model=ModelConfig(name="m"), data=DataConfig(train="d"), method=METHODS["lisa"]()).as_dict()
    older = {key: value for key, value in now["method"].items() if not key.startswith("correction")}
    assert differences({**now, "method": older}, now) == []
    corrected = {**now, "method": {**now["method"], "correction": "lora"}}
    assert differences({**now, "method": older}, corrected) == ["method.correction: none → lora"]


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json"])
@pytest.mark.parametrize("text", ["[1, 2", "5"])
def test_resume_of_a_damaged_run_says_so(tmp_path: Path, name: str, text: str) -> None:
    RunFolder.open(tmp_path, RECIPE).close()
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        RunFolder.open(tmp_path, RECIPE, resume=True)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run to resume in .*; start it without --resume"):
        RunFolder.open(tmp_path / "absent", RECIPE, resume=True)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(ValueError, match="exclude each other"):
        RunFolder.open(tmp_path, RECIPE, resume=True, overwrite=True)


def test_checking_the_output_writes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b", RECIPE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file"):
            check_output(path, RECIPE)
    with pytest.raises(OSError, match=r"cannot write /proc/run: .*; name another run\.output"):
        check_output("/proc/run", RECIPE)


def test_two_processes_cannot_run_in_one_folder_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    code = (
        "import sys; from lisatune.runs.folder import RunFolder\n"
        "RunFolder.open(sys.argv[1], {'model': {'name': 'm'}}); print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(RuntimeError, match=rf"in use by process {child.pid} on "):
            RunFolder.open(tmp_path, {"model": {"name": "m"}}, overwrite=True)
        child.kill()
    assert "process" in (tmp_path / ".lock").read_text()
    RunFolder.open(tmp_path, {"model": {"name": "m"}}, overwrite=True).close()


def test_a_failed_open_leaves_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(
            OSError, match=r"cannot write .*recipe\.yaml: No space left on device; free space"
        ):
            RunFolder.open(tmp_path, RECIPE)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    RunFolder.open(tmp_path, RECIPE).close()


def test_a_summary_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder.open(tmp_path, RECIPE) as run:
        run.write_summary({"loss": 1})
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            run.write_summary({"loss": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1}


def test_metrics_after_a_checkpoint_are_dropped_and_a_torn_line_with_them(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, RECIPE) as run:
        run.drop_metrics_after(0)
        for step in range(1, 5):
            run.log({"step": step, "loss": float("nan") if step == 2 else 1.0, "blocks": (0, 3)})
        with run.metrics.open("a") as file:
            file.write('{"step": 5, "lo')
        run.drop_metrics_after(2)
        run.log({"step": 3})
        assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
            {"step": 1, "loss": 1.0, "blocks": [0, 3]},
            {"step": 2, "loss": None, "blocks": [0, 3]},
            {"step": 3},
        ]


def test_the_environment_names_versions_and_keeps_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "x" * 20
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["lisatune", "train", "r.yaml", f"model.name={secret}"])
    text = json.dumps(describe_environment())
    assert secret not in text
    found = json.loads(text)
    assert found["packages"]["torch"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--token", "abc", "run.steps=5"], ["--token", "***", "run.steps=5"]),
        (["api_key=abc def", "x"], ["api_key=***", "x"]),
        (["data.train=https://me:pw@host/f.jsonl"], ["data.train=https://***@host/f.jsonl"]),
        (["sk-" + "a1" * 10, "run.sample_tokens=5"], ["sk-***", "run.sample_tokens=5"]),
    ],
)
def test_what_looks_like_a_key_is_masked(arguments: list[str], shown: list[str]) -> None:
    assert mask_secrets(arguments) == shown
