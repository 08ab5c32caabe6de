"""The scripts in examples/ run as they stand, on a tiny model folder and without a hub."""

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from integration.tiny import tiny_llama
from lisatune import LISA

EXAMPLES = Path(__file__).parents[2] / "examples"

# SFTConfig sets checkpointing by default, under the name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches go to the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, words: tuple[str, ...], *, columns: tuple[str, ...], rows: int) -> Path:
    rng = random.Random(0)
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(rows):
            row = {column: " ".join(rng.choices(words, k=rng.randint(3, 12))) for column in columns}
            file.write(json.dumps(row) + "\n")
    return folder


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> dict[str, Any]:
    """Run a script as `python examples/NAME --option value …` and return what it defined."""
    words = [f"--{key}={value}" for key, value in options.items()]
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("plain_loop.py", ("text",)),
        ("accelerate_loop.py", ("text",)),
        ("hf_trainer.py", ("text",)),
        ("trl_sft.py", ("prompt", "completion")),
    ],
)
def test_example_trains_every_block_and_saves_the_model(
    name: str,
    columns: tuple[str, ...],
    words: tuple[str, ...],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, batch = 31, 8  # three full periods and a step: all six blocks have trained
    data = write_rows(tmp_path / "data", words, columns=columns, rows=steps * batch)
    output = tmp_path / "tuned"
    defined = run_example(name, monkeypatch, model=model_folder, data=data, split="train", output=output)
    lisa: LISA = defined["lisa"]

    assert lisa.steps_done == steps
    assert lisa.periods_proven == 3
    assert min(lisa.visits) == 1
    before = tiny_llama().state_dict()
    after = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert [name for name, weight in after.items() if torch.equal(weight, before[name])] == []
    assert AutoTokenizer.from_pretrained(output).eos_token == "<end>"


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() >= {"plain_loop.py", "accelerate_loop.py", "hf_trainer.py", "trl_sft.py"}
    assert max(lengths.values()) <= 60, lengths
