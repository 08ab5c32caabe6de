"""Adapters on two ranks over gloo: the same as on one, and the same files.

The recipes and the tolerance are those of `test_ranks.py`.
"""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rank_copies
import tiny
import tiny_run
from rank_launcher import launch
from rank_runs import RankRuns

PLAIN = [
    "optimizer.eps=1e-3",
    "optimizer.lr=1e-2",
    "run.samples=0",
    "run.check_memory=false",
    "optimizer.schedule=constant",
]
METHODS = {
    "lora": "{name: lora, rank: 3, ends: true}",
    "dora": "{name: dora, rank: 3}",
    "ia3": "{name: ia3}",
    "bottleneck": "{name: bottleneck, size: 5}",
    "qlora": "{name: qlora}",
}
SAVED = ("dora", "qlora")
DROPOUT = "method.dropout=0.3"
NARROW = "run.precision=bf16"


COPIES = {
    "loop": (
        "bare",
        "before",
        "after",
        "bare coded",
        "before coded",
        "after coded",
        "after both",
        "bare corrected",
    ),
    "trainer": ("plain", "checkpointing", "plain both"),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> RankRuns:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_run.write_model(folder / "model")
    return RankRuns(folder, model, tiny_run.write_rows(folder / "rows.jsonl", 13), METHODS, PLAIN)


@pytest.fixture(scope="module")
def two(adapters: RankRuns) -> dict[str, list[Any]]:
    """Results of each of two ranks by name."""
    half, saves = "run.batch_size=1", ["run.steps=3", "run.save_every=3"]
    jobs = {name: adapters.job(name, f"two-{name}", half) for name in METHODS}
    jobs["lora"]["overrides"].append("run.samples=1")
    jobs["packed"] = adapters.job("lora", "two-packed", half, "data.packing=true")
    jobs["narrow"] = adapters.job("dora", "two-narrow", half, NARROW, "run.save_dtype=bf16")
    jobs |= {f"saved-{name}": adapters.job(name, f"saved-{name}", half, *saves) for name in SAVED}
    adapters.alone("lora", "started", *saves)
    shutil.copytree(adapters.folder / "started", adapters.folder / "continued")
    jobs["continued"] = adapters.job("lora", "continued", half, resume=True)
    begun = f"method.adapter={adapters.folder / 'started' / 'model'}"
    jobs["begun"] = adapters.job("lora", "two-begun", half, begun)
    jobs["dropout"] = adapters.job("lora", "dropout", half, DROPOUT)
    jobs["dropout-begun"] = adapters.job("lora", "dropout-resumed", half, DROPOUT, *saves)
    jobs["dropout-resumed"] = adapters.job("lora", "dropout-resumed", half, DROPOUT, *saves[1:], resume=True)
    for kind, hows in COPIES.items():
        jobs |= {how: {kind: how, "folder": str(adapters.folder)} for how in hows}
    jobs["strangers"] = {"check": "strangers"}
    done = map(list, zip(*launch(2, adapters.folder, list(jobs.values())), strict=True))
    return dict(zip(jobs, done, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_are_one_rank_on_the_same_global_batch(
    adapters: RankRuns, two: dict[str, Any], name: str
) -> None:
    assert "error" not in two[name][0], two[name][0]
    one = adapters.alone(name, f"one-{name}")
    adapters.compare(f"two-{name}", f"one-{name}")
    assert two[name][0]["held_out_loss_after"] == pytest.approx(one["held_out_loss_after"], rel=1e-4)
    assert two[name][0]["held_out_loss_after"] < two[name][0]["held_out_loss_before"]
    files = [
        {file.name for file in (adapters.folder / f"{n}-{name}/model").iterdir()} for n in ("one", "two")
    ]
    assert files[0] == files[1]
    shares = [rank["peak_state_elements"] / one["peak_state_elements"] for rank in two[name]]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    # 3 rows of an adapter are divided as 2 and 1, and IA3's feed-forward vectors are one row.
    assert max(shares) < (0.9 if name == "ia3" else 0.65)


def test_packed_records_train_adapters_on_two_ranks_as_on_one(
    adapters: RankRuns, two: dict[str, Any]
) -> None:
    assert "error" not in two["packed"][0], two["packed"][0]
    adapters.alone("lora", "one-packed", "data.packing=true")
    adapters.compare("two-packed", "one-packed")


def test_adapters_in_float32_beside_weights_of_16_bits(adapters: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["narrow"][0], two["narrow"][0]
    adapters.alone("dora", "one-narrow", NARROW, "run.save_dtype=bf16")
    adapters.compare("two-narrow", "one-narrow", atol=2e-3, rtol=2e-2)  # products round at 2^-9


def test_a_run_continues_on_another_number_of_ranks(adapters: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["continued"][0], two["continued"][0]
    adapters.compare("continued", "one-lora")
    for name in SAVED:
        adapters.alone(name, f"saved-{name}", resume=True)
        adapters.compare(f"saved-{name}", f"one-{name}")


def test_dropout_is_resumed_bit_for_bit_though_each_rank_draws_other_numbers(
    adapters: RankRuns, two: dict[str, Any]
) -> None:
    assert two["dropout-resumed"][0].get("steps") == 4, two["dropout-resumed"][0]
    adapters.compare("dropout-resumed", "dropout", atol=0, rtol=0)


def test_adapters_begin_with_those_of_a_folder_on_every_rank(adapters: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["begun"][0], two["begun"][0]
    begun = f"method.adapter={adapters.folder / 'started' / 'model'}"
    adapters.alone("lora", "one-begun", begun)
    adapters.compare("two-begun", "one-begun")


@pytest.mark.parametrize("how", sum(COPIES.values(), ()))
def test_loops_with_copies_of_the_model_are_those_of_one_rank(
    adapters: RankRuns, two: dict[str, Any], how: str
) -> None:
    first, second = two[how]
    assert "error" not in first, first
    make = rank_copies.loop if how in COPIES["loop"] else rank_copies.trainer
    alone = make(how, str(adapters.folder))
    assert first["drawn"] == second["drawn"] == [list(blocks) for blocks in alone["drawn"]]
    assert len({tuple(blocks) for blocks in first["drawn"]}) > 2
    assert first["sums"] == second["sums"]
    if how.split()[0] in (
        "before",
        "after",
    ):  # by no_sync() once in a step, but for the first forward pass of all
        assert first["exchanges"] == rank_copies.STEPS + 1
    got, expected = (load_file(adapters.folder / f"{how}-{count}.safetensors") for count in (2, 1))
    begun = dict(tiny.llama(seed=0).named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(
            got[name], weight, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert not torch.equal(weight, begun[name]) or "layers" in name


def test_ranks_that_begin_with_other_weights_are_told_so(two: dict[str, Any]) -> None:
    for result in two["strangers"]:
        assert "the weights before the first step differ between ranks: rank 1 not as" in result["error"]
