"""Loops of a user's own on several ranks that each hold the whole model, and the same loops on one."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, default_data_collator

import tiny
from lisatune import LISA, Correction
from lisatune.distributed import ranks

PERIOD, PERIODS, MICRO_STEPS = 2, 3, 2
STEPS = PERIOD * PERIODS

OPTIONS: dict[str, dict[str, Any]] = {
    "coded": {"frozen_weights": "int8"},
    "corrected": {"correction": Correction(rank=3, lr=1e-2)},
    "both": {"frozen_weights": "int8", "correction": Correction(rank=3, lr=1e-2)},
}


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> tuple[LISA, list[Any]]:
    lisa = LISA(model, optimizer, active=2, period=PERIOD, ends="every:2", **options)
    drawn: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: drawn.append(lisa.active_blocks))
    return lisa, drawn


def rows(step: int) -> Iterator[torch.Tensor]:
    """This rank's row of each micro-step; on one rank both rows."""
    for micro in range(MICRO_STEPS):
        ids = tiny.tokens(MICRO_STEPS * step + micro)
        yield ids if ranks.count() == 1 else ids[ranks.rank()][None]


def loop(how: str, folder: str) -> dict[str, Any]:
    """Train with accumulation: `bare`, or wrapped `before` or `after` LISA is attached; then its options."""
    wraps, _, option = how.partition(" ")
    model = tiny.llama(seed=0)
    called: Any = model
    if wraps == "before" and ranks.count() > 1:
        called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    lisa, drawn = attach(called, optimizer, **OPTIONS.get(option, {}))
    exchange = mock.patch.object(ranks, "average_gradients", wraps=ranks.average_gradients)
    counted = exchange.start()
    if wraps == "after" and ranks.count() > 1:
        called = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(STEPS):
        for i, ids in enumerate(rows(step)):
            waits: AbstractContextManager[Any] = nullcontext()
            if i + 1 < MICRO_STEPS and called is not model:
                waits = called.no_sync()
            with waits:
                (called(input_ids=ids, labels=ids, use_cache=False).loss / MICRO_STEPS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            called(input_ids=ids, use_cache=False)
    lisa.check()
    lisa.detach()
    exchange.stop()
    return finish(model, drawn, folder, how) | {"exchanges": counted.call_count}


def trainer(how: str, folder: str) -> dict[str, Any]:
    """Train by HF Trainer, which wraps the model itself: `plain` or `checkpointing`; then LISA's options."""
    wraps, _, option = how.partition(" ")
    count = STEPS * MICRO_STEPS * 2
    ids = torch.cat([tiny.tokens(step) for step in range(count // 2)])
    labels = ids.masked_fill(ids % 3 == 0, -100)  # rows differ in their tokens with loss
    arguments = TrainingArguments(
        f"{folder}/trainer",
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2 // ranks.count(),
        gradient_accumulation_steps=MICRO_STEPS,
        activation_checkpointing=wraps == "checkpointing",
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        max_grad_norm=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = tiny.llama(seed=0)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    host = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    lisa, drawn = attach(host.model, host.create_optimizer(), **OPTIONS.get(option, {}))
    host.train()
    lisa.check()
    lisa.detach()
    return finish(model, drawn, folder, how)


def finish(model: nn.Module, drawn: list[Any], folder: str, how: str) -> dict[str, Any]:
    weights = tiny.weights(model)
    if ranks.is_rank0():
        save_file(weights, Path(folder) / f"{how}-{ranks.count()}.safetensors")
    return {"drawn": drawn, "sums": [float(weight.double().sum()) for weight in weights.values()]}


def strangers() -> None:
    """Train ranks that began with different weights in a block that is frozen."""
    model = tiny.llama(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    model.model.layers[3].mlp.up_proj.weight.data += ranks.rank()
    LISA(model, optimizer, sampler="ascending", frozen_weights="int8")
    tiny.backward(model, 0)
    optimizer.step()
