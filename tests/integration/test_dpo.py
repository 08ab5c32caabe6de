"""Runs with `loss.name: dpo`: they learn preferences, resume exactly, and refuse what cannot work."""

import json
import signal
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_run
from lisatune.data.batches import collate
from lisatune.data.prepare import prepare_data
from lisatune.losses.dpo import DPOLoss
from lisatune.memory import measure
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.methods.build import build
from lisatune.models.load import load_model, load_tokenizer
from lisatune.runs.summary import Summary
from lisatune.train.assemble import assemble
from lisatune.train.check import check
from lisatune.train.loop import train
from lisatune.train.resume import RunState
from pair_runs import assert_resume_is_bit_equal, load_pairs, read_metrics
from toy_members import ForwardMethod

METHODS = ("full", "lisa", "lora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    pairs = tiny_run.write_pairs(tmp_path / "pairs.jsonl", 16)
    more = "method: {active: 2, period: 3}\nloss: {name: dpo}\n"
    return tiny_run.write_recipe(tmp_path, model, pairs, more)


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_the_preference_and_says_how_well(method: str, recipe: Path) -> None:
    lr = "optimizer.lr=3e-2" if method == "lora" else "optimizer.lr=1e-2"
    summary = train(load_pairs(recipe, "run", "run.steps=8", "run.eval_every=4", lr, method=method))
    assert summary["held_out_loss_before"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert summary["held_out_margin_before"] == pytest.approx(0, abs=1e-6)
    assert summary["held_out_loss_after"] < 0.66
    assert summary["held_out_margin_after"] > 0.1
    assert summary["held_out_accuracy_after"] == 1
    evaluated = [line for line in read_metrics(recipe) if "held_out_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    assert evaluated[-1]["held_out_margin"] == summary["held_out_margin_after"]
    kind = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    kind.from_pretrained(recipe.parent / "run" / "model")


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_equal(method: str, recipe: Path) -> None:
    assert_resume_is_bit_equal(recipe, method)


def test_the_reference_is_of_the_model_before_training_and_is_kept(model: Path, recipe: Path) -> None:
    train(load_pairs(recipe, "run", "optimizer.lr=1e-2"))
    kept = load_file(recipe.parent / "run" / "reference" / "log_probs.safetensors")["log_probs"]
    data = prepare_data(load_pairs(recipe), load_tokenizer(str(model)))
    rows = [*data.train.rows, *data.validation.rows]
    assert len(kept) == len(rows) == 32
    loss = DPOLoss(load_model(str(model)), beta=0.1)
    with torch.no_grad():
        found = torch.cat([loss.log_probs(collate([row])) for row in rows])
    torch.testing.assert_close(kept, found, rtol=1e-5, atol=1e-4)


def test_a_resume_without_the_reference_it_began_with_is_refused(recipe: Path) -> None:
    def press(state: RunState) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(load_pairs(recipe), after_step=press)
    file = recipe.parent / "run" / "reference" / "log_probs.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"log_probs.safetensors is not the one that the run began with"):
        train(load_pairs(recipe), resume=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"log_probs.safetensors is gone"):
        train(load_pairs(recipe), resume=True)
    file.write_bytes(content)
    assert train(load_pairs(recipe), resume=True)["steps"] == 4


def test_a_run_stopped_before_its_first_checkpoint_says_how_to_start_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    unsaved = load_pairs(recipe, "run", "run.save_every=0", "run.log_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(DPOLoss, "log_probs", stop)
        with pytest.raises(KeyboardInterrupt, match="nothing was trained yet, so start again with the same"):
            train(unsaved)
    with pytest.raises(ValueError, match=r"before its first checkpoint, .* again without --resume"):
        train(unsaved, resume=True)
    with pytest.raises(KeyboardInterrupt, match="start over with the same command and --overwrite"):
        train(unsaved, after_step=stop)
    with pytest.raises(ValueError, match=r"before its first checkpoint, .* --overwrite in place of --resume"):
        train(unsaved, resume=True)
    assert train(unsaved, overwrite=True)["steps"] == 4


def test_the_best_model_is_written_with_its_own_figures(recipe: Path) -> None:
    other = recipe.parent / "other.jsonl"  # prefers what training teaches to avoid
    other.write_text(json.dumps({"prompt": "Count to 2.", "chosen": "no", "rejected": "1 1 "}) + "\n")
    best = ("run.steps=8", "run.eval_every=2", "run.keep_best=true", "optimizer.lr=1e-2")
    summary = train(load_pairs(recipe, "run", *best, f"data.validation={other}"))
    evaluated = {line["step"]: line for line in read_metrics(recipe) if "held_out_loss" in line}
    assert summary["best_step"] == 2
    for name in ("loss", "accuracy", "margin"):
        wanted = evaluated[summary["best_step"]][f"held_out_{name}"]
        assert summary[f"held_out_{name}_after"] == pytest.approx(wanted, abs=1e-6)  # type: ignore[literal-required]


def test_how_pairs_are_spread_over_micro_steps_makes_no_difference(recipe: Path) -> None:
    def losses(output: str, *how: str) -> list[float]:
        train(load_pairs(recipe, output, "run.steps=3", "optimizer.lr=1e-2", *how, method="full"))
        return [line["loss"] for line in read_metrics(recipe, output) if "loss" in line]

    apart = losses("apart", "run.batch_size=2", "run.accumulation=2")
    assert losses("together", "run.batch_size=4") == pytest.approx(apart, rel=1e-4)
    assert apart[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_both_answers_of_each_pair(method: str, recipe: Path) -> None:
    asked = load_pairs(
        recipe, "run", "run.batch_size=4", *(["method.verify=off"] if method == "lisa" else []), method=method
    )
    plan = plan_memory(asked)
    assert plan.batch_size == 8
    base = load_model(asked.model.name)
    built = build(asked, base, DPOLoss(base, beta=0.1), steps=4, device=torch.device("cpu"))
    with measure(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            if plan.active_blocks is not None:
                built.schedule.hold(plan.active_blocks)
            built.step.backward([make_batch(asked, base, plan.length)])
            built.step.clip()
            built.step.update()
            measured = tracker.end_step().peak_bytes
    assert plan.kind == "traced"
    assert measured == pytest.approx(plan.peak_bytes, rel=0.03)


def test_one_batch_holds_the_two_answers_side_by_side(recipe: Path) -> None:
    parts = assemble(load_pairs(recipe))
    batch = parts.collate(parts.data.batch(0))
    assert batch.keys() == {"input_ids", "labels", "position_ids", "number"}
    assert batch["number"].view(-1, 2).diff(dim=1).tolist() == [[1], [1]]
    assert (batch["number"][::2] % 2 == 0).all()
    texts = parts.tokenizer.batch_decode(batch["input_ids"])
    assert ["no<eos>" in text for text in texts] == [False, True] * 2


def test_check_outlines_pairs(recipe: Path) -> None:
    report = check(load_pairs(recipe))
    assert report.problems == []
    outline = report.outline
    assert outline is not None
    assert (outline.row_word, outline.train_rows, outline.validation_rows) == ("pair", 12, 4)
    assert outline.records == "pairs, without a template; dpo with β 0.1"
    assert outline.batch == "2 pairs of up to 96 tokens"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.packing=true"], "data.packing=true cannot work with loss.name=dpo: an answer is scored"),
        (["data.loss_on=all"], "data.loss_on=all cannot work with loss.name=dpo"),
        (["data.loss_on=[user]"], r"data.loss_on=\[user\] cannot work with loss.name=dpo: only answers are"),
        (["data.long=split"], "data.long=split cannot work"),
        (["data.kind=alpaca"], "data.kind=alpaca cannot work"),
        (["data.train=python-docs"], "data.train=python-docs cannot work"),
        (["optimizer.name=sophia"], "optimizer.name=sophia cannot work with loss.name=dpo: its curvature"),
        (["method.name=prompt"], "loss.name=dpo cannot work with method prompt: it compares"),
        (["loss.beta=0"], "loss.beta must be a positive number, got 0"),
        (["loss.name=ppo"], "loss.name.*ppo"),
        (["loss.name=causal_lm", "loss.beta=0.2"], "loss.beta=0.2 does nothing with loss.name=causal_lm"),
    ],
)
# The keys of LISA in the file are left out for another method.
@pytest.mark.filterwarnings("ignore:.*left out. keys of method lisa")
def test_settings_that_cannot_work_are_refused_by_name(recipe: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_pairs(recipe, "run", *overrides)


def test_a_method_with_a_step_of_its_own_is_refused(recipe: Path) -> None:
    says = r"loss.name=dpo cannot work with method .*which brings a training step of its own; use lisa, full"
    with pytest.raises(ValueError, match=says):
        ForwardMethod().check_loss(load_pairs(recipe).loss)


def test_bad_pairs_are_refused_before_weights_load_pairs(recipe: Path) -> None:
    with (recipe.parent / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "chosen": "a", "rejected": "b"}) + "\n")
    says = r"the prompt has 200 tokens, so data.max_length=96 leaves nothing of the answers"
    with pytest.raises(ValueError, match=says):
        train(load_pairs(recipe, "run", "data.validation_share=0"))
    assert any("the prompt has 200 tokens" in problem for problem in check(load_pairs(recipe)).problems)
    assert not (recipe.parent / "run").exists()
    dropped: Summary = train(load_pairs(recipe, "run", "data.long=drop", method="full"))
    assert dropped["steps"] == 4


def test_pairs_without_the_loss_for_them_are_refused_with_what_to_set(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"'chosen' holds a preferred answer.*set loss.name: dpo"):
        train(load_pairs(recipe, "run", "loss.name=causal_lm"))
