"""A tiny model folder, tiny rows and a recipe for both: a whole run in a second."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_text import CHATML, byte_tokenizer

BLOCKS = 4

DEVICE = os.environ.get("LISATUNE_TEST_DEVICE", "cpu")
"""Where runs train."""


def write_model(folder: Path, *, is_tied: bool = True) -> Path:
    """Save a Llama of 4 blocks and hidden size 16 whose tokens are bytes; every call writes equal weights."""
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=is_tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: int = 12, *, bad: tuple[int, ...] = ()) -> Path:
    """Write alpaca rows as .jsonl; the rows numbered in `bad` lack their output."""
    lines = []
    for row in range(rows):
        record: dict[str, Any] = {"instruction": f"Count to {row}.", "input": "", "output": "1 " * (row + 1)}
        if row in bad:
            del record["output"]
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


def write_pairs(path: Path, pairs: int = 12) -> Path:
    """Write pairs of answers as .jsonl, for DPO."""
    rows = [
        {"prompt": f"Count to {row}.", "chosen": "1 " * (row % 5 + 1), "rejected": "no"}
        for row in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, model: Path, train: Path, more: str = "", *, plans: bool = False) -> Path:
    """Write recipe.yaml; its run folder is `folder`/run.

    `plans`: the run plans its memory first, as by default. That takes three times as long as the run itself.
    """
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {model}}}\n"
        f"data: {{train: {train}, max_length: 96, validation_share: 0.25}}\n"
        f"optimizer: {{lr: 1e-3}}\n"
        f"run: {{output: {folder / 'run'}, steps: 4, batch_size: 2, precision: fp32, device: {DEVICE},"
        f" samples: 1, sample_tokens: 4, check_memory: {str(plans).lower()}}}\n"
        + (more or "method: {active: 2, period: 2}\n")
    )
    return path
