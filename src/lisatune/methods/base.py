"""What a method of fine-tuning answers: how to prepare the model, which optimizer, what to attach to it."""

from typing import Any, ClassVar, Self

import torch
from torch import nn

from lisatune.lisa.schedule import BlockSchedule
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods.optimizers import build_optimizer
from lisatune.methods.step import TrainingStep
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW
from lisatune.recipe import DataConfig, OptimizerConfig, RunConfig

__all__ = ["Method"]


class Method:
    """A way to fine-tune. Subclasses are frozen, keyword-only dataclasses whose fields are recipe keys.

    Order of calls: `prepare`, then `build_optimizer` over the prepared model, `attach`, `build_step`.
    """

    name: str

    shards: ClassVar[bool] = False
    """Whether it trains a model that is divided among ranks."""

    has_ends: ClassVar[bool] = True
    """Whether embedding, head and final norm may train, and so have a learning rate of their own."""

    lr_scale: ClassVar[float] = 1.0
    """Learning rate that suits it, as a multiple of LoRA's: few trained numbers take larger steps."""

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse settings of other sections that can't work with it. Default: all can.

        Raises:
            ValueError: one can't; the message names its key and what to do.
        """

    def check_device(self, device: torch.device) -> None:
        """Refuse a device that it can't run on, before anything loads. Default: any will do.

        Raises:
            ImportError, ValueError: it can't; the message says what to do.
        """

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the model before the optimizer is built (adapters would go in here). Default: as it is."""
        return model

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the optimizer, with every parameter that will ever train in its param groups.

        Default: AdamW over ends and blocks, one group per layer, while everything still requires grad; see
        `lisatune.methods.optimizers` for which one.
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
        """Attach what freezes and thaws blocks during training. Default: nothing does.

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
        loss: CausalLMLoss,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        max_grad_norm: float | None,
    ) -> TrainingStep:
        """Build what makes an optimizer step of batches. Default: forward, backward, clip, update.

        A method whose step is another one (without backward, say, or on pairs of sequences) returns its own
        subclass of `TrainingStep`; `train`, `compare` and `plan` run whatever it is.

        Args:
            model: the prepared model, everything attached.
            loss: sums next-token losses of that model.
            optimizer: from `build_optimizer`.
            device: where batches go.
            autocast: dtype of matrix products; None computes in the weights' dtype.
            max_grad_norm: largest global norm of the gradients; None leaves them as they are.
        """
        return TrainingStep(
            model=model,
            loss=loss,
            optimizer=optimizer,
            device=device,
            autocast=autocast,
            max_grad_norm=max_grad_norm,
            in_backward=optimizer.in_backward if isinstance(optimizer, AdamW) else None,
        )

    def block_lr_factors(self, num_blocks: int) -> tuple[float, ...]:
        """What `optimizer.lr` is multiplied by for each block."""
        return (1.0,) * num_blocks

    def without_proof(self) -> Self:
        """The method as it costs memory, without what reads weights: for a model that has shapes only."""
        return self

    def cheaper_ends(self) -> tuple[dict[str, Any], ...]:
        """Settings that make the ends take less memory, the one that changes training least first."""
        return ()

    def fewer_weights(self) -> tuple[dict[str, Any], ...]:
        """Settings that train fewer weights at once, the closest to this first."""
        return ()

    def more_weights(self, num_blocks: int) -> tuple[dict[str, Any], ...]:
        """Settings that train more weights at once, the closest to this first."""
        return ()
