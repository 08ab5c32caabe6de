"""What all methods have in common whose trained weights PEFT adds to a frozen model."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisatune.methods.base import Method
from lisatune.methods.optimizers import optimizer_over
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.nn.notices import silence_import_notices
from lisatune.recipe import DataConfig, OptimizerConfig, RunConfig

__all__ = ["Adapters", "VirtualTokens", "linear_layers", "named_modules_among"]


@dataclass(frozen=True, kw_only=True)
class Adapters(Method):
    """What PEFT adds to the model trains, all weights of the model are frozen."""

    has_ends = False

    name: str = ""
    """Way to fine-tune."""

    def peft_config(self, model: nn.Module) -> Any:
        """PEFT's config of the adapters for this model, which may be on the meta device."""
        raise NotImplementedError

    def keeps_fp32(self) -> bool:
        """Whether PEFT keeps adapters in float32 beside weights of 16 bits, as it does by default."""
        return True

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put adapters into the model, in place, and return PEFT's model around it.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: the method's keys do not fit the model.
        """
        silence_import_notices()
        try:
            import peft
        except ImportError as error:
            raise ImportError(f'method {self.name} needs PEFT: pip install "lisatune[train]"') from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name of old
            prepared: nn.Module = peft.get_peft_model(
                model,
                self.peft_config(model),
                autocast_adapter_dtype=self.keeps_fp32(),
            )
        return prepared

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build AdamW over the adapters; those in bf16 are updated as `optimizer.rounding` says."""
        adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return optimizer_over([{"params": adapters, "layer": "adapters"}], config)


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Adapters):
    """Trained vectors stand before every sequence as tokens would."""

    tokens: int = 20
    """Virtual tokens before every sequence; they take room of the model's longest sequence."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"method.tokens must be >= 1, got {self.tokens}")

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse packing, in which only a sequence's first record would see the virtual tokens."""
        if data.packing:
            raise ValueError(
                f"data.packing can't work with method {self.name}: only the first record of a sequence would "
                "see the virtual tokens; set it to false"
            )


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the blocks' layers that PEFT can adapt: linear ones, and the transposed ones of GPT-2."""
    blocks = tuple(f"{path}." for path in find_layers(model).blocks)
    return [
        path
        for path, module in model.named_modules()
        if path.startswith(blocks) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def named_modules_among(paths: Iterable[str], names: Iterable[str], key: str) -> list[str]:
    """Those paths that end in one of `names`.

    Raises:
        ValueError: a name is none of them; the message names `key` and the names that there are.
    """
    found = {name: [path for path in paths if _is_named(path, name)] for name in names}
    for name, matching in found.items():
        if not matching:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise ValueError(f"{key} names {name!r}, but the blocks' linear layers are {known}")
    return [path for path in paths if any(path in matching for matching in found.values())]


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
