"""LoRA (Hu et al., arXiv 2106.09685) by way of PEFT: low-rank adapters beside frozen weights."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lisatune.methods.adapters import Adapters, linear_layers, named_modules_among

__all__ = ["Lora", "LowRank"]


@dataclass(frozen=True, kw_only=True)
class LowRank(Adapters):
    """The keys of LoRA and its kin."""

    rank: int = 16
    """Rank r of the adapters: a matrix [out, in] gets r·(out + in) trained numbers."""

    alpha: float | None = None
    """Scale of the adapters is alpha/rank. Default: 2·rank."""

    dropout: float = 0.0
    """Dropout before the adapters, 0 <= dropout < 1."""

    targets: tuple[str, ...] = ()
    """Names of the modules that get adapters, such as q_proj. Default: every linear layer of the blocks."""

    ends: bool = False
    """Adapters on embedding and head too, as in the LISA paper's comparison."""

    adapter_dtype: Literal["fp32", "weights"] = "fp32"
    """Dtype of the adapters: float32 (PEFT's default), or that of the weights, half as large beside bf16."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank must be >= 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"method.alpha must be > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be >= 0 and below 1, got {self.dropout}")
        if self.adapter_dtype not in ("fp32", "weights"):
            raise ValueError(f"method.adapter_dtype must be fp32 or weights, got {self.adapter_dtype!r}")

    def peft_config(self, model: nn.Module) -> Any:
        """PEFT's LoraConfig; ValueError where a name in `targets` is none of the model's linear layers."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._target_modules(model),
            task_type="CAUSAL_LM",
        )

    def keeps_fp32(self) -> bool:
        """As `adapter_dtype` says."""
        return self.adapter_dtype == "fp32"

    def fewer_weights(self) -> tuple[dict[str, Any], ...]:
        """Half the rank, and half of that, down to 8."""
        halves = (self.rank >> shift for shift in range(1, self.rank.bit_length()))
        return tuple({"rank": rank} for rank in halves if rank >= 8)

    def _target_modules(self, model: nn.Module) -> list[str]:
        """Paths of the modules that get adapters."""
        linear = linear_layers(model)
        if self.targets:
            linear = named_modules_among(linear, self.targets, "method.targets")
        ends: list[Any] = []
        if self.ends:
            hf: Any = model
            ends = [hf.get_input_embeddings(), hf.get_output_embeddings()]
        return linear + [path for path, module in model.named_modules() if any(module is end for end in ends)]


@dataclass(frozen=True, kw_only=True)
class Lora(LowRank):
    """Low-rank adapters on the linear layers train, all weights of the model are frozen."""

    name: Literal["lora"] = "lora"
    """Way to fine-tune."""
