"""DoRA (Liu et al., arXiv 2402.09353) by way of PEFT: LoRA turns a weight, a vector sets its norm."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lisatune.methods.lora import LowRank

__all__ = ["Dora"]


@dataclass(frozen=True, kw_only=True)
class Dora(LowRank):
    """Low-rank adapters and a magnitude for each output of a linear layer train, all weights are frozen."""

    name: Literal["dora"] = "dora"
    """Way to fine-tune."""

    def peft_config(self, model: nn.Module) -> Any:
        """PEFT's LoraConfig with magnitudes."""
        config = super().peft_config(model)
        config.use_dora = True
        return config
