"""Full fine-tuning: AdamW on every parameter outside vision towers."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lisatune.layers import LayerMap
from lisatune.methods.base import Method
from lisatune.optim import build_adamw

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """AdamW on every parameter: the yardstick for quality, and for memory."""

    name: Literal["full"] = "full"

    def build_optimizer(
        self,
        model: nn.Module,
        layers: LayerMap,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> torch.optim.Optimizer:
        """Build AdamW over ends and blocks."""
        return build_adamw(model, layers, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
