"""`lisatune compare` from end to end: tiny models, runs in this process except where it says so."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from lisatune.cli import app
from lisatune.compare import measure, processes, stages
from lisatune.compare.arms import read_comparison
from lisatune.compare.results import Results, read_results
from lisatune.data.records import read_records
from lisatune.data.tokens import tokenize
from lisatune.models.load import load_model, load_tokenizer
from tiny_run import write_model, write_recipe, write_rows

Call = Callable[[list[str], Path, Callable[[], None], int], None]
SLICES = ("train", "validation", "test")
HALF = "data.validation_share=0.5"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "A cat sat on the mat."}\n{"text": "Water is wet, and so is rain."}\n')
    return write_recipe(tmp_path, write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 24))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Make every process a call in this one; what was called."""
    made: list[list[str]] = []

    def in_process(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
        made.append(command)
        poll()
        main = {"lisatune": app.main, "lisatune.compare.measure": measure.main}[command[0]]
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = main(command[1:])
        log.write_text(output.getvalue())
        processes.check_exit(code, output.getvalue())

    monkeypatch.setattr(processes, "call", in_process)
    return made


def compare(recipe: Path, methods: str, *overrides: str, **options: Any) -> Results:
    flags = {name: options.pop(name) for name in ("retry_failed", "keep_models") if name in options}
    comparison = read_comparison(recipe, [HALF, *overrides], methods=methods, **options)
    return stages.compare(comparison, recipe.parent / "out", **flags)


def trained(calls: list[list[str]]) -> list[str]:
    return [Path(command[2]).stem for command in calls if command[1] == "train"]


def test_methods_are_compared_on_the_same_tokens_at_their_own_best_learning_rate(
    recipe: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, general = recipe.parent / "out", str(recipe.parent / "general.jsonl")
    options = {"lr": "1e-4,1e-2", "seeds": 2, "budget": "tokens=500", "general": general}
    results = compare(recipe, "full,lora,lisa:active=1+period=1", keep_models=True, **options)

    assert results == read_results(out) == json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert (results["reference"], results["seeds"]) == ("full", [0, 1])
    assert [arm["method"] for arm in results["arms"]] == ["full", "lora", "lisa"]
    assert len(results["runs"]) == 9
    for seed in (0, 1):
        tokens = {run["tokens"] for run in results["runs"] if run["seed"] == seed}
        assert len(tokens) == 1
        assert min(tokens) >= 500
    for arm in results["arms"]:
        first = [run for run in results["runs"] if run["arm"] == arm["name"] and run["seed"] == 0]
        best = min(first, key=lambda run: run["validation_loss"] or 9e9)
        assert arm["chosen_lr"] == best["lr"]
        assert [run["test_loss"] is not None for run in first] == [run["chosen"] for run in first]
        assert arm["test_loss"] is not None
        assert arm["test_loss"]["count"] == 2
        assert arm["memory"] is not None
        assert sum(arm["memory"]["at_peak"].values()) == arm["memory"]["peak_bytes"]
        assert arm["forgetting"] is not None
        assert first[0]["held_out"][0]["seconds"] == 0
        assert len(first[0]["held_out"]) > 2
        assert first[0]["train"][-1]["step"] == first[0]["steps"]
    full, lora, lisa = results["arms"]
    parameters = sum(p.numel() for p in load_model(str(recipe.parent / "model")).parameters())
    assert full["trainable"] == full["touched"]["mean"] == parameters  # type: ignore[index]
    assert lora["trainable"] == lora["touched"]["mean"]  # type: ignore[index]
    assert lisa["trainable"] < lisa["touched"]["mean"] <= parameters  # type: ignore[index,operator]
    assert full["delta_bytes"] == 4 * parameters
    assert "lisa:active=1+period=1" in (out / "results.md").read_text()
    moved = {run["arm"]: run.get("movement") for run in results["runs"] if run["chosen"]}
    assert moved["lora"] is None
    assert len(moved["full"] or ()) == 4
    assert min(moved["full"] or [0]) > 0
    assert app.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    for figure in (
        "against tokens",
        "Memory by category",
        "Quality",
        "Active blocks: lisa",
        "Weight movement",
    ):
        assert figure in page

    slices = {name: (out / "data" / f"{name}.jsonl").read_text().splitlines() for name in SLICES}
    assert all(slices.values())
    assert sum(map(len, slices.values())) == len(set().union(*slices.values())) == 24
    chosen = next(run for run in results["runs"] if run["chosen"] and run["arm"] == "full")
    model = str(out / chosen["folder"] / "model")
    assert chosen["test_loss"] == pytest.approx(plain_loss(model, out / "data" / "test.jsonl"), abs=1e-5)

    assert app.main(["compare", str(out), "--reference", "lora"]) == 0
    assert "the end of lora" in capsys.readouterr().out


def plain_loss(model: str, slice_file: Path) -> float:
    """Loss per answer token by transformers alone, a record at a time."""
    network = load_model(model)
    rows = tokenize(read_records(str(slice_file)), load_tokenizer(model), max_length=96).rows
    total, count = 0.0, 0
    for row in rows:
        ids_1T, labels_1T = row["input_ids"][None], row["labels"][None]
        num_labels = int((labels_1T != -100).sum())
        with torch.no_grad():
            total += num_labels * float(network(ids_1T, labels=labels_1T).loss)
        count += num_labels
    return total / count


def test_what_is_finished_is_not_made_again_and_arms_may_be_added(
    recipe: Path, calls: list[list[str]]
) -> None:
    first = compare(recipe, "full", lr="1e-4")
    before = len(calls)
    assert compare(recipe, "full", lr="1e-4")["runs"] == first["runs"]
    assert len(calls) == before
    results = compare(recipe, "full,lisa", lr="1e-4", seeds=2)
    assert trained(calls[before:]) == [
        "lisa_lr=0.0001_seed=0",
        "full_lr=0.0001_seed=1",
        "lisa_lr=0.0001_seed=1",
    ]
    assert results["runs"][0] == first["runs"][0]
    assert not list(recipe.parent.glob("out/runs/*/model"))  # measured, and not asked to be kept


def test_the_command_writes_a_report_or_says_which_package_is_missing(
    recipe: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = recipe.parent / "out"
    command = ["compare", str(recipe), HALF, "--methods", "full", "--lr", "1e-4", "--output", str(out)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        with pytest.warns(
            UserWarning, match=r"there is no report.html: .*pip install \"lisatune\[report\]\""
        ):
            assert app.main(command) == 0
    assert read_results(out)["complete"]
    assert not (out / "report.html").exists()
    before = len(calls)
    assert app.main(command) == 0
    assert "Held-out loss against tokens" in (out / "report.html").read_text()
    assert len(calls) == before


def test_a_run_that_is_chosen_after_its_model_was_deleted_is_made_again(
    recipe: Path, calls: list[list[str]]
) -> None:
    both = compare(recipe, "full", lr="1e-4,1e-2")
    assert both["arms"][0]["chosen_lr"] == 1e-2
    before = len(calls)
    alone = compare(recipe, "full", lr="1e-4")
    assert trained(calls[before:]) == ["full_lr=0.0001_seed=0"]
    assert alone["arms"][0]["test_loss"] is not None
    assert alone["runs"][0]["validation_loss"] == both["runs"][0]["validation_loss"]


def test_a_model_that_cant_be_measured_gives_way_to_the_next(
    recipe: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Call = processes.call

    def call(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
        if "measure" in command[0] and "lr=0.01" in log.name:
            (log.with_suffix("") / "model" / "model.safetensors").write_bytes(b"")
        plain(command, log, poll, lock)

    monkeypatch.setattr(processes, "call", call)
    low, high = compare(recipe, "full", lr="1e-4,1e-2")["runs"]
    assert high["status"] == "failed"
    assert "its model cannot be measured" in (high["reason"] or "")
    assert (low["chosen"], low["status"]) == (True, "done")
    assert low["test_loss"] is not None


def test_a_folder_of_another_comparison_is_refused_with_the_differences(
    recipe: Path, calls: list[list[str]]
) -> None:
    compare(recipe, "lisa", "run.steps=4")
    before = (recipe.parent / "out" / "compare.json").read_bytes()
    with pytest.raises(ValueError, match=r"run.steps: 4 → 5; undo these changes, or name another --output"):
        compare(recipe, "lisa", "run.steps=5")
    with pytest.raises(ValueError, match=r"lisa: method.active: 2 → 1"):
        compare(recipe, "lisa", "run.steps=4", "method.active=1")
    with pytest.raises(ValueError, match=r"compare.budget: the recipe's → tokens=9"):
        compare(recipe, "lisa", "run.steps=4", budget="tokens=9")
    assert (recipe.parent / "out" / "compare.json").read_bytes() == before
    data = recipe.parent / "out" / "data" / "test.jsonl"
    data.write_text(data.read_text() + "\n")
    with pytest.raises(ValueError, match=r"test.jsonl was changed"):
        compare(recipe, "lisa", "run.steps=4")


def test_a_folder_with_other_files_is_refused(recipe: Path, calls: list[list[str]]) -> None:
    (recipe.parent / "out").mkdir()
    (recipe.parent / "out" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files that are not a comparison's"):
        compare(recipe, "full")


def test_an_unknown_attention_is_refused_before_anything_is_made(
    recipe: Path, calls: list[list[str]]
) -> None:
    with pytest.raises(ValueError, match=r"unknown model\.attention 'sdpaa'\. Did you mean 'sdpa'"):
        compare(recipe, "full", "model.attention=sdpaa")
    assert (calls, (recipe.parent / "out").exists()) == ([], False)


def test_failed_runs_show_their_reason_and_the_others_go_on(recipe: Path, calls: list[list[str]]) -> None:
    results = compare(recipe, "full,lora:targets=[nope],lisa", lr="1e-3,1e30")
    assert results["complete"]
    full, lora, lisa = results["arms"]
    assert (full["chosen_lr"], lisa["chosen_lr"], lora["chosen_lr"]) == (1e-3, 1e-3, None)
    assert full["test_loss"] is not None
    assert lora["reason"] is not None
    assert "method.targets names 'nope'" in lora["reason"]
    failed = [run for run in results["runs"] if run["status"] == "failed"]
    assert {(run["arm"], run["lr"]) for run in failed} >= {("full", 1e30), ("lisa", 1e30)}
    assert all(run["reason"] for run in failed)
    assert all(any(run["reason"] in line for line in results["problems"]) for run in failed if run["reason"])
    before = len(calls)
    compare(recipe, "full,lora:targets=[nope],lisa", lr="1e-3,1e30")
    assert len(calls) == before
    compare(recipe, "full", lr="1e-3,1e30", retry_failed=True)
    assert trained(calls[before:]) == ["full_lr=1e+30_seed=0"]


@pytest.mark.filterwarnings("ignore:run.eval_every=9 does nothing:UserWarning")  # so all lines are steps
def test_a_run_that_trained_on_other_tokens_does_not_count(
    recipe: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Call = processes.call

    def call(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
        plain(command, log, poll, lock)
        metrics = log.with_suffix("") / "metrics.jsonl"
        if command[1] == "train" and "lisa" in log.name:
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            lines[2]["tokens"] += 1
            metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(processes, "call", call)
    full, lisa = compare(recipe, "full,lisa", "run.eval_every=9")["runs"]
    assert full["status"] == "done"
    assert lisa["status"] == "failed"
    assert "trained on other records than the rest: after step 2" in (lisa["reason"] or "")


def test_arms_may_split_a_step_but_not_change_its_records(recipe: Path, calls: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"arm 'full:run.batch_size=1' would train on other records"):
        compare(recipe, "full,full:run.batch_size=1", "run.steps=2")
    assert not calls
    arms = "full,full:run.batch_size=1+run.accumulation=2"
    whole, split = compare(recipe, arms, "run.steps=2", "data.limit=22")["runs"]
    assert whole["tokens"] == split["tokens"]


def test_too_little_held_out_data_is_refused(recipe: Path, calls: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="must have 2 or more different prompts"):
        compare(recipe, "full", "data.validation_limit=1")


def test_processes_stopped_by_ctrl_c_go_on_to_the_same_result(
    recipe: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one with a real process: it is interrupted, and a call goes on from its checkpoint."""
    options: dict[str, Any] = {"budget": "steps=100", "lr": "1e-3"}
    straight = compare(recipe, "lisa", "run.samples=0", **options)["runs"][0]
    (recipe.parent / "out").rename(recipe.parent / "straight")
    in_process: Call = processes.call
    monkeypatch.undo()
    real: Call = processes.call
    logs = []

    def call(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
        def interrupt() -> None:
            metrics = log.with_suffix("") / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) > 5:
                raise KeyboardInterrupt

        if command[1] != "train":
            return in_process(command, log, poll, lock)
        logs.append(command)
        if len(logs) > 1:
            return in_process(command, log, poll, lock)
        return real(command, log, interrupt, lock)

    monkeypatch.setattr(processes, "call", call)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    with pytest.raises(KeyboardInterrupt, match="0 of 1 runs are done; give the same command to continue"):
        compare(recipe, "lisa", "run.samples=0", **options)
    assert list(recipe.parent.glob("out/runs/*/checkpoints/*"))
    assert not read_results(recipe.parent / "out")["complete"]
    resumed = compare(recipe, "lisa", "run.samples=0", **options)["runs"][0]
    assert logs[1][-1] == "--resume"
    assert (resumed["test_loss"], resumed["validation_loss"]) == (
        straight["test_loss"],
        straight["validation_loss"],
    )
    assert [point["loss"] for point in resumed["held_out"]] == [
        point["loss"] for point in straight["held_out"]
    ]


def test_sigterm_ends_the_run_in_progress_too(
    recipe: Path, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a real process, which saves a checkpoint before the comparison ends."""
    in_process: Call = processes.call
    monkeypatch.undo()
    real: Call = processes.call

    def call(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
        def terminate() -> None:
            metrics = log.with_suffix("") / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) > 5:
                os.kill(os.getpid(), signal.SIGTERM)

        (real if command[1] == "train" else in_process)(command, log, terminate, lock)

    monkeypatch.setattr(processes, "call", call)
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.02)
    out = recipe.parent / "out"
    arms = ["--methods", "lisa", "--lr", "1e-3", "--budget", "steps=5000", "--output", str(out)]
    assert app.main(["compare", str(recipe), "run.samples=0", HALF, *arms]) == 143
    assert "0 of 1 runs are done; give the same command to continue" in capfd.readouterr().err
    assert list(out.glob("runs/*/checkpoints/*/manifest.json"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
