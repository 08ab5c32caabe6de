"""Runs with `loss.name: reward`: they make reward models, resume exactly, and refuse what cannot work."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny_run
from lisatune.cli.app import main
from lisatune.compare.arms import read_comparison
from lisatune.losses.reward import RewardLoss
from lisatune.memory import measure
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.methods import METHODS
from lisatune.methods.build import build
from lisatune.models.load import load_model
from lisatune.report.run_page import make_runs_page
from lisatune.train.assemble import assemble
from lisatune.train.check import check
from lisatune.train.loop import train
from pair_runs import assert_resume_is_bit_equal, load_pairs, read_metrics
from toy_members import ForwardMethod

METHODS_TRIED = ("full", "lisa", "lora")
REFUSED = ("bottleneck", "mezo", "prefix", "prompt")
"""Methods that have no place for a score that trains, or bring a step of their own."""

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"Count to {i}.", "chosen": "1 " * (i % 5 + 1), "rejected": "no"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "method: {active: 2, period: 3}\nloss: {name: reward}\n"
    path = tiny_run.write_recipe(tmp_path, model, tmp_path / "pairs.jsonl", more)
    path.write_text(path.read_text().replace("samples: 1, sample_tokens: 4, ", ""))
    return path


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", METHODS_TRIED)
def test_a_run_makes_a_reward_model_that_plain_libraries_open(method: str, recipe: Path) -> None:
    lr = "optimizer.lr=3e-2" if method == "lora" else "optimizer.lr=1e-2"
    asked = load_pairs(recipe, "run", "run.steps=8", "run.eval_every=4", lr, method=method)
    summary = train(asked)
    assert summary["held_out_loss_after"] < 0.4 < summary["held_out_loss_before"] < 1
    assert summary["held_out_margin_after"] > 1
    assert summary["held_out_accuracy_after"] == 1
    assert summary["samples"] == []
    evaluated = [line for line in read_metrics(recipe) if "held_out_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    assert evaluated[-1]["held_out_margin"] == summary["held_out_margin_after"]

    folder = recipe.parent / "run" / "model"
    if method == "lora":
        written = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    else:
        written = AutoModelForSequenceClassification.from_pretrained(folder)
        assert written.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = assemble(asked)
    rewards = []
    for row in parts.data.validation.rows:
        text = tokenizer.decode(row["input_ids"])
        encoded = tokenizer(text, return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == list(row["input_ids"])
        rewards.append(float(written(**encoded).logits.detach()))
    margins = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    assert sum(margins) / len(margins) == pytest.approx(summary["held_out_margin_after"], abs=1e-4)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert f"{'AutoPeft' if method == 'lora' else 'Auto'}ModelForSequenceClassification" in card


@pytest.mark.parametrize("method", METHODS_TRIED)
def test_resume_is_bit_equal(method: str, recipe: Path) -> None:
    assert_resume_is_bit_equal(recipe, method)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(REFUSED)))
def test_the_score_trains_with_every_method_that_is_not_refused(name: str, recipe: Path) -> None:
    own = {"badam": ("method.ends=head", "method.switch_every=1"), "freezeout": ("method.period=1",)}
    keys = own.get(name, ())
    asked = load_pairs(recipe, "run", *keys, method=name)
    before = assemble(asked)
    score = {
        key: p.detach().clone()
        for key, p in before.built.model.named_parameters()
        if "score" in key and "original" not in key
    }
    assert len(score) == 1
    train(asked)
    written = read_weights(recipe.parent / "run" / "model")
    (weight,) = (each for key, each in written.items() if "score" in key)
    assert not torch.equal(weight, next(iter(score.values())))


def test_the_score_is_drawn_from_the_runs_seed_and_one_that_is_there_is_kept(
    model: Path, recipe: Path
) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (load_model(str(model), score_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    train(load_pairs(recipe))
    folder = recipe.parent / "run" / "model"
    trained = load_model(str(folder), score_seed=5).score.weight
    assert torch.equal(trained, read_weights(folder)["score.weight"])
    again = train(load_pairs(recipe, "again", f"model.name={folder}"))
    assert again["held_out_loss_before"] == pytest.approx(read_metrics(recipe)[-1]["held_out_loss"], abs=1e-5)


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_the_plan_is_what_a_step_takes(method: str, precision: str, recipe: Path) -> None:
    options = ["run.batch_size=4", f"run.precision={precision}"]
    asked = load_pairs(recipe, "run", *options, *(["method.verify=off"] * (method == "lisa")), method=method)
    plan = plan_memory(asked)
    assert plan.batch_size == 8
    base = load_model(asked.model.name, score_seed=0)
    built = build(asked, base, RewardLoss(base), steps=4, device=torch.device("cpu"))
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


def test_with_ends_head_the_score_trains_and_the_embedding_does_not(model: Path, recipe: Path) -> None:
    train(load_pairs(recipe, "run", "method.ends=head"))
    before, after = read_weights(model), read_weights(recipe.parent / "run" / "model")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    drawn = load_model(str(model), score_seed=0).score.weight
    assert not torch.equal(after["score.weight"], drawn)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_frozen_blocks_may_be_codes(weights: str, recipe: Path) -> None:
    summary = train(
        load_pairs(recipe, "run", f"method.frozen_weights={weights}", "optimizer.lr=1e-2", "run.steps=6")
    )
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    AutoModelForSequenceClassification.from_pretrained(recipe.parent / "run" / "model")


def test_records_need_no_prompt_and_long_pairs_are_dropped(recipe: Path) -> None:
    rows = [{"chosen": "yes " * (i + 1), "rejected": "no " * (i + 1)} for i in range(16)]
    rows.append({"chosen": "yes " * 40, "rejected": "no"})
    (recipe.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check(load_pairs(recipe, "run", "data.validation_share=0"))
    assert report.problems == []
    assert report.outline is not None
    assert (report.outline.row_word, report.outline.train_rows) == ("pair", 16)
    assert report.outline.loss_tokens == 32
    assert (report.outline.num_dropped, report.outline.num_cut) == (1, 0)
    assert report.outline.records == "pairs, without a template; reward"
    held_out = check(load_pairs(recipe, "run", "data.long=cut", "loss.center=0.01")).outline
    assert held_out is not None
    assert (held_out.train_rows, held_out.validation_rows) == (13, 4)
    assert held_out.records == "pairs, without a template; reward centred with c 0.01"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.packing=true"], "data.packing=true cannot work with loss.name=reward: an answer is scored"),
        (["data.streaming=true", "run.steps=2"], "data.streaming=true cannot work with loss.name=reward"),
        (["data.long=split"], "data.long=split cannot work with loss.name=reward"),
        (["optimizer.name=sophia"], "optimizer.name=sophia cannot work with loss.name=reward: its curvature"),
        (["run.samples=2"], "run.samples=2 cannot work with loss.name=reward: a reward model writes no text"),
        (["run.evaluate=arc_easy"], "run.evaluate=arc_easy cannot work with loss.name=reward"),
        (["method.ends=frozen"], "method.ends=frozen cannot work with loss.name=reward: the score would"),
        (["method.name=badam"], "method.ends=frozen cannot work with loss.name=reward"),
        (["method.name=prompt"], "loss.name=reward cannot work with method prompt: it trains what it adds"),
        (["method.name=prefix"], "loss.name=reward cannot work with method prefix: it trains what it adds"),
        (["method.name=bottleneck"], "loss.name=reward cannot work with method bottleneck"),
        (["method.name=mezo"], "loss.name=reward cannot work with method mezo, which brings a training step"),
        (["loss.center=-1"], "loss.center must be a number >= 0, got -1"),
        (["loss.beta=0.2"], "loss.beta=0.2 does nothing with loss.name=reward"),
        (["loss.name=dpo", "loss.center=0.1"], "loss.center=0.1 does nothing with loss.name=dpo"),
    ],
)
# The keys of LISA in the file are left out for another method.
@pytest.mark.filterwarnings("ignore:.*left out. keys of method lisa")
def test_settings_that_cannot_work_are_refused_by_name(recipe: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_pairs(recipe, "run", *overrides)


def test_a_step_of_its_own_and_a_comparison_are_refused(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"loss.name=reward cannot work with method .*a training step"):
        ForwardMethod().check_loss(load_pairs(recipe).loss)
    with pytest.raises(ValueError, match=r"compares next-token losses, and loss.name is reward"):
        read_comparison(recipe, methods="full,lisa")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_needs_text_refuses_a_reward_model(
    method: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_pairs(recipe, method=method))
    run = str(recipe.parent / "run")
    converter = recipe.parent / "convert.py"
    converter.write_text("")
    commands = [
        ["generate", run, "--prompt", "Hi", "--device", "cpu"],
        ["evaluate", run, "--mt-bench", "answers", "--device", "cpu"],
    ]
    if method == "full":
        other = [f"model.name={run}/model", f"run.output={recipe.parent / 'other'}"]
        commands += [
            ["train", str(recipe), "loss.name=dpo", *other],
            ["export", run, "--gguf", "q8_0", "--converter", str(converter)],
            ["export", run, "--lora", "4"],
        ]
    for command in commands:
        assert main(command) == 2, command
        said = " ".join(capsys.readouterr().err.split())
        assert "scores and writes no text" in said or "scores and write no text" in said, command


def test_a_delta_holds_the_score_and_a_report_shows_the_run(recipe: Path) -> None:
    train(load_pairs(recipe, "run", method="full"))
    run, out = recipe.parent / "run", recipe.parent / "out"
    assert main(["export", str(run), "--delta", "--output", str(out / "delta")]) == 0
    base = load_pairs(recipe).model.name
    apply = ["export", str(out / "delta"), "--apply", "--base", base]
    assert main([*apply, "--output", str(out / "model")]) == 0
    again, first = read_weights(out / "model"), read_weights(run / "model")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert make_runs_page([run]).problems == []
