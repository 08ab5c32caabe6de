"""QLoRA (Dettmers et al., arXiv 2305.14314): LoRA beside weights that are stored in 4 bits."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lisatune.methods.lora import LowRank
from lisatune.nn.nf4 import check_nf4, quantize_linear_layers
from lisatune.recipe import DataConfig, RunConfig

__all__ = ["QLora"]


@final
@dataclass(frozen=True, kw_only=True)
class QLora(LowRank):
    """Low-rank adapters train beside linear layers of the blocks that are frozen in 4 bits (NF4)."""

    name = "qlora"
    shards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_dtype == "weights":
            raise ValueError(
                "method.adapter_dtype weights cannot work with method qlora, because 4 bits do not train; "
                "use fp32"
            )

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse compiling, which does not work with 4-bit layers yet."""
        if run.compile is True:
            raise ValueError("run.compile cannot work with method qlora yet; set it to false, or use lora")

    def check_device(self, device: torch.device) -> None:
        """Refuse a device on which bitsandbytes cannot store 4 bits, and an environment without it."""
        check_nf4(device)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Store the blocks' linear layers in 4 bits, then add the adapters."""
        quantize_linear_layers(model)
        return super().prepare(model)
