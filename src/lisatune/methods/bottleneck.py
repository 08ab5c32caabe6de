"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751). The maths is in `lisatune.nn.bottleneck`."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lisatune.methods.adapters import refuse_score
from lisatune.methods.base import Alternatives, Method, halve
from lisatune.methods.optimizers import build_from_groups
from lisatune.nn.bottleneck import add_bottlenecks, find_outputs, find_tuned
from lisatune.nn.layers import LayerMap
from lisatune.recipe import LossConfig, OptimizerConfig

__all__ = ["Bottleneck"]


@final
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """Small networks after attention and MLP of every block train, with the blocks' layer norms."""

    name = "bottleneck"
    shards = True
    has_ends = False

    size: int = 64
    """Size m of the bottleneck: an adapter has 2·m·(hidden size) numbers and biases."""

    norms: bool = True
    """Train the layer norms of the blocks too, as in the paper."""

    targets: tuple[str, ...] = ()
    """Names of the layers that adapters follow, such as o_proj. Default: the last of attention and of MLP."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"method.size must be >= 1, got {self.size}")

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse losses that need a score, which would not train."""
        super().check_loss(loss)
        refuse_score(self.name, loss)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Add the adapters, and freeze all that does not train.

        Raises:
            ValueError: the layers that they follow cannot be found.
        """
        try:
            outputs = find_outputs(model, self.targets)
        except ValueError as error:
            raise ValueError(f"method.targets: {error}") from None
        add_bottlenecks(model, self.size, outputs)
        model.requires_grad_(False)
        for p in find_tuned(model, norms=self.norms).values():
            p.requires_grad_(True)
        return model

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over what trains. Norms and biases have no weight decay."""
        tuned = list(find_tuned(model, norms=self.norms).items())
        matrices = [pair for pair in tuned if pair[1].ndim > 1]
        others = [pair for pair in tuned if pair[1].ndim == 1]
        return build_from_groups(
            [
                {"params": matrices, "layer": "adapters"},
                {"params": others, "layer": "adapters", "weight_decay": 0.0},
            ],
            config,
        )

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Half the size, and half of that, down to 8."""
        return Alternatives(fewer_weights=tuple({"size": size} for size in halve(self.size, least=8)))
