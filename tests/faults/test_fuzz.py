"""Changed input is accepted or refused in one sentence. Here are short runs, and what long.py found."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults import changing, fuzzing
from faults.formats import FORMS
from faults.fuzzing import Fuzz, Outcome

CASES = 25
KINDS = [
    *("recipe", "override", "mixture", *(f"records, {form}" for form in FORMS), "stream"),
    *("manifest.json", "state.json", "checkpoint, safetensors", "model, safetensors"),
]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    made = Fuzz(tmp_path_factory.mktemp("fuzz"))
    assert list(made.kinds) == KINDS
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_changed_input_is_taken_or_refused_in_a_sentence(kind: str, fuzz: Fuzz) -> None:
    outcome = Outcome()
    for seed in range(CASES):
        fuzz.run(kind, seed, outcome)
    assert outcome.failures == []
    assert outcome.refused > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_unchanged_is_taken(kind: str, fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changing, "mutate", lambda data, generator: data)
    monkeypatch.setattr(changing, "mutate_value", lambda value, generator: value)
    monkeypatch.setattr(changing, "mutate_safetensors", lambda data, generator: data)
    monkeypatch.setattr(changing, "VALUES", [1])
    outcome = Outcome()
    # Not every key accepts a 1, and a table cannot hold lists of messages.
    for seed in range(12 if kind in ("override", "records, .csv") else 1):
        fuzz.run(kind, seed, outcome)
    assert outcome.failures == []
    assert outcome.taken > 0


def test_a_failure_a_hang_and_a_file_left_behind_are_found(
    fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(generator: random.Random) -> None:
        raise KeyError("x")

    def hang(generator: random.Random) -> None:
        while True:
            pass

    def leave(generator: random.Random) -> None:
        (fuzz.folder / "left").touch()

    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    outcome = Outcome()
    for act in (defect, hang, leave):
        monkeypatch.setitem(fuzz.kinds, "bad", act)
        fuzz.run("bad", 0, outcome)
    (fuzz.folder / "left").unlink()
    assert [failure.split(": ")[1].split()[0] for failure in outcome.failures] == [
        "KeyError",
        "Hangs",
        "left",
    ]
    assert os.getcwd() != str(fuzz.work)  # noqa: PTH109


# ---- found by the long run


@pytest.mark.parametrize("override", ["run.steps=9223372036854775808", "run.steps=1000001"])
def test_found_steps_that_could_not_be_planned(fuzz: Fuzz, override: str) -> None:
    with pytest.raises(ValueError, match=r"makes a run of .* optimizer steps, and the most is 1,000,000"):
        fuzz._check(fuzz.recipe, override)


def test_found_epochs_that_overflow(fuzz: Fuzz, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = f"run.output={tmp_path / 'run'}"
    fuzz._check(fuzz.recipe, "run.steps=null", "run.epochs=1e308", output)
    assert "makes a run of inf optimizer steps" in " ".join(capsys.readouterr().out.split())


FOUND: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no scheduler": lambda state: state.pop("scheduler"),
    "a scheduler without its step": lambda state: state["scheduler"].pop("last_epoch"),
    "a scheduler whose step is text": lambda state: state["scheduler"].update(last_epoch="a"),
    "a rate that is a dict": lambda state: state["optimizer"]["param_groups"][0].update(lr={}),
    "no rate": lambda state: state["optimizer"]["param_groups"][0].pop("lr"),
    "a group too many": lambda state: state["optimizer"]["param_groups"].append({"params": []}),
    "a step of a parameter that is text": lambda state: next(
        iter(state["optimizer"]["state"].values())
    ).update(step="a"),
    "extra that is no dict": lambda state: state.update(extra=[1]),
    "extra that no run has": lambda state: state["extra"].update(other=1),
    "steps that are text": lambda state: state["extra"].update(step="3"),
    "LISA's steps that are text": lambda state: state["optimizer"]["lisa"].update(steps_done="a"),
    "half a state of a generator": lambda state: state["rng"].update(python=[1]),
    "no generator": lambda state: state.pop("rng"),
}


@pytest.mark.parametrize("what", FOUND)
def test_found_checkpoints_with_values_that_no_run_wrote(what: str, fuzz: Fuzz) -> None:
    def change(text: bytes, generator: Any) -> bytes:
        state = json.loads(text)
        FOUND[what](state)
        return json.dumps(state).encode()

    with pytest.raises(ValueError, match=r"checkpoint .*(holds what no run wrote|does not fit)"):
        fuzz._changed(_AlwaysHashed(0), "state.json", change)


class _AlwaysHashed(random.Random):
    def random(self) -> float:
        return 0.0
