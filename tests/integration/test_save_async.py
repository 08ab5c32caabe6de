"""A checkpoint that is written while training goes on holds what one holds for which training stood still."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lisatune.files.parts
import tiny_run
from lisatune.runs.manifest import newest_checkpoint
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState

ASYNC = "run.save_async=true"
Write = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl", 14))


def run(recipe: Path, output: str, *overrides: str, **flags: Any) -> Any:
    keys = [f"run.output={recipe.parent / output}", "run.samples=0", *overrides]
    return train(load_recipe(recipe, keys), **flags)


def names(recipe: Path) -> list[str]:
    folder = recipe.parent / "run" / "checkpoints"
    return sorted(path.name for path in folder.glob("*") if ".tmp" not in path.name)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Callable[[Write], None]:
    """Let a function stand before each file of a checkpoint; it gets the file's path."""

    def replace(before: Write) -> None:
        write = lisatune.files.parts.write_stream

        def held(path: Path, *rest: Any) -> None:
            before(path)
            write(path, *rest)

        monkeypatch.setattr("lisatune.files.parts.write_stream", held)

    return replace


def test_training_goes_on_while_one_checkpoint_is_written_and_the_next_one_waits(
    recipe: Path, hold: Callable[[Write], None]
) -> None:
    run(recipe, "straight", "run.save_every=1")
    go_on, at_once, writing = threading.Event(), [], set()

    def wait(path: Path) -> None:
        assert go_on.wait(60)
        writing.add(path.parent.name)
        at_once.append(sum((path.parents[1] / name).exists() for name in writing))

    def after(state: RunState) -> None:
        if state.step == 2:  # the first step's checkpoint waits
            assert names(recipe) == []
            go_on.set()

    hold(wait)
    run(recipe, "run", "run.save_every=1", ASYNC, after_step=after)
    assert set(at_once) == {1}
    assert names(recipe) == ["step-000003", "step-000004"]
    for step in names(recipe):
        was, now = (recipe.parent / each / "checkpoints" / step for each in ("straight", "run"))
        for file in was.glob("*.safetensors"):
            assert file.read_bytes() == (now / file.name).read_bytes(), file
        states = [json.loads((each / "state.json").read_text()) for each in (was, now)]
        for state in states:
            del state["extra"]["train_seconds"]
        assert states[0] == states[1]


@pytest.mark.parametrize(("save_every", "steps"), [(2, 4), (4, 4)], ids=["in a later step", "at the end"])
def test_an_error_of_the_thread_ends_the_run_with_the_same_sentence(
    save_every: int, steps: int, recipe: Path, hold: Callable[[Write], None]
) -> None:
    def no_space(path: Path) -> None:
        raise OSError(28, "No space left on device")

    hold(no_space)
    errors = []
    for key in ("run.save_async=false", ASYNC):
        with pytest.raises(
            OSError, match=rf"step-00000{save_every} \(.*No space left on device\); free"
        ) as e:
            run(recipe, "run", key, f"run.save_every={save_every}", overwrite=bool(errors))
        errors.append(str(e.value))
        assert not list((recipe.parent / "run" / "checkpoints").iterdir())
        assert not (recipe.parent / "run" / "model").exists()
    assert errors[0] == errors[1]


def test_a_run_that_may_go_on_counts_the_checkpoints_that_its_thread_could_not_write(
    recipe: Path, hold: Callable[[Write], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def no_space(path: Path) -> None:
        if "step-000003" not in path.parent.name:
            raise OSError(28, "No space left on device")

    hold(no_space)
    done = run(recipe, "run", ASYNC, "run.save_every=1", "run.on_save_error=continue")
    assert done["failed_saves"] == 3
    assert names(recipe) == ["step-000003"]
    state = json.loads((recipe.parent / "run/checkpoints/step-000003/state.json").read_text())
    assert state["extra"]["failed_saves"] == 2
    assert "step 2: could not write" in capsys.readouterr().out


def test_a_run_that_fails_completes_the_checkpoint_that_is_being_written(
    recipe: Path, hold: Callable[[Write], None]
) -> None:
    go_on = threading.Event()

    def fail(state: RunState) -> None:
        if state.step == 2:
            threading.Timer(0.05, go_on.set).start()
            raise ZeroDivisionError

    hold(lambda path: go_on.wait(60))
    with pytest.raises(ZeroDivisionError):
        run(recipe, "run", ASYNC, "run.save_every=1", after_step=fail)
    assert names(recipe) == ["step-000001"]
    assert newest_checkpoint(recipe.parent / "run" / "checkpoints") is not None


def test_the_best_checkpoint_is_there_when_the_run_takes_its_weights(recipe: Path) -> None:
    best = ["run.eval_every=1", "run.keep_best=true", "optimizer.lr=0.2", "optimizer.schedule=constant"]
    straight, done = run(recipe, "straight", *best), run(recipe, "run", *best, ASYNC)
    assert done["best_step"] == straight["best_step"] < 4
    files = [recipe.parent / each / "model" / "model.safetensors" for each in ("straight", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_exact_weights_on_disk_are_not_copied(recipe: Path) -> None:
    method = "{active: 2, period: 2, frozen_weights: int8, ends: frozen, master: disk}"
    recipe.write_text(recipe.read_text().replace("{active: 2, period: 2}", method))
    with pytest.raises(ValueError, match=r"set run\.save_async to false, or method\.master to ram"):
        run(recipe, "run", ASYNC, "run.precision=bf16")
