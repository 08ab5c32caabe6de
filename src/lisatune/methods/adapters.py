"""What the methods share whose trained weights PEFT adds to a frozen model.

They differ in one function, which makes PEFT's config for a model: each passes its own to `add_adapters`.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed.shards import has_values
from lisatune.methods.base import Method
from lisatune.methods.optimizers import build_from_groups
from lisatune.models.locate import ADAPTER_CONFIG
from lisatune.nn.layers import LayerMap, find_layers, find_score, is_linear
from lisatune.nn.notices import silence_import_notices
from lisatune.recipe import DataConfig, LossConfig, OptimizerConfig, RunConfig

__all__ = [
    "VirtualTokens",
    "add_adapters",
    "build_adapter_optimizer",
    "compute_in_dtype_of_input",
    "find_linear_layers",
    "refuse_score",
    "task_type",
]


WEIGHTS = "adapter_model.safetensors"

KEYS = {
    "peft_type": "method.name",
    "use_dora": "method.name",
    "r": "method.rank",
    "lora_alpha": "method.alpha",
}
"""Keys of a PEFT config that a recipe's key decides about."""

OTHERS = ("use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "modules_to_save")
"""Keys of a PEFT config that change what adapters compute, and that no recipe can set."""


def add_adapters(
    method: str,
    model: nn.Module,
    make_config: Callable[[nn.Module], Any],
    *,
    keep_fp32: bool = True,
    adapter: str | None = None,
) -> nn.Module:
    """Add adapters to the model, in place, freeze its weights, and return PEFT's model around it.

    Args:
        method: name of the method, for the message if PEFT is missing.
        model: the loaded model, which may be on the meta device.
        make_config: makes PEFT's config of the adapters for this model. It may import PEFT.
        keep_fp32: keep adapters in float32 beside weights of 16 bits, as PEFT does by default.
        adapter: folder of adapters to begin with; None begins with new ones.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the method's keys do not fit the model, or the adapters in the folder do not fit both.
        FileNotFoundError: the folder holds no adapters.
    """
    silence_import_notices()
    try:
        import peft
    except ImportError as error:
        raise ImportError(f'method {method} needs PEFT: pip install "lisatune[train]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls transformers by a deprecated name
        adapted: nn.Module = peft.get_peft_model(model, make_config(model), autocast_adapter_dtype=keep_fp32)
    if adapter is not None:
        _check_config(adapter, adapted)
        _load_adapters(adapter, adapted)
    return adapted


def compute_in_dtype_of_input(adapted: nn.Module) -> None:
    """Let low-rank adapters in float32 compute in the dtype of their inputs, as they do under autocast.

    PEFT would cast the inputs to float32, and backward would keep these copies. Adapters of an embedding,
    which have no input to keep, stay as they are.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
        for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
            linear.forward = MethodType(_compute_in_dtype_of_input, linear)


def _compute_in_dtype_of_input(linear: nn.Linear, x: Tensor) -> Tensor:
    """Replace the `forward` of an adapter's matrix, which has no bias."""
    return nn.functional.linear(x, linear.weight.to(x.dtype))


def _check_config(folder: str, adapted: Any) -> None:
    """Compare the config of the adapters in a folder with the one that the recipe makes."""
    for name in (ADAPTER_CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(
                f"method.adapter {folder} has no {name}; give a folder of PEFT adapters, such as RUN/model"
            )
    try:
        saved = dict(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"method.adapter: {Path(folder) / ADAPTER_CONFIG} is damaged") from None
    made = adapted.peft_config["default"]
    config = {**made.to_dict(), "peft_type": made.peft_type.value}
    for key in (*KEYS, *OTHERS):
        theirs, ours = saved.get(key, config.get(key)) or None, config.get(key) or None
        if theirs != ours:
            what = f"set {KEYS[key]} to what it was trained with" if key in KEYS else "it cannot be continued"
            raise ValueError(
                f"the adapter in {folder} has {key}={theirs}, and the recipe makes {key}={ours}; {what}"
            )
    bases = [each["base_model_name_or_path"] or "" for each in ({**config, **saved}, config)]
    if bases[0] != bases[1] and Path(bases[0]).resolve() != Path(bases[1]).resolve():
        warnings.warn(
            f"the adapter in {folder} was trained on {bases[0]}, and model.name is {bases[1]}; "
            "if these are not the same model, its loss will be that of a bad adapter",
            stacklevel=4,
        )


def _load_adapters(folder: str, adapted: Any) -> None:
    """Load adapters in place of new ones. In a model without values only names and shapes are compared."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            theirs = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"method.adapter: {Path(folder) / WEIGHTS} is damaged ({error})") from None
    for name in sorted(ours.keys() | shapes.keys()):
        if name not in shapes:
            problem = f"it has no {name}"
        elif name not in ours:
            problem = f"the recipe makes no {name}"
        elif shapes[name] != list(ours[name].shape):
            problem = f"its {name} is {shapes[name]}, and the model takes {list(ours[name].shape)}"
        else:
            continue
        raise ValueError(
            f"the adapter in {folder} does not fit: {problem}; give the model that it was trained on, and "
            "the modules that it was trained for as method.targets and method.ends"
        )
    if all(has_values(tensor) for tensor in ours.values()):
        set_peft_model_state_dict(adapted, theirs)


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

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse losses that compare with the model before training, which new virtual tokens change at once.

        And those that need a score, which would not train.
        """
        super().check_loss(loss)
        refuse_score(self.name, loss)
        if loss.has_reference:
            raise ValueError(
                f"loss.name={loss.name} cannot work with method {self.name}: it compares with the model "
                "before training, which new virtual tokens have changed already; use lora, lisa or full"
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


def refuse_score(method: str, loss: LossConfig) -> None:
    """Refuse a loss that needs a score, for a method that trains what it adds and nothing else.

    Raises:
        ValueError: it needs one.
    """
    if loss.has_score:
        raise ValueError(
            f"loss.name={loss.name} cannot work with method {method}: it trains what it adds and nothing "
            "else, so the score would stay random; use lora, lisa or full"
        )


def task_type(model: nn.Module) -> str:
    """Return PEFT's name for what a model is for. A score, if there is one, trains beside the adapters."""
    return "CAUSAL_LM" if find_score(model) is None else "SEQ_CLS"


def find_linear_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers in blocks that PEFT can adapt: linear, and GPT-2's transposed ones."""
    blocks = tuple(f"{path}." for path in find_layers(model).blocks)
    return [path for path, module in model.named_modules() if path.startswith(blocks) and is_linear(module)]
