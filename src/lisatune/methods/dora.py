"""DoRA (Liu et al., arXiv 2402.09353) with PEFT: LoRA turns a weight, a vector sets its norm."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from lisatune.distributed.shards import full_tensor, like_shard, local_part
from lisatune.methods.lora import ComputeDtype, LowRank

__all__ = ["Dora"]


@final
@dataclass(frozen=True, kw_only=True)
class Dora(LowRank):
    """Low-rank adapters and a magnitude for each output of a linear layer train, all weights are frozen."""

    name = "dora"
    shards = True
    has_magnitudes = True

    compute_dtype: ComputeDtype = "fp32"
    """Dtype in which the adapters compute: float32, which the norms of the weights need."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute_dtype == "weights":
            raise ValueError(
                "method.compute_dtype weights cannot work with method dora, because the norms of its weights "
                "need float32; use fp32"
            )

    def take_weights(self, model: nn.Module) -> None:
        """Let new magnitudes begin as the norms of the weights, of which one at a time is made whole."""
        if self.adapter is not None:  # which holds the magnitudes
            return
        from peft.tuners.lora.layer import LoraLayer

        nothing = torch.zeros(())
        with torch.no_grad():
            layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
            for layer in layers:
                for dora in layer.lora_magnitude_vector.values():
                    weight = full_tensor(layer.get_base_layer().weight)
                    norms = dora.get_weight_norm(weight, nothing.to(weight), 1.0)  # as new adapters add zero
                    local_part(dora.weight).copy_(like_shard(norms.to(dora.weight.dtype), dora.weight))
