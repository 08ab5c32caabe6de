"""Policies of the ends in HF Trainer: the weights of a plain loop bit for bit, and resume in a period."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import tiny
from lisatune import LISA, AdamW, find_layers, param_groups

STEPS, BATCH, LENGTH, PERIOD = 10, 2, 16, 3
POLICIES = ["head", "every:2", "head+every:2", "frozen", "every:2+8bit", "factored+cpu"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tiny.VOCABULARY, (STEPS * BATCH, LENGTH), generator=rng)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def build(ends: str, *, seed: int = 0) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, LISA]:
    model = tiny.llama(tied=True, hidden=64, seed=seed)
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=ends), lr=1e-2, weight_decay=0.0)
    return model, optimizer, LISA(model, optimizer, period=PERIOD, ends=ends, verify="full", layers=layers)


def plain_loop(ends: str, data: Dataset) -> tuple[nn.Module, LISA]:
    model, optimizer, lisa = build(ends)
    model.train()
    for first in range(0, len(data), BATCH):
        batch = default_data_collator([data[i] for i in range(first, first + BATCH)])
        num_tokens = (batch["labels"][:, 1:] != -100).sum()
        model(**batch, num_items_in_batch=num_tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, lisa


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, folder: Path, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=default_data_collator,
        optimizers=(optimizer, constant),
    )


@pytest.mark.parametrize("ends", POLICIES)
def test_trainer_equals_plain_loop(data: Dataset, tmp_path: Path, ends: str) -> None:
    expected, its_lisa = plain_loop(ends, data)
    model, optimizer, lisa = build(ends)
    trainer(model, optimizer, data, tmp_path).train()
    lisa.check()
    tiny.assert_same_weights(model, expected)
    assert lisa.periods_proven == its_lisa.periods_proven == STEPS // PERIOD


@pytest.mark.parametrize("ends", ["every:2", "head+every:2+8bit"])
@pytest.mark.parametrize("step", [2, 4], ids=["ends train", "ends rest"])
def test_trainer_resumes_bit_equal(data: Dataset, tmp_path: Path, ends: str, step: int) -> None:
    model, optimizer, _ = build(ends)
    trainer(model, optimizer, data, tmp_path, save_strategy="steps", save_steps=step).train()
    resumed, other, lisa = build(ends, seed=1)
    trainer(resumed, other, data, tmp_path / "resumed").train(
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")
    )
    tiny.assert_same_weights(resumed, model)
    assert lisa.steps_done == STEPS
