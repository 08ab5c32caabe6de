"""What the methods share whose trained weights PEFT adds to a frozen model.

They differ in one function, which makes PEFT's config for a model: each passes its own to `add_adapters`.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisatune.methods.base import Method
from lisatune.methods.optimizers import build_from_groups
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.nn.notices import silence_import_notices
from lisatune.recipe import DataConfig, OptimizerConfig, RunConfig

__all__ = [
    "VirtualTokens",
    "add_adapters",
    "build_adapter_optimizer",
    "find_linear_layers",
    "select_named",
]


def add_adapters(
    method: str, model: nn.Module, make_config: Callable[[nn.Module], Any], *, keep_fp32: bool = True
) -> nn.Module:
    """Add adapters to the model, in place, freeze its weights, and return PEFT's model around it.

    Args:
        method: name of the method, for the message if PEFT is missing.
        model: the loaded model, which may be on the meta device.
        make_config: makes PEFT's config of the adapters for this model. It may import PEFT.
        keep_fp32: keep adapters in float32 beside weights of 16 bits, as PEFT does by default.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the method's keys do not fit the model.
    """
    silence_import_notices()
    try:
        import peft
    except ImportError as error:
        raise ImportError(f'method {method} needs PEFT: pip install "lisatune[train]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls transformers by a deprecated name
        adapted: nn.Module = peft.get_peft_model(model, make_config(model), autocast_adapter_dtype=keep_fp32)
    return adapted


def build_adapter_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over the adapters; `optimizer.rounding` says how bf16 ones are updated."""
    adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return build_from_groups([{"params": adapters, "layer": "adapters"}], config)


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Method):
    """Trained vectors stand before every sequence as tokens would: the base of `Prompt` and `Prefix`."""

    has_ends = False

    tokens: int = 20
    """Virtual tokens before every sequence; they count towards the model's longest sequence."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"method.tokens must be >= 1, got {self.tokens}")

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse packing: only the first record of a sequence would see the virtual tokens."""
        if data.packing:
            raise ValueError(
                f"data.packing cannot work with method {self.name}: only the first record of a sequence "
                "would see the virtual tokens; set it to false"
            )

    def make_config(self, model: nn.Module) -> Any:
        """Make PEFT's config of the virtual tokens."""
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> nn.Module:
        """Add the virtual tokens; see `add_adapters`."""
        return add_adapters(self.name, model, self.make_config)

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the recipe's optimizer over the virtual tokens."""
        return build_adapter_optimizer(model, config)


def find_linear_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers in blocks that PEFT can adapt: linear, and GPT-2's transposed ones."""
    blocks = tuple(f"{path}." for path in find_layers(model).blocks)
    return [
        path
        for path, module in model.named_modules()
        if path.startswith(blocks) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def select_named(paths: Iterable[str], names: Iterable[str], key: str) -> list[str]:
    """Return those paths that end in one of `names`.

    Raises:
        ValueError: no path ends in a name; the message says `key` and the names that exist.
    """
    found = {name: [path for path in paths if _is_named(path, name)] for name in names}
    for name, matching in found.items():
        if not matching:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise ValueError(f"{key} names {name!r}, but the blocks' linear layers are {known}")
    return [path for path in paths if any(path in matching for matching in found.values())]


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
