"""Made-up questions for benchmark tasks, in the simple columns, and a tiny model that reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_text import CHATML, byte_tokenizer

WORDS = ("ice", "sun", "oak", "fox", "tea", "sea")


def write_model(folder: Path, *, seed: int = 0, positions: int = 1024) -> Path:
    """Save a Llama of 2 blocks and hidden size 16 whose tokens are bytes."""
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for weight in model.parameters():
            weight.data.mul_(3)  # so that answers differ
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arc(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Is {i} {WORDS[i % 6]}?",
            "choices": [f"{WORDS[(i + j) % 6]}s" for j in range(4)],
            "answer": i % 4,
        }
        for i in range(start, start + count)
    ]


def winogrande(count: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence": f"The {WORDS[i % 6]} met {i} so _ went.",
            "option1": WORDS[i % 6],
            "option2": WORDS[(i + 1) % 6],
            "answer": str(1 + i % 2),
        }
        for i in range(count)
    ]


def mmlu(count: int, subject: str) -> list[dict[str, Any]]:
    return [row | {"subject": subject} for row in arc(count, len(subject))]


def write_data(folder: Path) -> Path:
    """Write arc_easy (8 questions), winogrande (7) and two subjects of mmlu (5 and 3, with examples)."""
    write_rows(folder / "arc_easy" / "test_part.jsonl", arc(8))
    write_rows(folder / "arc_easy" / "train.jsonl", arc(6, 20))
    write_rows(folder / "winogrande" / "dev_part.jsonl", winogrande(7))
    subjects = {"anatomy": 5, "world religions": 3}
    test = [row for subject, count in subjects.items() for row in mmlu(count, subject)]
    write_rows(folder / "mmlu" / "test.jsonl", test)
    write_rows(folder / "mmlu" / "dev.jsonl", [row for subject in subjects for row in mmlu(5, subject)])
    return folder
