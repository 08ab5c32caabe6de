"""LoRA through PEFT as a method of a recipe: only adapters train, and what comes out is PEFT's own form."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_run
from lisatune.cli.app import main
from lisatune.methods import Lora
from lisatune.models.load import load_model, meta_model
from lisatune.runs import manifest
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe

IDS_BT = torch.arange(12).view(2, 6)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tiny_run.write_model(tmp_path / "tiny")
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    return tiny_run.write_recipe(tmp_path, model, rows, "method: {name: lora, rank: 4}\n")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS_BT).logits
    return found


def test_only_adapters_train_and_plain_peft_loads_them(recipe: Path, tmp_path: Path) -> None:
    summary = train(load_recipe(recipe))
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    folder = tmp_path / "run" / "model"
    assert not (folder / "model.safetensors").exists()
    names = load_file(folder / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = logits(PeftModel.from_pretrained(base, str(folder)))
    assert torch.equal(logits(load_model(str(folder))), theirs)
    assert not torch.equal(before, theirs)


def test_trained_and_stored_numbers_are_those_of_rank_and_layers(recipe: Path) -> None:
    summary = train(load_recipe(recipe))
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (32, 16), (32, 16), (16, 32)]  # q k v o gate up down
    adapters = tiny_run.BLOCKS * 4 * sum(out + into for out, into in shapes)
    assert summary["peak_trainable"] == adapters
    assert summary["peak_state_elements"] == 2 * adapters


def test_the_optimizer_keys_hold_for_adapters_too(recipe: Path) -> None:
    wide, compact = (
        train(load_recipe(recipe, [f"optimizer.moments={kind}"]), overwrite=True) for kind in ("fp32", "bf16")
    )
    # A step counter of 4 bytes for each adapter matrix stands beside the moments in both.
    matrices = 2 * 7 * tiny_run.BLOCKS
    assert 2 * (compact["peak_state_bytes"] - 4 * matrices) == wide["peak_state_bytes"] - 4 * matrices


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore:.*keys of method lora:UserWarning")
def test_a_second_run_continues_where_the_first_ended(name: str, recipe: Path, tmp_path: Path) -> None:
    first = train(load_recipe(recipe, [f"method.name={name}", "method.rank=4"]))
    more = [f"method.adapter={tmp_path / 'run' / 'model'}", f"run.output={tmp_path / 'more'}"]
    second = train(load_recipe(recipe, [f"method.name={name}", "method.rank=4", *more]))
    assert second["held_out_loss_before"] == first["held_out_loss_after"]
    assert second["held_out_loss_after"] < first["held_out_loss_after"]


def test_resume_is_exact(recipe: Path, tmp_path: Path) -> None:
    overrides = [f"run.output={tmp_path / 'again'}", "run.save_every=2", "optimizer.schedule=constant"]
    train(load_recipe(recipe, ["optimizer.schedule=constant"]), overwrite=True)
    whole = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    train(load_recipe(recipe, [*overrides, "run.steps=2"]))
    assert manifest.newest_checkpoint(tmp_path / "again" / "checkpoints") is not None
    train(load_recipe(recipe, overrides), resume=True)
    parts = load_file(tmp_path / "again" / "model" / "adapter_model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_checkpoints_hold_adapters_alone_and_resume_beside_the_same_base(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = "optimizer.schedule=constant"
    train(load_recipe(recipe, ["run.save_every=2", "run.steps=2", constant]))
    checkpoint = manifest.newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    stored = load_file(checkpoint / "weights.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)
    file = tmp_path / "tiny" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert main(["train", str(recipe), constant, "--resume"]) == 2
    error = capsys.readouterr().err
    assert "the base model is another one: 1 of 38 frozen weights changed, first " in error
    weights["model.norm.weight"] -= 1
    save_file(weights, file, metadata={"format": "pt"})
    assert main(["train", str(recipe), constant, "--resume"]) == 0


def test_generate_answers_from_a_run_with_adapters(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(load_recipe(recipe))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "hi", "--max-new-tokens", "2"]) == 0
    assert main(["check", str(recipe), f"model.name={tmp_path / 'run' / 'model'}", "--overwrite"]) == 2
    assert "adapters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.rank=0"], "method.rank must be >= 1, got 0"),
        (["method.dropout=1"], "method.dropout must be >= 0 and below 1, got 1"),
        (["method.adapter_dtype=bf16"], "adapter"),
        (["method.alpha=0"], "method.alpha must be > 0, got 0"),
        (
            ["method.targets=[q_poj]"],
            "method.targets names 'q_poj', but the blocks' linear layers are "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (["method.active=2"], "active"),
    ],
)
def test_bad_input_is_one_sentence(
    recipe: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *overrides]) == 2
    assert message in capsys.readouterr().err


def test_targets_and_ends_choose_the_modules(tmp_path: Path) -> None:
    folder = tiny_run.write_model(tmp_path / "tiny")

    def adapted(method: Lora) -> set[str]:
        names = dict(method.prepare(meta_model(str(folder))).named_parameters())
        return {name.split(".lora_")[0].split(".")[-1] for name in names if "lora_" in name}

    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(Lora(targets=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    assert adapted(Lora()) == linear
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # PEFT's own advice
        both = adapted(Lora(ends=True))
    assert both == linear | {"embed_tokens", "lm_head"}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # PEFT's advice
def test_ends_and_dropout_train_resume_exactly_and_load_with_equal_logits(
    recipe: Path, tmp_path: Path
) -> None:
    options = ["method.ends=true", "method.dropout=0.5", "optimizer.schedule=constant", "run.save_every=2"]
    summary = train(load_recipe(recipe, options))
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    whole = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    for end in ("embed_tokens", "lm_head"):
        moved = [each for name, each in whole.items() if end in name and "lora_" in name]
        assert len(moved) == 2
        assert all(each.any() for each in moved)
    options.append(f"run.output={tmp_path / 'again'}")
    train(load_recipe(recipe, [*options, "run.steps=2"]))
    train(load_recipe(recipe, options), resume=True)  # draws the same dropout as if it had never stopped
    parts = load_file(tmp_path / "again" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    without = train(load_recipe(recipe, [*options, "method.dropout=0"]), overwrite=True)
    assert without["held_out_loss_after"] != summary["held_out_loss_after"]


def test_adapters_in_the_dtype_of_the_weights_take_half_and_train(recipe: Path, tmp_path: Path) -> None:
    summaries, stored = {}, {}
    for kind in ("fp32", "weights"):
        options = ["run.precision=bf16", f"method.adapter_dtype={kind}", "optimizer.schedule=constant"]
        summaries[kind] = train(load_recipe(recipe, options), overwrite=True)
        stored[kind] = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {each.dtype for each in stored["fp32"].values()} == {torch.float32}
    assert {each.dtype for each in stored["weights"].values()} == {torch.bfloat16}
    numbers = summaries["weights"]["peak_trainable"]
    # Exact rounding keeps 2 bytes for each bf16 adapter weight beside its float32 moments.
    assert summaries["weights"]["peak_state_bytes"] - summaries["fp32"]["peak_state_bytes"] == 2 * numbers
    for summary in summaries.values():
        assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    # lr 1e-3 over 4 steps: the rounding of bf16 activations, no more, tells the runs apart.
    losses = [summary["held_out_loss_after"] for summary in summaries.values()]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_adapters_without_the_name_of_their_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="does not name the model"):
        load_model(str(tmp_path))
