"""LISA attached by its hooks alone in TRL's DPO-, KTO- and RewardTrainer trains what a plain loop trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, get_scheduler
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

import tiny
from lisatune import LISA, find_layers

STEPS, ACCUMULATION, BATCH, PERIOD = 8, 2, 2, 3
LR = 1e-2

pytestmark = [
    # TRL asks for checkpointing under the name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.parametrize("kind", ["dpo", "kto", "reward"]),
]

Make = Callable[..., Any]


def reward_model(seed: int) -> nn.Module:
    """A tiny llama with a score in place of its head."""
    config = tiny.llama().config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config)


def judge(pairs: Dataset) -> Dataset:
    """Make single answers that are good or bad, in turn."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
            for row, which in zip(pairs, ["chosen", "rejected"] * (len(pairs) // 2), strict=True)
        ]
    )


@pytest.fixture
def make(kind: str, tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...], tmp_path: Path) -> Make:
    """Make a trainer with a model of its own; both trainers see the same pairs."""

    def pick(first: int, count: int) -> str:
        return " ".join(words[(first + i) % len(words)] for i in range(count))

    rows = Dataset.from_list(
        [
            {"prompt": pick(i, 3), "chosen": " " + pick(5 * i, 2 + i % 3), "rejected": " " + pick(7 * i, 3)}
            for i in range(STEPS * ACCUMULATION * BATCH)
        ]
    )

    def build(*, seed: int = 0, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / f"seed-{seed}"),
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_steps": STEPS,
            "learning_rate": LR,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "disable_tqdm": True,
            "save_strategy": "no",
        } | options
        if kind == "dpo":
            return DPOTrainer(
                tiny.llama(seed=seed),
                ref_model=tiny.llama(),
                args=DPOConfig(**settings),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        if kind == "kto":
            return KTOTrainer(
                tiny.llama(seed=seed),
                ref_model=tiny.llama(),
                args=KTOConfig(**settings),
                train_dataset=judge(rows),
                processing_class=tokenizer,
            )
        return RewardTrainer(
            reward_model(seed), args=RewardConfig(**settings), train_dataset=rows, processing_class=tokenizer
        )

    return build


def train(trainer: Any, resume: Path | None = None) -> LISA:
    lisa = LISA(trainer.model, trainer.create_optimizer(), active=2, period=PERIOD, seed=3)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    lisa.check()
    return lisa


def plain_loop(trainer: Any) -> tuple[nn.Module, LISA]:
    """A loop of our own over the trainer's batches and its loss."""
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("linear", optimizer, 0, STEPS)
    lisa = LISA(model, optimizer, active=2, period=PERIOD, seed=3)
    for index, batch in enumerate(trainer.get_train_dataloader(), 1):
        (trainer.compute_loss(model, batch) / ACCUMULATION).backward()
        if index % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, lisa


def test_the_trainer_equals_a_plain_loop_over_its_loss(make: Make) -> None:
    twin, their_lisa = plain_loop(make())
    trainer = make()
    lisa = train(trainer)
    tiny.assert_same_weights(trainer.model, twin)
    assert lisa.visits == their_lisa.visits
    assert (lisa.steps_done, lisa.periods_proven) == (STEPS, STEPS // PERIOD)
    layers = find_layers(trainer.model)
    blocks = {name for block in layers.block_parameters(trainer.model) for name in block}
    assert tiny.moved(tiny.weights(make().model), trainer.model) >= blocks


def test_a_resumed_trainer_is_bit_equal(make: Make, tmp_path: Path) -> None:
    straight = make(save_strategy="steps", save_steps=4)
    train(straight)
    resumed = make(seed=1)
    train(resumed, resume=tmp_path / "seed-0" / "checkpoint-4")
    tiny.assert_same_weights(resumed.model, straight.model)
