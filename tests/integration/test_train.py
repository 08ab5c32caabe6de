"""Whole runs of `lisatune.train.loop` on a tiny model: what they leave behind, and that resume is exact."""

import json
import math
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

import lisatune.files.parts
import lisatune.train.evaluation
import tiny_run
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods import METHODS
from lisatune.models.load import load_model, load_tokenizer, save_model
from lisatune.runs.summary import Summary
from lisatune.train import progress
from lisatune.train.assemble import Parts, assemble
from lisatune.train.loop import TrainingError, train
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState
from lisatune.train.saving import SaveClock


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl", 14)
    return tiny_run.write_recipe(tmp_path, model, rows)


def run(recipe: Path, output: str, *overrides: str, **flags: Any) -> Summary:
    return train(load_recipe(recipe, [f"run.output={recipe.parent / output}", *overrides]), **flags)


def use_method(recipe: Path, name: str) -> None:
    options = {"lisa": ", period: 3", "badam": ", switch_every: 2"}.get(name, "")
    text = recipe.read_text().replace("{active: 2, period: 2}", f"{{name: {name}{options}}}")
    recipe.write_text(text)


def metrics(recipe: Path, output: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = (recipe.parent / output / "metrics.jsonl").read_text().splitlines()
    timed = {"tokens_per_second", "seconds", "resident_bytes"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def assert_same_model(recipe: Path, output: str, other: str) -> None:
    # model.safetensors, or adapter_model.safetensors
    files = (next((recipe.parent / name / "model").glob("*.safetensors")) for name in (output, other))
    one, two = (load_file(file) for file in files)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def press_ctrl_c(after: int) -> Callable[[RunState], None]:
    """Press Ctrl-C once a step has been made."""

    def press(state: RunState) -> None:
        if state.step == after:
            signal.raise_signal(signal.SIGINT)

    return press


@pytest.mark.parametrize("name", ["lisa", "lora"])  # all methods: tests/conformance
def test_resume_is_bit_equal_inside_a_period_and_an_epoch(name: str, recipe: Path) -> None:
    # 11 training rows in batches of 2 make epochs of 6 micro-steps: with 2 per step they end at step 3, 6, …
    use_method(recipe, name)
    options = ["run.steps=11", "run.accumulation=2", "run.eval_every=5"]
    run(recipe, "straight", *options)
    for after in (1, 4, 6, 7) if name == "lisa" else (6,):
        output = f"resumed-{after}"
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {after} of 11.*--resume"):
            run(recipe, output, *options, after_step=press_ctrl_c(after))
        summary = run(recipe, output, *options, resume=True)
        assert summary["steps"] == 11
        assert_same_model(recipe, "straight", output)
        assert metrics(recipe, "straight") == metrics(recipe, output)


@pytest.mark.parametrize(
    "options",
    [
        ["method.state=cpu", "method.sampler=window", "method.lr_scaling=inverse"],
        ["method.state=second_moment", "run.precision=bf16-mixed"],
        ["method.warmup=2", "run.activation_checkpointing=true"],
        ["method.warmup=1", "method.ends=every:2", "optimizer.ends_lr=1e-4"],
        ["method.sampler=uniform", "method.ends=frozen", "run.activation_checkpointing=frozen"],
        ["method.ends=every:2+8bit", "data.packing=true", "optimizer.weight_decay=0.1"],
        ["method.ends=head+factored", "method.state=reset"],
        ["method.ends=every:2+cpu", "run.precision=bf16", "run.activation_checkpointing=true"],
    ],
    ids=lambda options: options[0],
)
def test_resume_is_bit_equal_with(options: list[str], recipe: Path) -> None:
    options = ["run.steps=8", "method.period=3", *options]

    def keep(state: RunState) -> None:
        """Keep the folder as a kill would leave it a step after a checkpoint."""
        if state.step == 5:
            shutil.copytree(recipe.parent / "straight", recipe.parent / "killed")

    run(recipe, "straight", *options, "run.save_every=4", after_step=keep)
    run(recipe, "killed", *options, resume=True)
    assert_same_model(recipe, "straight", "killed")


@pytest.mark.filterwarnings("ignore:.*blocks will never train", "ignore:.*will freeze no block")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "bottleneck"])  # which PEFT lacks
def test_the_model_loads_in_plain_transformers_or_peft(name: str, recipe: Path) -> None:
    use_method(recipe, name)
    # At a high rate what has been trained shows after few steps.
    run(recipe, "run", "run.steps=3", "run.samples=0", f"optimizer.lr={1e-2 * METHODS[name].lr_scale}")
    folder = recipe.parent / "run" / "model"
    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name of old
        plain = kind.from_pretrained(folder)
    model = load_model(str(folder))
    ids_BT = load_tokenizer(str(folder))("Count to 7. 1 1 1 1 1 1 1 1", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = model(input_ids=ids_BT, use_cache=False).logits
        theirs = plain(input_ids=ids_BT, use_cache=False).logits
    # PEFT alone puts adapters beside the plain base, not the one in 4 bits that they were trained beside.
    rounding = 0.03 if (folder / "quantized_base.json").exists() else 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding)


def test_run_folder_holds_what_it_promises(recipe: Path) -> None:
    summary = run(recipe, "run", "run.save_every=2", "run.report_to=[tensorboard]", "run.keep_checkpoints=1")
    folder = recipe.parent / "run"
    lines = metrics(recipe, "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    before, *steps, after = lines
    assert before["held_out_loss"] == summary["held_out_loss_before"]
    assert after["held_out_loss"] == summary["held_out_loss_after"]
    assert all(len(line["active_blocks"]) == 2 for line in steps)
    # AdamW in fp32: two moments and one step counter per parameter that trains, and never more.
    parts = assemble(load_recipe(recipe))
    tensors = sum(p.requires_grad for p in parts.built.model.parameters())
    trainable = sum(p.numel() for p in parts.built.model.parameters() if p.requires_grad)
    assert [line["state_bytes"] for line in steps] == [8 * trainable + 4 * tensors] * 4
    assert summary["peak_state_elements"] == 2 * summary["peak_trainable"] == 2 * trainable
    assert json.loads((folder / "summary.json").read_text()) == summary
    share = f"{100 * summary['moved_share']:.3g} % of their numbers"
    moved = f"2 periods: drawn blocks moved ({share}), 2 others"
    assert summary["proof"] == f"{moved} bit-identical in a moving sample"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    assert list((folder / "trackers").rglob("events.out.tfevents.*"))
    card = (folder / "model" / "README.md").read_text()
    losses = f"{summary['held_out_loss_before']:.4f} before, {summary['held_out_loss_after']:.4f} after"
    assert losses in card
    assert str(recipe.parent) not in card
    pickles = [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert pickles == []
    assert {"recipe.yaml", "environment.json", "summary.json", "model"} <= {p.name for p in folder.iterdir()}


def test_a_run_may_hold_nothing_out(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["data.validation_share=0", "run.save_every=2", "optimizer.schedule=constant"]
    summary = run(recipe, "run", *options)
    assert "nothing, so nothing is evaluated" in capfd.readouterr().out
    assert not {"held_out_loss_before", "held_out_loss_after"} & summary.keys()
    assert summary["samples"] == []
    assert [line["step"] for line in metrics(recipe, "run")] == [1, 2, 3, 4]
    assert run(recipe, "run", *options, "run.steps=5", resume=True)["steps"] == 5


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], torch.bfloat16),
        (["run.save_dtype=fp32"], torch.float32),
        (["run.save_dtype=fp16"], torch.float16),
        (["method.name=lora"], torch.float32),
    ],
)
def test_the_model_is_written_in_the_dtype_of_its_source_unless_asked(
    options: list[str], dtype: torch.dtype, recipe: Path, model: Path, tmp_path: Path
) -> None:
    source = load_model(str(model), dtype=torch.bfloat16)
    save_model(source, load_tokenizer(str(model)), tmp_path / "bf16")
    if "method.name=lora" in options:
        use_method(recipe, "lora")
        options = []
    options = [*options, f"model.name={tmp_path / 'bf16'}", "data.validation=" + str(tmp_path / "rows.jsonl")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fp32 takes more memory than the files
        summary = run(recipe, "run", *options)
        (file,) = (tmp_path / "run" / "model").glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
        # The loss after training is that of the written model, to the bit.
        parts = assemble(load_recipe(recipe, options))
        parts.built.step.loss.model = load_model(str(tmp_path / "run" / "model"))
        with progress.Bar(1) as bar:
            assert lisatune.train.evaluation.held_out(parts, bar)[0] == summary["held_out_loss_after"]


def test_loss_does_not_depend_on_how_a_step_is_cut_into_micro_steps(recipe: Path) -> None:
    run(recipe, "whole", "run.batch_size=4", "run.steps=1", "method.active=4")
    run(recipe, "parts", "run.batch_size=2", "run.accumulation=2", "run.steps=1", "method.active=4")
    whole, parts = metrics(recipe, "whole")[1], metrics(recipe, "parts")[1]
    # Same rows, other order of float32 sums.
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
    assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-4)
    assert whole["tokens"] == parts["tokens"]


def test_full_is_lisa_with_all_blocks_active(recipe: Path) -> None:
    run(recipe, "lisa", "method.active=4")
    use_method(recipe, "full")
    run(recipe, "full")
    assert_same_model(recipe, "lisa", "full")


def test_steps_that_are_not_finite_are_skipped_and_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, calls={2})
    summary = run(recipe, "run", "run.on_nonfinite=skip")
    assert summary["skipped_steps"] == 1
    assert math.isfinite(summary["held_out_loss_after"])
    assert [line["skipped_steps"] for line in metrics(recipe, "run")[1:-1]] == [0, 1, 1, 1]


def test_training_stops_at_a_loss_that_is_not_finite(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, calls={3})
    with pytest.raises(TrainingError, match=r"step 3: loss nan.*last good checkpoint is .*step-000002"):
        run(recipe, "run", "run.save_every=2")


def test_longer_resume_takes_the_new_schedule_from_its_first_step(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, "straight", "run.steps=8")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "resumed", "run.steps=4", after_step=press_ctrl_c(2))
    # Step 2 of 4 under a cosine is at the half, step 2 of 8 at 85 %.
    with pytest.warns(UserWarning, match=r"began with 4 steps and now has 8.* 0.000854 .* been 0.0005"):
        run(recipe, "resumed", "run.steps=8", resume=True)
    rates = [[line["lr"] for line in metrics(recipe, name)[3:-1]] for name in ("straight", "resumed")]
    assert rates[0] == rates[1]


LOSSES = [5.0, 4.0, 3.0, 4.5, 4.4, 4.3, 4.2]
"""Held-out losses of steps 0 to 6: the best is step 2's."""


def set_held_out_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    def look_up(parts: Parts, *_: Any) -> tuple[float, dict[str, float]]:
        return losses[parts.scheduler.last_epoch], {}

    monkeypatch.setattr("lisatune.train.evaluation.held_out", look_up)


BEST = ["run.steps=6", "optimizer.schedule=constant", "run.eval_every=1", "run.keep_best=true"]


@pytest.mark.filterwarnings("ignore:.*blocks will never train")
@pytest.mark.parametrize("name", ["lisa", "lora"])
def test_the_best_model_is_kept_and_written(
    name: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_method(recipe, name)
    run(recipe, "two", "run.steps=2", "optimizer.schedule=constant")
    set_held_out_losses(monkeypatch, LOSSES)
    capsys.readouterr()
    summary = run(recipe, "best", *BEST, "run.save_every=1", "run.keep_checkpoints=1")
    assert (summary["best_step"], summary["held_out_loss_after"], summary["held_out_loss_last"]) == (
        2,
        3,
        4.2,
    )
    assert (
        "step 2 of 6, whose model was written; the last step's held-out loss is 4.200"
        in capsys.readouterr().out
    )
    assert_same_model(recipe, "two", "best")
    kept = {path.name for path in (recipe.parent / "best" / "checkpoints").iterdir()}
    assert kept == {"step-000002", "step-000006"}


def test_the_best_model_is_written_in_the_dtype_that_was_asked_for(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_held_out_losses(monkeypatch, LOSSES)
    run(recipe, "best", *BEST, "run.save_dtype=bf16")
    written = load_file(recipe.parent / "best" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize("saves", ["run.save_async=false", "run.save_async=true"])
def test_where_the_best_step_cannot_be_saved_the_next_best_one_is_kept(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, saves: str
) -> None:
    write = lisatune.files.parts.write_stream

    def fail(path: Path, *rest: Any) -> None:
        if "step-000002" in path.parent.name:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr("lisatune.files.parts.write_stream", fail)
    set_held_out_losses(monkeypatch, [9.0, 5.0, 3.0, 4.0, 4.5, 4.4, 6.0])
    summary = run(recipe, "best", *BEST, saves, "run.on_save_error=continue")
    assert (summary["failed_saves"], summary["best_step"], summary["held_out_loss_after"]) == (1, 3, 4)
    run(recipe, "three", *BEST[1:2], "run.steps=3")
    assert_same_model(recipe, "three", "best")


@pytest.mark.filterwarnings("ignore:.*is stored in bfloat16")
@pytest.mark.parametrize(
    "ends", [["run.keep_best=true", "run.stop_after=2"], ["run.stop_after=1", "optimizer.lr=0.5"]], ids=str
)
def test_the_loss_after_training_is_that_of_the_written_weights(ends: list[str], recipe: Path) -> None:
    options = ["run.steps=6", "optimizer.schedule=constant", "run.eval_every=1", "optimizer.lr=0.2"]
    before = run(recipe, "best", *options, *ends, "run.save_dtype=bf16")
    assert before["steps"] < 6
    again = run(recipe, "again", f"model.name={recipe.parent / 'best' / 'model'}")
    assert again["held_out_loss_before"] == pytest.approx(before["held_out_loss_after"], rel=1e-6)


def test_the_last_step_is_written_if_it_is_the_best(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, "plain", *BEST[:2])
    set_held_out_losses(monkeypatch, [*LOSSES[:6], 2.0])
    summary = run(recipe, "best", *BEST)
    assert (summary["best_step"], summary["held_out_loss_after"]) == (6, 2)
    assert_same_model(recipe, "plain", "best")


def test_a_damaged_best_checkpoint_leaves_the_last_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, "plain", *BEST[:2])
    set_held_out_losses(monkeypatch, LOSSES)

    def damage(state: RunState) -> None:
        if state.step == 6:
            (recipe.parent / "best" / "checkpoints" / "step-000002" / "weights.safetensors").write_text("x")

    with pytest.warns(UserWarning, match="damaged.*the model is that of the last step, not of the best"):
        summary = run(recipe, "best", *BEST, after_step=damage)
    assert (summary["best_step"], summary["held_out_loss_after"]) == (6, 4.2)
    assert_same_model(recipe, "plain", "best")


def test_the_best_of_what_follows_is_kept_where_the_best_checkpoint_is_gone_on_resume(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_held_out_losses(monkeypatch, [9.0, 5.0, 3.0, 4.5, 4.0, 4.4, 6.0])
    options = [*BEST, "run.save_every=1", "run.keep_checkpoints=1"]

    def stop(state: RunState) -> None:
        if state.step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(recipe, "best", *options, after_step=stop)
    best = recipe.parent / "best" / "checkpoints" / "step-000002"
    shutil.rmtree(best)
    with pytest.warns(UserWarning, match=f"the best checkpoint, {best}, is gone or incomplete"):
        summary = run(recipe, "best", *options, resume=True)
    assert (summary["best_step"], summary["held_out_loss_after"]) == (4, 4)


def test_a_run_without_gain_ends_early_and_resumes_exactly(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_held_out_losses(monkeypatch, LOSSES)
    options = [*BEST, "run.stop_after=2"]
    straight = run(recipe, "straight", *options)
    assert (straight["steps"], straight["planned_steps"], straight["best_step"]) == (4, 6, 2)
    assert "after step 4 of 6: the held-out loss no longer fell" in capsys.readouterr().out
    evaluated = [line["step"] for line in metrics(recipe, "straight") if "held_out_loss" in line]
    assert evaluated == [0, 1, 2, 3, 4]
    for after in (1, 3, 4):
        output = f"resumed-{after}"
        with pytest.raises(KeyboardInterrupt):
            run(recipe, output, *options, after_step=press_ctrl_c(after))
        resumed = run(recipe, output, *options, resume=True)
        same = ("steps", "best_step", "held_out_loss_after", "held_out_loss_last")
        assert [resumed[key] for key in same] == [straight[key] for key in same]  # type: ignore[literal-required]
        assert_same_model(recipe, "straight", output)
        assert metrics(recipe, "straight") == metrics(recipe, output)


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Make the training loss NaN at these calls, from 1; evaluation has no gradients and is left alone."""
    original, made = CausalLMLoss.__call__, []

    def poisoned(self: CausalLMLoss, batch: Any) -> Any:
        loss, count = original(self, batch)
        if torch.is_grad_enabled() and not isinstance(loss, FakeTensor):  # the plan's
            made.append(1)
            if len(made) in calls:
                loss = loss * math.nan
        return loss, count

    monkeypatch.setattr(CausalLMLoss, "__call__", poisoned)


def test_batches_are_padded_to_few_lengths_but_not_past_what_the_model_reads(recipe: Path) -> None:
    parts = assemble(load_recipe(recipe))

    def length(num_tokens: int) -> int:
        row = {"input_ids": [5] * num_tokens, "labels": [5] * num_tokens}
        return parts.collate([row])["input_ids"].shape[1]

    assert [length(n) for n in (1, 32, 33, 95)] == [32, 32, 64, 96]  # data.max_length is 96
    parts.built.model.config.max_position_embeddings = 70
    assert [length(n) for n in (60, 65)] == [64, 70]


def test_an_epoch_trains_on_every_row_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    collate = Parts.collate

    def note(self: Parts, rows: Any) -> Any:
        seen.extend(tuple(row["input_ids"]) for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(Parts, "collate", note)
    parts = assemble(load_recipe(recipe, ["data.validation_share=0"]))
    run(recipe, "run", "run.steps=null", "run.epochs=1", "method.active=4", "data.validation_share=0")
    assert sorted(seen) == sorted(tuple(row["input_ids"]) for row in parts.data.train.rows)


def test_steps_after_the_checkpoint_are_logged_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, "straight")
    with monkeypatch.context() as patch:
        poison(patch, calls={4})  # steps 1 to 3 are logged, 2 is saved
        with pytest.raises(TrainingError):
            run(recipe, "resumed", "run.save_every=2")
    assert [line["step"] for line in metrics(recipe, "resumed")] == [0, 1, 2, 3]
    run(recipe, "resumed", "run.save_every=2", resume=True)
    assert metrics(recipe, "resumed") == metrics(recipe, "straight")


def test_a_finished_run_is_left_as_it_is_on_resume_unless_it_is_made_longer(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(recipe, "run", "run.save_every=3")
    folder = recipe.parent / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("lisatune.train.loop.assemble", pytest.fail)
        assert run(recipe, "run", "run.log_every=2", resume=True) == summary
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.warns(UserWarning, match="the run began with 4 steps and now has 5"):
        assert run(recipe, "run", "run.steps=5", resume=True)["steps"] == 5


def test_resume_auto_starts_a_run_continues_it_and_leaves_it_finished(recipe: Path) -> None:
    def wait(state: RunState) -> None:
        raise ZeroDivisionError

    for after, resumed_at in ((wait, 0), (press_ctrl_c(2), 0), (press_ctrl_c(3), 2)):
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            run(recipe, "run", resume="auto", after_step=after)
        assert metrics(recipe, "run")[resumed_at]["step"] == resumed_at
    assert run(recipe, "run", resume="auto") == run(recipe, "run", resume="auto")
    assert [line["step"] for line in metrics(recipe, "run")] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("save_every", "seconds", "steps"),
    [(None, 300, [2, 4]), (None, 1, []), (3, 300, [3]), (0, 300, [])],
)
def test_checkpoints_come_every_ten_minutes_unless_steps_are_asked_for(
    save_every: int | None, seconds: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = 0.0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = SaveClock(save_every)
    for step in range(1, 6):
        now += seconds
        if clock.is_due(step):
            saved.append(step)
            with clock.saving():
                now += 3
    assert saved == steps


def test_saving_by_the_clock_takes_at_most_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, training, saving = 0.0, 0, 0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = SaveClock(None)
    for step in range(1, 1000):
        now, training = now + 60, training + 60
        if clock.is_due(step):
            with clock.saving():
                now, saving = now + 120, saving + 120
    assert 0.045 < saving / training <= 0.051


def test_a_checkpoint_that_nobody_asked_for_cannot_stop_a_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lisatune.train.saving.begin_checkpoint", fail)
    monkeypatch.setattr("lisatune.train.saving.AUTOSAVE_SECONDS", 0)
    monkeypatch.setattr("lisatune.train.saving.AUTOSAVE_FACTOR", 0)
    assert run(recipe, "run", "run.steps=4")["failed_saves"] == 4
    with pytest.raises(OSError, match="No space left"):
        run(recipe, "asked", "run.steps=4", "run.save_every=1")


def test_a_template_that_writes_the_date_resumes_on_another_day(recipe: Path, tmp_path: Path) -> None:
    model = tiny_run.write_model(tmp_path / "dated")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') + '\\n' }}" + template.read_text())
    recipe.write_text(recipe.read_text().replace("data: {", "data: {date: 2020-03-04, "))
    model_key = f"model.name={model}"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "run", model_key, after_step=press_ctrl_c(2))
    recipe.write_text(recipe.read_text().replace("date: 2020-03-04, ", ""))
    with pytest.raises(ValueError, match=r"its records, the tokenizer or data\.date have changed since"):
        run(recipe, "run", model_key, "data.date=2020-03-05", resume=True)
    run(recipe, "run", model_key, resume=True)
    assert "date: 2020-03-04" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_what_cannot_work_fails_before_the_weights_load(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisatune.models.load.load_model", pytest.fail)
    with pytest.raises(ValueError, match="active must be between 0 and the model's 4 blocks, got 5"):
        run(recipe, "run", "method.active=5")


def test_learning_rate_follows_warmup_and_schedule(recipe: Path) -> None:
    run(recipe, "run", "run.steps=6", "optimizer.schedule=linear", "optimizer.warmup_share=0.3")
    factors = [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]
    rates = [line["lr"] for line in metrics(recipe, "run")[1:-1]]
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("method", ["lisa", "full", "galore"])
def test_ends_have_a_rate_of_their_own_that_follows_the_schedule(method: str, recipe: Path) -> None:
    use_method(recipe, method)
    used = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates = {group["layer"] == "ends": group["lr"] for group in optimizer.param_groups}
        used.append((rates[False], rates[True]))

    options = ["run.steps=4", "optimizer.ends_lr=1e-4", "optimizer.warmup_steps=1", "run.check_memory=false"]
    options += ["method.lr_scaling=none"] if method == "lisa" else []
    hook = register_optimizer_step_pre_hook(note)
    try:
        run(recipe, "run", *options)
    finally:
        hook.remove()
    factors = [0, *((1 + math.cos(math.pi * i / 3)) / 2 for i in range(3))]
    assert used == [pytest.approx((1e-3 * factor, 1e-4 * factor)) for factor in factors]
    assert [(line["lr"], line["ends_lr"]) for line in metrics(recipe, "run")[1:-1]] == used


def test_blocks_take_the_rate_by_their_chance_to_train(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def note(optimizer: torch.optim.Optimizer) -> None:
        rates = {group["layer"] == "ends": group["lr"] for group in optimizer.param_groups}
        used.append((rates[True], rates[False]))

    monkeypatch.setattr(torch.optim.Optimizer, "_optimizer_step_code", note)  # called inside a step
    run(recipe, "run", "run.steps=3", "optimizer.warmup_steps=1", "run.check_memory=false")
    chance = 2 / 4
    assert used == [pytest.approx((1e-3 * f, 1e-3 * f / math.sqrt(chance))) for f in (0, 1, 0.5)]
    assert [(line["lr"], line["block_lr"]) for line in metrics(recipe, "run")[1:-1]] == used


def test_commands_say_nothing_to_stderr(recipe: Path) -> None:
    """One process does all three: what an import or a method says first, it says here."""
    lora = recipe.with_name("lora.yaml")
    lora.write_text(recipe.read_text())
    use_method(lora, "lora")
    options = ["optimizer.moments=8bit", "run.check_memory=true"]
    commands = [
        ["plan", "--model", "gpt2", "--length", "8"],
        ["train", str(recipe), *options],
        ["train", str(lora), *options, f"run.output={recipe.parent / 'lora'}"],
    ]
    code = f"from lisatune.cli import main; raise SystemExit(any(main(words) for words in {commands!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("most", [0.01, None])
def test_gradients_are_clipped_to_max_grad_norm(most: float | None, recipe: Path) -> None:
    norms = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    hook = register_optimizer_step_pre_hook(note)
    try:
        run(recipe, "run", f"optimizer.max_grad_norm={'null' if most is None else most}")
    finally:
        hook.remove()
    unclipped = [line["grad_norm"] for line in metrics(recipe, "run")[1:-1]]
    assert min(unclipped) > 0.01
    # Clipping divides by the norm plus 1e-6.
    assert norms == pytest.approx([most] * 4 if most else unclipped, rel=1e-3)


@pytest.mark.parametrize(("precision", "is_mixed"), [("fp32", False), ("bf16-mixed", True)])
def test_precision_decides_about_autocast(
    precision: str, is_mixed: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    loss = CausalLMLoss.__call__

    def note(self: CausalLMLoss, batch: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(self, batch)

    monkeypatch.setattr(CausalLMLoss, "__call__", note)
    run(recipe, "run", f"run.precision={precision}")
    assert set(seen) == {is_mixed}


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_recomputed_where_asked(asked: bool, recipe: Path) -> None:
    parts = assemble(load_recipe(recipe, [f"run.activation_checkpointing={str(asked).lower()}"]))
    assert parts.built.model.is_activation_checkpointing is asked


def test_recomputing_frozen_blocks_trains_the_same_weights(recipe: Path) -> None:
    run(recipe, "stored")
    run(recipe, "recomputed", "run.activation_checkpointing=frozen")
    folders = [recipe.parent / name / "model" / "model.safetensors" for name in ("stored", "recomputed")]
    assert folders[0].read_bytes() == folders[1].read_bytes()
