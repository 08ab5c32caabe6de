"""What tests of the losses of pairs share: pairs, their runs, and the comparison with TRL's gradients."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lisatune.data.examples import Examples
from lisatune.data.pairs import PairReader, divide_pairs
from lisatune.data.records import Record, Records
from lisatune.data.rows import Documents
from lisatune.data.tokens import encode
from lisatune.recipe import Recipe
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState

LISA = "{active: 2, period: 3}"
"""The section `method` of a recipe that `load_pairs` changes."""

TRL_OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "disable_tqdm": True,
}
"""Options with which TRL's trainers make one batch of the pairs of `make_pairs`, in their order."""


def make_pairs(*, is_chat: bool) -> list[dict[str, Any]]:
    """Make four records with a prompt, as text or as messages."""
    rows = [
        {"prompt": f"Count to {i}.", "chosen": "1 " * (i + 1), "rejected": "no" * (4 - i)} for i in range(4)
    ]
    if not is_chat:
        return rows
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]


def read_pairs(source: str, **how: Any) -> Records:
    """Read pairs of answers into memory."""
    reader = PairReader(source, **how)
    rows = [record for _, record in reader]
    reader.warn()
    return Records(rows, reader.kind, reader.skipped, source, num_media=reader.num_media)


def tokenize_pairs(rows: list[Record], tokenizer: Any, *, max_length: int, long: Any = "cut") -> Examples:
    """Turn pairs into rows, two each."""
    reader = PairReader("pairs made here")
    texts = [text for row in rows for text in reader.texts(row)]
    documents = Documents.gather(encode(texts, tokenizer, source=reader.source, texts_per_record=2))
    how: dict[str, Any] = {"max_length": max_length, "long": long, "source": reader.source}
    return divide_pairs(documents, np.arange(len(rows)), **how)


def load_pairs(recipe: Path, output: str = "run", *overrides: str, method: str = "lisa") -> Recipe:
    """Load a recipe with another output beside it, and from then on another method."""
    if method != "lisa":
        recipe.write_text(recipe.read_text().replace(LISA, f"{{name: {method}}}"))
    return load_recipe(recipe, [f"run.output={recipe.parent / output}", *overrides])


def read_metrics(recipe: Path, output: str = "run") -> list[dict[str, Any]]:
    """Read what a run noted, without times."""
    lines = (recipe.parent / output / "metrics.jsonl").read_text().splitlines()
    timed = {"tokens_per_second", "seconds", "resident_bytes"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def assert_resume_is_bit_equal(recipe: Path, method: str) -> None:
    """Train straight, and with a stop in the middle."""

    def press(state: RunState) -> None:
        if state.step == 4:
            signal.raise_signal(signal.SIGINT)

    options = ("run.steps=7", "run.eval_every=2", "run.accumulation=2")
    train(load_pairs(recipe, "straight", *options, method=method))
    with pytest.raises(KeyboardInterrupt):
        train(load_pairs(recipe, "resumed", *options), after_step=press)
    train(load_pairs(recipe, "resumed", *options), resume=True)
    assert read_metrics(recipe, "straight") == read_metrics(recipe, "resumed")
    one, two = (
        next((recipe.parent / name / "model").glob("*.safetensors")) for name in ("straight", "resumed")
    )
    assert one.read_bytes() == two.read_bytes()


def assert_gradients_are_theirs(ours: nn.Module, theirs: nn.Module) -> None:
    """Compare the gradients of two models, which must not all be next to 0."""
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in gradients.values() if grad is not None)
    assert largest > 1e-3
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6 * largest)
