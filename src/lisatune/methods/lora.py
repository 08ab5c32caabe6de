"""LoRA (Hu et al., arXiv 2106.09685) with PEFT: low-rank adapters beside frozen weights."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from torch import nn

from lisatune.methods.adapters import (
    add_adapters,
    build_adapter_optimizer,
    compute_in_dtype_of_input,
    find_linear_layers,
    task_type,
)
from lisatune.methods.base import Alternatives, Method, halve
from lisatune.nn.layers import LayerMap, select_named
from lisatune.recipe import OptimizerConfig

__all__ = ["ComputeDtype", "Lora", "LowRank"]

AdapterDtype = Literal["fp32", "weights"]
ComputeDtype = Literal["weights", "fp32"]


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Low-rank adapters: the base of `Lora`, `Dora` and `QLora`, which have the same keys."""

    has_ends = False

    has_magnitudes: ClassVar[bool] = False
    """Whether a vector trains besides, which sets the norm of each row of a weight (DoRA)."""

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

    adapter_dtype: AdapterDtype = "fp32"
    """Dtype of the adapters: float32 (PEFT's default), or that of the weights, half as large beside bf16."""

    compute_dtype: ComputeDtype = "weights"
    """Dtype in which the adapters compute: that of the weights, as under autocast in HF Trainer and TRL, or
    float32 (PEFT without autocast), for which backward keeps a float32 copy of every input."""

    adapter: str | None = None
    """Folder of PEFT adapters to begin with, such as RUN/model. Default: new ones."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank must be >= 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"method.alpha must be > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be >= 0 and below 1, got {self.dropout}")
        if self.adapter_dtype not in get_args(AdapterDtype):
            raise ValueError(f"method.adapter_dtype must be fp32 or weights, got {self.adapter_dtype!r}")
        if self.compute_dtype not in get_args(ComputeDtype):
            raise ValueError(f"method.compute_dtype must be weights or fp32, got {self.compute_dtype!r}")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Add the adapters; see `add_adapters`."""
        adapted = add_adapters(
            self.name,
            model,
            self._make_config,
            keep_fp32=self.adapter_dtype == "fp32",
            adapter=self.adapter,
        )
        if self.compute_dtype == "weights":
            compute_in_dtype_of_input(adapted)
        return adapted

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over the adapters."""
        return build_adapter_optimizer(model, config)

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Half the rank, and half of that, down to 8."""
        return Alternatives(fewer_weights=tuple({"rank": rank} for rank in halve(self.rank, least=8)))

    def _make_config(self, model: nn.Module) -> Any:
        """Make PEFT's LoraConfig; ValueError if a name in `targets` is no linear layer of the model."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self._find_targets(model),
            use_dora=self.has_magnitudes,
            task_type=task_type(model),
        )

    def _find_targets(self, model: nn.Module) -> list[str]:
        """Return the paths of the modules that get adapters."""
        linear = find_linear_layers(model)
        if self.targets:
            linear = select_named(linear, self.targets, "method.targets")
        ends: list[Any] = []
        if self.ends:
            hf: Any = model
            # A score is no output embedding: it trains as it is.
            ends = [hf.get_input_embeddings(), hf.get_output_embeddings()]
        return linear + [path for path, module in model.named_modules() if any(module is end for end in ends)]


@final
@dataclass(frozen=True, kw_only=True)
class Lora(LowRank):
    """Low-rank adapters on the linear layers train, all weights of the model are frozen."""

    name = "lora"
    shards = True
