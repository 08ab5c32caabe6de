"""From a recipe and a loaded model to a model that is ready to train: for `train`, `compare` and `plan`.

What several ranks cannot do yet is refused here, by `check_recipe`.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.distributed.shards import count_copies
from lisatune.lisa.correction import find_correction
from lisatune.lisa.schedule import BlockSchedule
from lisatune.losses.base import Loss
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.losses.dpo import DPOLoss
from lisatune.losses.reward import RewardLoss
from lisatune.methods.step import TrainingStep
from lisatune.models.load import load_tokenizer, stored_dtype
from lisatune.nn.blocks import BlockForward, enable_activation_checkpointing
from lisatune.nn.bottleneck import has_adapters
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.optim.meter import StateMeter
from lisatune.recipe import Recipe

__all__ = [
    "Built",
    "Prepared",
    "attach",
    "attach_method",
    "build",
    "check_recipe",
    "make_loss",
    "prepare",
    "weight_dtype",
]


@dataclass(frozen=True)
class Built:
    """A model that is ready to train, without data."""

    model: nn.Module
    layers: LayerMap
    step: TrainingStep
    schedule: BlockSchedule
    """Which blocks train when."""

    state: StateMeter
    blocks: BlockForward | None
    """How the blocks run, if they are checkpointed or compiled."""

    def block_sizes(self) -> list[int]:
        """Count the parameters of each block, or of each unit that the schedule draws."""
        return [sum(p.numel() for p in block.values()) for block in self.drawn.block_parameters(self.model)]

    @property
    def drawn(self) -> LayerMap:
        """What the schedule draws from: the blocks, or units of them."""
        return self.schedule.layers or self.layers


@dataclass(frozen=True)
class Prepared:
    """A model as its method trains it, without an optimizer."""

    model: nn.Module
    layers: LayerMap
    blocks: BlockForward | None


def build(recipe: Recipe, model: nn.Module, loss: Loss, *, steps: int, device: torch.device) -> Built:
    """Place a loaded model, prepare it, and attach everything that trains it.

    Args:
        recipe: the recipe.
        model: the loaded model, on `device`.
        loss, steps, device: as for `attach`.
    """
    recipe.method.place(model, device)
    return attach(recipe, prepare(recipe, model), loss, steps=steps, device=device)


def make_loss(recipe: Recipe, model: nn.Module) -> Loss:
    """Make the recipe's loss for a model on its device; each class says its warnings and errors."""
    if recipe.loss.has_reference:
        return DPOLoss(model, beta=recipe.loss.beta)
    if recipe.loss.has_score:
        return RewardLoss(model, center=recipe.loss.center)
    return CausalLMLoss(model)


def prepare(recipe: Recipe, model: nn.Module) -> Prepared:
    """Let the method change a model, and set how its blocks run. Its weights may be on the meta device."""
    blocks = _set_block_forward(recipe, model)
    model.train()
    model = recipe.method.prepare(model)
    return Prepared(model, find_layers(model), blocks)


def attach(
    recipe: Recipe, prepared: Prepared, loss: Loss | None, *, steps: int, device: torch.device
) -> Built:
    """Build the optimizer, the schedule and the step of a prepared model.

    Args:
        recipe: the recipe.
        prepared: the prepared model, with its weights on `device`, divided if there are several ranks.
        loss: the model's loss; None on several ranks, because a divided model gets its own.
        steps: optimizer steps of the whole run.
        device: where the model trains.
    """
    model, layers = prepared.model, prepared.layers
    optimizer, state, schedule = attach_method(recipe, model, layers, steps)
    if loss is None:
        loss = make_loss(recipe, model)
    else:
        loss.follow(model)
    step = recipe.method.build_step(
        model,
        loss,
        optimizer,
        device=device,
        autocast=torch.bfloat16 if recipe.run.precision == "bf16-mixed" else None,
        max_grad_norm=recipe.optimizer.max_grad_norm,
    )
    return Built(model, layers, step, schedule, state, prepared.blocks)


def attach_method(
    recipe: Recipe, model: nn.Module, layers: LayerMap, steps: int
) -> tuple[Optimizer, StateMeter, BlockSchedule]:
    """Build the optimizer of a prepared model and attach the method's schedule to it.

    Where ends are frozen, the rows of new tokens train nevertheless, and nothing else of the ends.
    """
    method = recipe.method
    if recipe.model.new_tokens and method.freezes_ends:
        tokenizer = load_tokenizer(**recipe.model.tokenizer)
        ids = tokenizer.convert_tokens_to_ids(list(recipe.model.new_tokens))
        method = replace(method, ends=f"rows:{min(ids)}-{max(ids)}")
    optimizer = method.build_optimizer(model, layers, recipe.optimizer)
    state = StateMeter(optimizer)  # before the schedule, whose hook may release state
    schedule = method.attach(model, optimizer, layers, total_steps=steps)
    correction = find_correction(model)
    if correction is not None and correction.optimizer is not None:
        state.beside = (correction.optimizer,)
    return optimizer, state, schedule


def weight_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype in which the recipe's weights are loaded."""
    return torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32


def save_dtype(recipe: Recipe, model: nn.Module) -> torch.dtype | None:
    """Return the dtype in which the result is written; None: the one that the weights were trained in.

    Args:
        recipe: the recipe.
        model: the prepared model.

    Errors are those of `lisatune.models.load.load_config`.
    """
    asked = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    if recipe.run.save_dtype is not None or has_adapters(model):  # adapters are small
        return asked[recipe.run.save_dtype]
    own = stored_dtype(**recipe.model.location)
    is_narrower = own in asked.values() and own is not None and own.itemsize < weight_dtype(recipe).itemsize
    return own if is_narrower else None


def check_recipe(recipe: Recipe) -> None:
    """Refuse what does not work on several ranks.

    Raises:
        ValueError: names the recipe's key and what to do.
    """
    if not recipe.method.shards:
        raise ValueError(
            f"method.name: {recipe.method.name} runs in one process only, because its steps, schedule or "
            "vectors know nothing of divided weights; use lisa, full or lora"
        )
    count_copies(recipe.run.sharding, recipe.run.copies)


def _set_block_forward(recipe: Recipe, model: nn.Module) -> BlockForward | None:
    asked, compiles = recipe.run.activation_checkpointing, recipe.run.compile is True
    if asked is True and not compiles:
        enable_activation_checkpointing(model)
        return None
    if not (asked or compiles):
        return None
    return BlockForward(
        model,
        find_layers(model),
        checkpointing="frozen" if asked == "frozen" else "all" if asked else None,
        backend="inductor" if compiles else None,
    )
