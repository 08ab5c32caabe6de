"""Reward models on two ranks over gloo: adapters, resume, and a reward model that is trained on.

`test_ranks.py` compares the other runs with those of one rank.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny_run
from rank_launcher import launch
from rank_runs import RankRuns

PLAIN = [
    "loss.name=reward",
    "optimizer.eps=1e-3",
    "optimizer.lr=1e-2",
    "optimizer.schedule=constant",
    "run.check_memory=false",
    "run.samples=0",
]
METHODS = {"lisa": "{name: lisa, active: 2, period: 2}", "lora": "{name: lora, rank: 3}"}
HALF = "run.batch_size=1"
LONGER = "run.steps=6"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RankRuns:
    folder = tmp_path_factory.mktemp("rewards")
    model = tiny_run.write_model(folder / "model", is_tied=False)
    return RankRuns(folder, model, tiny_run.write_pairs(folder / "pairs.jsonl", 13), METHODS, PLAIN)


@pytest.fixture(scope="module")
def two(runs: RankRuns) -> dict[str, list[Any]]:
    """Results of each of two ranks by name."""
    runs.alone("lora", "one-lora")
    runs.alone("lisa", "one-lisa")
    begun = f"method.adapter={runs.folder / 'one-lora' / 'model'}"
    trained = f"model.name={runs.folder / 'one-lisa' / 'model'}"
    jobs = {
        "lora": runs.job("lora", "two-lora", HALF),
        "begun": runs.job("lora", "two-begun", HALF, begun),
        "trained": runs.job("lisa", "two-trained", HALF, trained),
    }
    for name in METHODS:
        jobs[f"{name}-straight"] = runs.job(name, f"straight-{name}", HALF, LONGER)
        jobs[f"{name}-saved"] = runs.job(name, f"saved-{name}", HALF, "run.steps=3", "run.save_every=3")
        jobs[f"{name}-resumed"] = runs.job(name, f"saved-{name}", HALF, LONGER, resume=True)
    done = map(list, zip(*launch(2, runs.folder, list(jobs.values())), strict=True))
    return dict(zip(jobs, done, strict=True))


def test_adapters_and_a_score_are_those_of_one_rank(runs: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["lora"][0], two["lora"][0]
    runs.compare("two-lora", "one-lora")
    assert any("score" in name for name in runs.written("two-lora"))
    config, other = (
        json.loads((runs.folder / f"{count}-lora/model/adapter_config.json").read_text())
        for count in ("one", "two")
    )
    assert config == other


def test_adapters_begin_with_the_score_of_a_folder(runs: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["begun"][0], two["begun"][0]
    runs.alone("lora", "one-begun", f"method.adapter={runs.folder / 'one-lora' / 'model'}")
    runs.compare("two-begun", "one-begun")


def test_a_reward_model_is_trained_on(runs: RankRuns, two: dict[str, Any]) -> None:
    assert "error" not in two["trained"][0], two["trained"][0]
    runs.alone("lisa", "one-trained", f"model.name={runs.folder / 'one-lisa' / 'model'}")
    runs.compare("two-trained", "one-trained")
    written = AutoModelForSequenceClassification.from_pretrained(runs.folder / "two-trained" / "model")
    assert (written.config.num_labels, written.config.pad_token_id is None) == (1, False)


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_equal_on_as_many_ranks_and_close_on_one(
    runs: RankRuns, two: dict[str, Any], name: str
) -> None:
    assert two[f"{name}-resumed"][0].get("steps") == 6, two[f"{name}-resumed"][0]
    expected, got = runs.written(f"straight-{name}"), runs.written(f"saved-{name}")
    for key, weight in expected.items():
        assert torch.equal(got[key], weight), key
    shutil.copytree(runs.folder / f"saved-{name}", runs.folder / f"alone-{name}")
    runs.alone(name, f"alone-{name}", "run.steps=8", resume=True)
    runs.alone(name, f"long-{name}", "run.steps=8")
    runs.compare(f"alone-{name}", f"long-{name}")
