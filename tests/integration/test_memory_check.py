"""`train` knows its memory before weights load, and says at the end whether that was right."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lisatune.memory.check
import lisatune.memory.fit
import lisatune.train.assemble
import tiny_run
from lisatune.cli.app import main
from lisatune.memory import process
from lisatune.memory.check import MemoryCheck
from lisatune.memory.fit import Fit
from lisatune.memory.plan import plan_memory
from lisatune.models.load import load_model
from lisatune.train.recipe_file import load_recipe
from plans import PlansOnce


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"), plans=True)


@pytest.fixture(scope="module")
def plans() -> PlansOnce:
    """The plans of all tests of this file."""
    return PlansOnce()


@pytest.fixture(autouse=True)
def planned_once(plans: PlansOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisatune.memory.check, "plan_memory", plans)
    monkeypatch.setattr(lisatune.memory.fit, "plan_memory", plans)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free on a kind of device, to be set."""
    sizes = {"cpu": 2**40, "cuda": 2**40}
    monkeypatch.setattr(process, "available_bytes", lambda device, **_: sizes.get(device.type))
    return sizes


def needed_by(recipe: Path) -> int:
    """Bytes that a run needs by its plan."""
    check = MemoryCheck(load_recipe(recipe))
    lisatune.train.assemble.assemble(check.recipe, before_load=check.before_load)
    assert check.plan is not None
    return check.plan.needed_bytes


def test_a_run_that_does_not_fit_stops_before_its_weights_load(
    recipe: Path, free: dict[str, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free["cpu"] = int(0.95 * needed_by(recipe))
    monkeypatch.setattr(lisatune.train.assemble, "load_model", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(recipe.parent.iterdir())
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("the run needs", "are free on cpu", "fits", "=", "run.check_memory=false"):
        assert words in error
    assert sorted(recipe.parent.iterdir()) == before


def test_what_the_refusal_advises_runs(
    recipe: Path, free: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    free["cpu"] = int(0.95 * needed_by(recipe))
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    overrides = error.partition(" with ")[2].partition(": needs")[0].split()
    assert overrides, error
    assert main(["train", str(recipe), *overrides]) == 0


def test_a_refused_overwrite_leaves_the_run_that_is_there(
    recipe: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", str(recipe)]) == 0
    output = recipe.parent / "run"
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    free["cpu"] = 1000
    # A search in which nothing fits takes ten seconds; tests/unit/memory/test_fit.py has it.
    nothing = Fit(1000, False, {}, (), plan_memory(load_recipe(recipe)))
    monkeypatch.setattr(lisatune.memory.check, "find_fit", lambda *_, **__: nothing)
    assert main(["train", str(recipe), "--overwrite"]) == 2
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_the_check_can_be_left_out(recipe: Path, free: dict[str, int]) -> None:
    free["cpu"] = 1000
    assert main(["train", str(recipe), "run.check_memory=false"]) == 0
    summary = json.loads((recipe.parent / "run" / "summary.json").read_text())
    assert "planned_bytes" not in summary


def test_the_summary_has_planned_beside_measured(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe)]) == 0
    summary = json.loads((recipe.parent / "run" / "summary.json").read_text())
    assert summary["plan"] == "traced"
    assert summary["measured"] == "growth of resident memory"
    # The rows of the run are shorter than data.max_length: the plan is of their length.
    assert 0 < summary["planned_bytes"] < plan_memory(load_recipe(recipe)).tensor_bytes
    assert 0 <= summary["measured_bytes"] < 2**32
    assert "memory plan" in capsys.readouterr().out


def test_the_plan_is_of_the_longest_batch_and_of_the_runs_own_steps(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = load_recipe(recipe), []
    monkeypatch.setattr(
        MemoryCheck, "before_load", lambda self, _, *, steps, length, masters: seen.append((steps, length))
    )
    parts = lisatune.train.assemble.assemble(asked, before_load=MemoryCheck(asked).before_load)
    order = [parts.data.order.batch(step) for step in range(20)]
    lengths = [
        parts.collate([parts.data.train.rows[i] for i in rows])["input_ids"].shape[1] for rows in order
    ]
    assert seen == [(4, max(lengths))]


@pytest.mark.parametrize("key", ["disk", "auto"])
def test_exact_weights_on_disk_need_no_room_in_host_memory(
    key: str, recipe: Path, free: dict[str, int]
) -> None:
    check = MemoryCheck(load_recipe(recipe, ["method.frozen_weights=int8", f"method.master={key}"]))
    free["cpu"] = 2**10
    check.before_load(torch.device("cuda"), steps=4, length=64, masters="disk")
    with pytest.raises(ValueError, match=r"of host memory by its plan .* set method\.master=disk"):
        check.before_load(torch.device("cuda"), steps=4, length=64, masters="ram")


def test_state_in_host_memory_needs_room_there(recipe: Path, free: dict[str, int]) -> None:
    check = MemoryCheck(load_recipe(recipe, ["optimizer.state_device=cpu", "run.device=cuda"]))
    check.before_load(torch.device("cuda"), steps=4, length=32)
    assert check.plan is not None
    assert check.plan.host_bytes > 0
    free["cpu"] = check.plan.host_bytes - 1
    with pytest.raises(ValueError, match="of host memory by its plan"):
        check.before_load(torch.device("cuda"), steps=4, length=32)


def test_weights_that_are_quantised_need_room_before_that(
    model: Path, tmp_path: Path, free: dict[str, int]
) -> None:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    asked = load_recipe(
        tiny_run.write_recipe(tmp_path, model, rows, "method: {name: qlora, rank: 2}\n", plans=True)
    )
    whole = sum(p.nbytes for p in load_model(str(model)).parameters())
    check = MemoryCheck(asked)
    check.before_load(torch.device("cuda"), steps=4, length=2)
    assert check.plan is not None
    assert check.plan.at_peak["weights"] < whole == check.plan.loaded_bytes
    free["cpu"] = whole - 1
    with pytest.raises(ValueError, match="of host memory by its plan"):
        check.before_load(torch.device("cuda"), steps=4, length=2)
    on_cpu = replace(check.plan, device="cpu", peak_bytes=whole // 2, host_bytes=0)
    assert on_cpu.needed_bytes == whole


def test_where_free_memory_is_unknown_the_run_is_planned_and_not_refused(recipe: Path) -> None:
    assert process.available_bytes(torch.device("mps")) is None
    check = MemoryCheck(load_recipe(recipe))
    check.before_load(torch.device("mps"), steps=4, length=32)
    assert check.plan is not None


def test_a_defect_of_the_plan_stops_no_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("a defect")

    monkeypatch.setattr("lisatune.memory.check.plan_memory", fails)
    check = MemoryCheck(load_recipe(recipe))
    with pytest.warns(UserWarning, match=r"cannot be planned \(a defect\)"):
        check.before_load(torch.device("cpu"), steps=4, length=32)
    assert check.outcome(torch.device("cpu")).keys() == {"peak_bytes"}


def test_planning_a_tiny_run_takes_less_than_a_second(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lisatune.memory.check, "plan_memory", plan_memory)
    asked = load_recipe(recipe)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        MemoryCheck(asked).before_load(torch.device("cpu"), steps=4, length=96)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1
