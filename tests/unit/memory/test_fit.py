import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lisatune.cli.app import main
from lisatune.memory import fit as searches
from lisatune.memory.fit import BF16, CARD_GB, Fit, apply_changes, find_fit, parse_memory_size
from lisatune.memory.plan import RESERVE_BYTES, plan_memory
from lisatune.methods import METHODS
from lisatune.optim import codecs
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig
from plans import PlansOnce


@pytest.fixture(scope="module")
def planned() -> Iterator[PlansOnce]:
    """Plan a recipe once for all tests of this file, also where a search asks for it."""
    plans = PlansOnce()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searches, "plan_memory", plans)
        yield plans


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def make_recipe(folder: Path) -> Recipe:
    return Recipe(
        model=ModelConfig(name=str(folder)),
        data=DataConfig(train="none", max_length=512),
        method=METHODS["lisa"](active=2),
        run=RunConfig(precision="fp32", batch_size=2, device="cuda"),
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * CARD_GB), ("24GiB", 24 * 2**30), ("24", 24 * CARD_GB), (" 81559 MiB", 81559 * 2**20)],
)
def test_memory_sizes_are_read(text: str, size: int) -> None:
    assert parse_memory_size(text) == size


@pytest.mark.parametrize("text", ["24 apples", "GB", "-3GB", "0GB", "", "24GBs"])
def test_wrong_units_are_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="--gpu must be an amount of memory such as 24GB"):
        parse_memory_size(text)


def test_a_device_that_is_large_enough_changes_nothing(folder: Path) -> None:
    fit = find_fit(make_recipe(folder), 10**12)
    assert fit.fits
    assert fit.changes == {}


def test_what_is_found_fits_and_nothing_in_it_is_needless(folder: Path, planned: PlansOnce) -> None:
    recipe = make_recipe(folder)
    whole = planned(recipe)
    size = RESERVE_BYTES + int(0.75 * whole.peak_bytes)
    fit = find_fit(recipe, size, first=whole)
    assert fit.fits
    assert fit.changes
    assert planned(apply_changes(recipe, fit.changes)).needed_bytes == fit.plan.needed_bytes <= size
    rows = {"run.batch_size", "run.accumulation"}
    assert (rows & fit.changes.keys()) in (set(), rows)  # or a step would have fewer rows
    for key in fit.changes:
        gone = rows if key in rows else {key}
        fewer = {other: value for other, value in fit.changes.items() if other not in gone}
        assert planned(apply_changes(recipe, fewer)).needed_bytes > size


def test_moments_of_8_bits_are_the_first_change(folder: Path, planned: PlansOnce) -> None:
    recipe = make_recipe(folder)
    eight = planned(apply_changes(recipe, {"optimizer.moments": "8bit"}))
    assert find_fit(recipe, eight.needed_bytes).changes == {"optimizer.moments": "8bit"}


def test_on_a_cpu_the_copy_of_a_checkpoint_is_the_first_to_go(folder: Path, planned: PlansOnce) -> None:
    plain = apply_changes(make_recipe(folder), {"run.device": "cpu"})
    copies = apply_changes(plain, {"run.save_async": True})
    enough = planned(plain).needed_bytes
    assert find_fit(copies, enough).changes == {"run.save_async": False}
    assert find_fit(copies, planned(copies).needed_bytes).changes == {}


def test_where_cheaper_ends_would_do_too_a_step_has_fewer_rows_at_a_time(
    folder: Path, planned: PlansOnce
) -> None:
    recipe, eight = apply_changes(make_recipe(folder), BF16[0]), {"optimizer.moments": "8bit"}
    fewer_rows = eight | {"run.batch_size": 1, "run.accumulation": 2}
    frozen = eight | {"method.ends": "frozen"}
    size = max(planned(apply_changes(recipe, each)).needed_bytes for each in (fewer_rows, frozen))
    assert find_fit(recipe, size).changes.items() <= fewer_rows.items()


def test_without_bitsandbytes_something_else_is_changed(
    folder: Path, planned: PlansOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(folder)
    whole = planned(recipe)

    def missing() -> None:
        raise ImportError("no bitsandbytes")

    monkeypatch.setattr(codecs, "_bitsandbytes", missing)
    monkeypatch.setattr(searches, "plan_memory", plan_memory)  # what was planned with it does not count
    fit = find_fit(recipe, int(0.98 * whole.needed_bytes), first=whole)
    assert fit.fits
    assert "8bit" not in fit.overrides
    assert fit.missing == fit.as_dict()["missing"] == "no bitsandbytes"


@pytest.mark.parametrize(("gb", "gib"), [(24, 23.53), (24, 23.61), (40, 39.45), (80, 79.25)])
def test_a_card_has_the_memory_of_its_name(gb: int, gib: float) -> None:
    """A30, RTX 4090 and both A100, as torch reports them: what fits the name fits the card."""
    assert 0.98 * gib * 2**30 < parse_memory_size(f"{gb}GB") <= gib * 2**30


def test_weights_in_bf16_are_tried(folder: Path, planned: PlansOnce) -> None:
    recipe = make_recipe(folder)
    changes = {"optimizer.moments": "8bit", "run.precision": "bf16"}
    both = planned(apply_changes(recipe, changes)).needed_bytes
    assert both < planned(apply_changes(recipe, {"optimizer.moments": "8bit"})).needed_bytes
    assert find_fit(recipe, both).changes.items() <= changes.items()


def test_where_nothing_fits_the_smallest_is_shown(folder: Path, planned: PlansOnce) -> None:
    recipe = make_recipe(folder)
    fit = find_fit(recipe, RESERVE_BYTES + 10**6)
    assert not fit.fits
    assert fit.plan.batch_size == 1
    assert fit.plan.needed_bytes < planned(recipe).needed_bytes


def test_command_prints_one_json_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(folder), "--length", "128", "--gpu", "1TB", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["length"] == 128
    assert values["fit"]["fits"] is True
    assert sum(values["at_peak"].values()) == values["peak_bytes"]


def test_command_takes_overrides_without_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trainable(*more: str) -> int:
        assert main(["plan", "--model", str(folder), "data.max_length=64", "--json", *more]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["batch_size"] == 1  # as without overrides
        return int(values["trainable"])

    assert trainable("method.active=1") < trainable("method.active=2") < trainable("--method", "full")


def test_command_prints_a_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arithmetic = ("--ranks", "2", "optimizer.name=muon")
    assert main(["plan", "--model", str(folder), "--length", "256", *arithmetic]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "activations", "peak", "divided by ranks"):
        assert word in text
    monkeypatch.setattr(searches, "find_fit", lambda *_, first, **__: Fit(1, False, {}, (), first))
    assert main(["plan", "--model", str(folder), "--length", "64", "--gpu", "601MiB"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_bad_input_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["plan"], "give a recipe file, or --model"),
        (["plan", "--model", str(folder), "--gpu", "24XB"], "--gpu must be an amount"),
        (["plan", "--model", str(folder), "--ranks", "0"], "ranks must be >= 1"),
        (["plan", "--model", str(folder), "run.device=gpu"], "unknown run.device 'gpu'; use auto or one of"),
        (["plan", "--model", str(folder), "method.activ=1"], "Did you mean 'method.active'?"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run.precision": "bf16"},
        {"optimizer.moments": "8bit"},
        {"optimizer.state_device": "cpu"},
        {"optimizer.name": "sgd"},
        {"run.activation_checkpointing": "frozen"},
    ],
    ids=str,
)
def test_models_that_resist_fake_tensors_get_arithmetic(
    changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    recipe = apply_changes(make_recipe(folder), changes)
    plain, forward = plan_memory(recipe), LlamaMLP.forward

    def looks(self: LlamaMLP, x: object) -> object:
        assert float(x.sum()) == float(x.sum())  # type: ignore[attr-defined]
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", looks)
    plan = plan_memory(recipe)
    assert plan.kind == "arithmetic"
    assert plan.note is not None
    assert "layers.0.mlp (LlamaMLP) cannot be traced" in plan.note
    assert plan.at_peak["weights"] == pytest.approx(plain.at_peak["weights"], rel=1e-3)
    assert plan.at_peak["optimizer state"] == plain.at_peak["optimizer state"]
    assert plan.host_bytes == plain.host_bytes
    assert plain.at_peak["activations"] / 2 < plan.at_peak["activations"] < 2 * plain.at_peak["activations"]
    assert plain.peak_bytes / 2 < plan.peak_bytes < 2 * plain.peak_bytes
