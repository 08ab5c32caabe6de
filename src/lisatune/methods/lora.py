"""LoRA (Hu et al., arXiv 2106.09685) by way of PEFT: low-rank adapters beside frozen weights."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lisatune.layers import LayerMap, find_layers
from lisatune.methods.base import Method
from lisatune.optim import optimizer_over
from lisatune.recipe import OptimizerConfig

__all__ = ["Lora"]


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """Low-rank adapters on the linear layers train, all weights of the model are frozen."""

    name: Literal["lora"] = "lora"
    """Way to fine-tune."""

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

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put adapters into the model, in place, and return PEFT's model around it.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: a name in `targets` is none of the model's linear layers.
        """
        try:
            import peft
        except ImportError as error:
            raise ImportError('method.name: lora needs PEFT: pip install "lisatune[train]"') from error
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._target_modules(model),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name of old
            prepared: nn.Module = peft.get_peft_model(
                model, config, autocast_adapter_dtype=self.adapter_dtype == "fp32"
            )
        return prepared

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build AdamW over the adapters; those in bf16 are updated as `optimizer.rounding` says."""
        adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return optimizer_over([{"params": adapters, "layer": "adapters"}], config)

    def fewer_weights(self) -> tuple[dict[str, Any], ...]:
        """Half the rank, and half of that, down to 8."""
        halves = (self.rank >> shift for shift in range(1, self.rank.bit_length()))
        return tuple({"rank": rank} for rank in halves if rank >= 8)

    def _target_modules(self, model: nn.Module) -> list[str]:
        """Paths of the modules that get adapters."""
        blocks = tuple(f"{path}." for path in find_layers(model).blocks)
        linear = [
            path for path, module in model.named_modules() if path.startswith(blocks) and _is_linear(module)
        ]
        unknown = [name for name in self.targets if not any(_is_named(path, name) for path in linear)]
        if unknown:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(
                f"method.targets names {unknown[0]!r}, but the blocks' linear layers are {known}"
            )
        if self.targets:
            linear = [path for path in linear if any(_is_named(path, name) for name in self.targets)]
        ends: list[Any] = []
        if self.ends:
            hf: Any = model
            ends = [hf.get_input_embeddings(), hf.get_output_embeddings()]
        return linear + [path for path, module in model.named_modules() if any(module is end for end in ends)]


def _is_linear(module: nn.Module) -> bool:
    """Whether PEFT can adapt it: a linear layer, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
