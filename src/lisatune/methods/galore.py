"""GaLore as a method of a recipe. The algorithm is in `lisatune.optim.galore`."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from lisatune.lisa.groups import param_groups
from lisatune.methods.base import Alternatives, Method, halve
from lisatune.methods.optimizers import build_adamw
from lisatune.nn.layers import LayerMap
from lisatune.optim.galore import GaLoreAdamW, is_projected
from lisatune.recipe import OptimizerConfig

__all__ = ["GaLore"]


@final
@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """AdamW on every parameter; the gradients of the blocks' matrices are projected to a low rank."""

    name = "galore"

    rank: int = 128
    """Rank r that gradients are projected to; matrices with a side of r or less are not projected."""

    gap: int = 200
    """Steps from one projection to the next, T in the paper: each takes a singular value decomposition."""

    scale: float = 0.25
    """α: a projected update is multiplied by it."""

    def __post_init__(self) -> None:
        for name in ("rank", "gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"method.scale must be a positive number, got {self.scale}")

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build AdamW over ends and blocks; the blocks' matrices are in groups that project gradients.

        Raises:
            ValueError: `optimizer.name` is another optimizer.
        """
        if config.name != "adamw":
            raise ValueError(
                f"optimizer.name {config.name} cannot work with method galore, which is an AdamW"
            )
        groups: list[dict[str, Any]] = []
        projection = {"rank": self.rank, "gap": self.gap, "scale": self.scale}
        for group in param_groups(model, layers, weight_decay=config.weight_decay, ends_lr=config.ends_lr):
            may = group["layer"] != "ends"
            matrices = [pair for pair in group["params"] if may and is_projected(pair[1], self.rank)]
            taken = {name for name, _ in matrices}
            others = [pair for pair in group["params"] if pair[0] not in taken]
            groups += [group | {"params": matrices} | projection] if matrices else []
            groups += [group | {"params": others}] if others else []
        return build_adamw(groups, config, GaLoreAdamW)

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Half the rank, and half of that, down to 8: fewer moments, though as many weights."""
        return Alternatives(fewer_weights=tuple({"rank": rank} for rank in halve(self.rank, least=8)))
