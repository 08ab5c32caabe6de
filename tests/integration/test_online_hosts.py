"""LISA attached by its hooks alone in TRL's GRPO- and RLOOTrainer, which train on answers that they draw."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import tiny
from lisatune import LISA
from lisatune.lisa.samplers import make_sampler

STEPS, PERIOD, ANSWERS = 7, 3, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.parametrize("kind", ["grpo", "rloo"]),
]

Make = Callable[..., Any]


def reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """Count a word."""
    return [float(each.count("frozen")) for each in completions]


@pytest.fixture
def make(kind: str, tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...], tmp_path: Path) -> Make:
    """Make a trainer with a model of its own."""
    rows = Dataset.from_list([{"prompt": f"{words[i % 12]} {words[i * 5 % 12]}"} for i in range(STEPS)])

    def build(*, seed: int = 0, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / f"seed-{seed}"),
            "per_device_train_batch_size": ANSWERS,
            "num_generations": ANSWERS,
            "max_completion_length": 6,
            "beta": 0.0,  # no reference model, which TRL would open by name
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "disable_tqdm": True,
            "report_to": [],
            "save_strategy": "no",
        } | options
        config, trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
        return trainer(
            tiny.llama(seed=seed),
            reward_funcs=reward,
            args=config(**settings),
            train_dataset=rows,
            processing_class=tokenizer,
        )

    return build


class Toggle(TrainerCallback):
    """Draw blocks and set `requires_grad`: LISA as callbacks have it, whose moments stay."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks, self.sampler = model.get_submodule("model.layers"), make_sampler("uniform", 2, 6)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % PERIOD == 0:
            drawn = self.sampler.draw(state.global_step // PERIOD, seed=3)
            for index, block in enumerate(self.blocks.children()):
                block.requires_grad_(index in drawn)


def test_the_trainer_equals_one_that_toggles_requires_grad(make: Make) -> None:
    toggled = make()
    toggled.add_callback(Toggle(toggled.model))
    toggled.train()

    trainer = make()
    options: dict[str, Any] = {"sampler": "uniform", "seed": 3, "state": "keep", "lr_scaling": "none"}
    lisa = LISA(trainer.model, trainer.create_optimizer(), active=2, period=PERIOD, verify="full", **options)
    trainer.train()
    lisa.check()

    tiny.assert_same_weights(trainer.model, toggled.model)
    assert (lisa.steps_done, lisa.periods_proven) == (STEPS, STEPS // PERIOD)
    assert tiny.moved(tiny.weights(make().model), trainer.model)


def test_a_resumed_trainer_is_bit_equal(make: Make, tmp_path: Path) -> None:
    straight = make(save_strategy="steps", save_steps=4)
    LISA(straight.model, straight.create_optimizer(), active=2, period=PERIOD)
    straight.train()
    resumed = make(seed=1)
    lisa = LISA(resumed.model, resumed.create_optimizer(), active=2, period=PERIOD)
    resumed.train(resume_from_checkpoint=str(tmp_path / "seed-0" / "checkpoint-4"))
    assert lisa.steps_done == STEPS
    tiny.assert_same_weights(resumed.model, straight.model)
