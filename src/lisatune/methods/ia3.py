"""IA3 (Liu et al., arXiv 2205.05638) with PEFT: learned vectors scale activations."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from lisatune.methods.adapters import (
    add_adapters,
    build_adapter_optimizer,
    find_linear_layers,
    task_type,
)
from lisatune.methods.base import Method
from lisatune.nn.layers import LayerMap, select_named
from lisatune.recipe import OptimizerConfig

__all__ = ["Ia3"]


@final
@dataclass(frozen=True, kw_only=True)
class Ia3(Method):
    """Vectors that scale keys, values and the feed-forward's inner activations train, no weight does."""

    name = "ia3"
    shards = True
    has_ends = False
    lr_scale = 30.0

    targets: tuple[str, ...] = ()
    """Names of the linear layers that are scaled. Default: PEFT's choice for the architecture."""

    feedforward: tuple[str, ...] = ()
    """Those among `targets` whose input is scaled, not their output. Default: PEFT's choice."""

    adapter: str | None = None
    """Folder of PEFT's vectors to begin with, such as RUN/model. Default: new ones."""

    def __post_init__(self) -> None:
        if self.targets and not set(self.feedforward) <= set(self.targets):
            other = sorted(set(self.feedforward) - set(self.targets))
            raise ValueError(f"method.feedforward names {other[0]!r}, which is not in method.targets; add it")
        if self.feedforward and not self.targets:
            raise ValueError("method.feedforward needs method.targets; name all layers that are scaled")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Add the vectors; see `add_adapters`."""
        return add_adapters(self.name, model, self._make_config, adapter=self.adapter)

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over the vectors."""
        return build_adapter_optimizer(model, config)

    def _make_config(self, model: nn.Module) -> Any:
        """Make PEFT's IA3Config; ValueError if a target is no layer of the model, or if none is known."""
        from peft import IA3Config
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

        linear = find_linear_layers(model)
        if self.targets:
            targets = select_named(linear, self.targets, "method.targets")
            inputs = select_named(linear, self.feedforward, "method.feedforward")
            return IA3Config(target_modules=targets, feedforward_modules=inputs, task_type=task_type(model))
        kind = model.config.get_text_config().model_type  # type: ignore[operator,union-attr]
        if kind not in KNOWN:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(
                f"PEFT has no choice of layers for ia3 in {kind}. Set method.targets to the layers of keys, "
                f"values and the last of the feed-forward, and method.feedforward to that last one. The "
                f"layers are {names}"
            )
        return IA3Config(task_type=task_type(model))
