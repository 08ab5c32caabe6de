"""Prefix tuning (Li and Liang, arXiv 2101.00190) with PEFT: trained keys and values in every layer."""

from dataclasses import dataclass
from typing import Any, final

from torch import nn

from lisatune.methods.adapters import VirtualTokens
from lisatune.recipe import DataConfig, RunConfig

__all__ = ["Prefix"]


@final
@dataclass(frozen=True, kw_only=True)
class Prefix(VirtualTokens):
    """Keys and values of virtual tokens train in every attention layer, no weight does."""

    name = "prefix"
    lr_scale = 30.0

    projection: int | None = None
    """Width of the paper's two-layer network that makes them while training. Default: no network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection is not None and self.projection < 1:
            raise ValueError(f"method.projection must be >= 1, got {self.projection}")

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse packing, and whatever runs blocks without the keys and values that are passed to them."""
        super().check_mix(data, run)
        if run.activation_checkpointing:
            raise ValueError(
                "run.activation_checkpointing cannot work with method prefix: blocks that run again take no "
                "keys and values from outside; set it to false, or use method prompt"
            )
        if run.compile is True:
            raise ValueError(
                "run.compile cannot work with method prefix: compiled blocks take no keys and values from "
                "outside; set it to false, or use method prompt"
            )

    def make_config(self, model: nn.Module) -> Any:
        """Make PEFT's PrefixTuningConfig."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            prefix_projection=self.projection is not None,
            encoder_hidden_size=self.projection,
            task_type="CAUSAL_LM",
        )
