"""A method of fine-tuning: how it prepares the model and builds the optimizer, the schedule and the step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from lisatune.lisa.schedule import BlockSchedule
from lisatune.losses.base import Loss
from lisatune.methods.optimizers import build_optimizer
from lisatune.methods.sampled_labels import SophiaStep
from lisatune.methods.step import TrainingStep
from lisatune.nn.coded import Masters
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW
from lisatune.optim.sophia import SophiaG
from lisatune.recipe import DataConfig, LossConfig, OptimizerConfig, RunConfig

__all__ = ["Alternatives", "Keys", "Method", "halve"]

Keys = dict[str, Any]
"""Keys of a method that change together, and their values."""


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """Settings of a method that take less memory, or train more. The closest to its own come first."""

    cheaper_ends: tuple[Keys, ...] = ()
    """The ends take less memory."""

    coarser_weights: tuple[Keys, ...] = ()
    """Frozen weights take fewer bits on the device."""

    fewer_weights: tuple[Keys, ...] = ()
    """Fewer weights train at once, or they have fewer moments."""

    more_weights: tuple[Keys, ...] = ()
    """More weights train at once."""


class Method:
    """A way to fine-tune. Subclasses are frozen, keyword-only dataclasses whose fields are recipe keys.

    Order of calls: `place`, `prepare`, `build_optimizer` over the prepared model, `attach`, `build_step`.
    """

    name: ClassVar[str]
    """Its name in recipes, and in `lisatune.methods.METHODS`."""

    shards: ClassVar[bool] = False
    """Whether it trains a model that is divided among ranks."""

    has_ends: ClassVar[bool] = True
    """Whether embedding, head and final norm may train, and so have a learning rate of their own."""

    num_moments: ClassVar[int] = 2
    """Numbers that AdamW keeps for each trained number; 0 if the method keeps no moments."""

    lr_scale: ClassVar[float] = 1.0
    """Learning rate that suits the method, as a multiple of LoRA's: few trained numbers take larger steps."""

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse settings of other sections that cannot work with this method. Default: all work.

        Raises:
            ValueError: a setting cannot work; the message names its key and what to do.
        """

    def check_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Refuse an optimizer that cannot work with this method. Default: all work.

        Raises:
            ValueError: a setting cannot work; the message names its key and what to do.
        """

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse a loss that cannot work with this method.

        Default: a method that brings a step of its own takes the next-token loss only, because that is the
        loss its step was made for.

        Raises:
            ValueError: the loss cannot work; the message says why and what to do.
        """
        if loss.name != "causal_lm" and type(self).build_step is not Method.build_step:
            raise ValueError(
                f"loss.name={loss.name} cannot work with method {self.name}, which brings a training step of "
                "its own; use lisa, full or lora, or loss.name=causal_lm"
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a device that the method cannot run on, before anything loads. Default: all work.

        Raises:
            ImportError, ValueError: the device does not work; the message says what to do.
        """

    @property
    def masters(self) -> Literal["auto", "ram", "disk"] | None:
        """Where exact weights of frozen blocks are kept; None if the device holds all weights as they are."""
        return None

    @property
    def freezes_ends(self) -> bool:
        """Whether it has a key `ends`, which says that no end trains."""
        return False

    def place(self, model: nn.Module, device: torch.device, masters: Masters | None = None) -> None:
        """Move a loaded model onto the device, in place. Default: all of its weights, as they are.

        Args:
            model: on the CPU.
            device: where it trains.
            masters: where exact weights of frozen blocks are kept. Default: host memory.
        """
        if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
            model.to(device)  # which fake tensors, always in place, do not support

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the model before the optimizer is built: add adapters, say. Default: no change."""
        return model

    def take_weights(self, model: nn.Module) -> None:
        """Compute what `prepare` takes from the weights' values. Default: nothing.

        Called on several ranks only, where the weights are read after `prepare`. Every rank must call it.

        Args:
            model: the prepared model, divided among the ranks, with its weights.
        """

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the optimizer, with every parameter that will ever train in its param groups.

        Default: the recipe's optimizer (`lisatune.methods.optimizers`) over ends and blocks, one group per
        layer.

        Args:
            model: the prepared model; everything that will ever train requires grad.
            layers: its blocks and ends.
            config: the recipe's section.
        """
        return build_optimizer(model, layers, config)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: LayerMap,
        *,
        total_steps: int,
    ) -> BlockSchedule:
        """Attach the schedule that freezes and thaws blocks during training. Default: no block freezes.

        Args:
            model: the prepared model.
            optimizer: from `build_optimizer`; a schedule hooks into it.
            layers: the model's blocks and ends.
            total_steps: optimizer steps of the whole run.
        """
        return BlockSchedule()

    def build_step(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        max_grad_norm: float | None,
    ) -> TrainingStep:
        """Build the training step. Default: forward, backward, clip, update.

        A method with another step (without backward, say, or on pairs of sequences) returns its own subclass
        of `TrainingStep`; `train`, `compare` and `plan` run that.

        Args:
            model: the prepared model, everything attached.
            loss: sums the recipe's loss of that model.
            optimizer: from `build_optimizer`.
            device: where batches are moved.
            autocast: dtype of matrix products; None computes in the weights' dtype.
            max_grad_norm: largest global norm of the gradients; None leaves them as they are.
        """
        kind = SophiaStep if isinstance(optimizer, SophiaG) else TrainingStep
        return kind(
            model=model,
            loss=loss,
            optimizer=optimizer,
            device=device,
            autocast=autocast,
            max_grad_norm=max_grad_norm,
            in_backward=optimizer.in_backward if isinstance(optimizer, AdamW) else None,
        )

    def without_proof(self) -> Self:
        """Return the method without reading weights, for a model that has only shapes. Default: no change."""
        return self

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Return settings that a search for what fits a device may try. Default: none.

        Args:
            num_blocks: blocks of the model.
        """
        return Alternatives()


def halve(number: int, *, least: int = 1) -> Iterator[int]:
    """Yield half of a number, half of that, and so on, rounded down, down to `least` >= 1."""
    while (number := number // 2) >= least:
        yield number
