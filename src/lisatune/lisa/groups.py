"""The optimizer's param groups, one per layer: how they are built, and LISA's checks of an optimizer."""

import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.lisa.ends import ROW_OPTIONS, EndsPolicy, find_row_embedding
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW

__all__ = [
    "build_adamw",
    "build_fused_adamw",
    "check_parameters",
    "param_groups",
    "unwrap_optimizer",
    "warn_of_rounding",
]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def param_groups(
    model: nn.Module,
    layers: LayerMap,
    *,
    weight_decay: float = 0.0,
    ends: str | EndsPolicy | None = None,
    ends_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Build the param groups of the ends and of each block.

    With weight decay each layer has a second group, with `weight_decay` 0, for norms, biases and embeddings:
    all parameters of fewer than two dimensions and all weights of `nn.Embedding`.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        weight_decay: of the groups that are decayed.
        ends: policy of the ends (`EndsPolicy`). Its state formats become options of their groups, which
            `lisatune.AdamW` reads. With `rows` the embedding has a group of its own.
        ends_lr: learning rate of the ends' groups; None uses the optimizer's.

    Returns:
        Dicts with `params` as (name, parameter) pairs, `weight_decay`, and `layer`: "ends" or "block 7";
        those of the ends also have `lr` if `ends_lr` is given.

    Raises:
        ValueError: `rows` for an embedding that is unknown, frozen or tied.
    """
    policy = EndsPolicy.parse(ends or "train")
    of_rows = {id(find_row_embedding(model, layers).weight)} if policy.rows else set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named_layers = [("ends", layers.end_parameters(model))]
    named_layers += [(f"block {i}", block) for i, block in enumerate(layers.block_parameters(model))]
    end_options = {} if ends_lr is None else {"lr": ends_lr}
    groups = []
    for layer, parameters in named_layers:
        undecayed = {name for name, p in parameters.items() if p.ndim < 2 or id(p) in embeddings}
        if weight_decay == 0:
            undecayed = set()
        for decay, names in ((weight_decay, parameters.keys() - undecayed), (0.0, undecayed)):
            options = policy.state_options() if layer == "ends" else {}
            shared = end_options if layer == "ends" else {}
            pairs = [(name, p) for name, p in parameters.items() if name in names]
            rows = [pair for pair in pairs if id(pair[1]) in of_rows]
            others = [pair for pair in pairs if id(pair[1]) not in of_rows]
            for chosen, own in ((rows, ROW_OPTIONS), (others, options)):
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "layer": layer, **shared, **own})
    return groups


def build_adamw(
    model: nn.Module,
    layers: LayerMap,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ends_lr: float | None = None,
) -> torch.optim.AdamW:
    """Build torch's AdamW over ends and blocks, fused if the device has the kernel.

    `ends_lr` is the learning rate of embedding, head and final norm, if it is not `lr`.
    """
    groups = param_groups(model, layers, weight_decay=weight_decay, ends_lr=ends_lr)
    return build_fused_adamw(groups, lr, betas, eps, weight_decay)


def build_fused_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build torch's AdamW over groups of `param_groups`, fused if the device has the kernel."""
    fused = all(p.device.type in FUSED_DEVICES for group in groups for _, p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def unwrap_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: it is no torch optimizer, or the model or optimizer is DeepSpeed's.
        ValueError: the optimizer updates in backward, and a loss scaler is in use.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for each in (model, optimizer, inner):
        if type(each).__module__.startswith("deepspeed"):
            raise TypeError(
                "LISA cannot work with DeepSpeed, which fixes the trained parameters when its engine starts: "
                "later blocks would silently never train; use one device or torch's FSDP2"
            )
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and isinstance(inner, AdamW) and inner.in_backward is not None:
        raise ValueError(
            f"update in backward cannot work with a loss scaler ({type(scaler).__name__}, fp16), because "
            "gradients are still scaled then; train in bf16, or update in step()"
        )
    return inner


def check_parameters(layers: LayerMap, model: nn.Module, optimizer: Optimizer) -> None:
    """Check that everything that will ever train is in the optimizer and able to train.

    A parameter that does not require grad never trains, and a warning names it.

    Raises:
        ValueError: one is not; or the model has adapters, or a block in which nothing requires grad.
    """
    _refuse_adapters(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    blocks = layers.block_parameters(model)
    frozen = []
    for name, parameter in {
        k: p for layer in (layers.end_parameters(model), *blocks) for k, p in layer.items()
    }.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype} and cannot train; load unquantised weights"
            )
        if not parameter.requires_grad:
            frozen.append(name)
        elif id(parameter) not in held:
            raise ValueError(
                f"parameter {name!r} is not in the optimizer, so it would never train; build the optimizer "
                "over model.parameters() before anything is frozen, and attach LISA after that"
            )
    for index, block in enumerate(blocks):
        if not any(p.requires_grad for p in block.values()):
            raise ValueError(
                f"nothing in block {index} requires grad, so it would never train; build the optimizer over "
                "model.parameters() and attach LISA before anything is frozen, and detach() an earlier LISA"
            )
    if frozen:
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        warnings.warn(
            f"{', '.join(frozen[:3])}{more} did not require grad when LISA was attached and will never train",
            stacklevel=3,
        )


def _refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with PEFT's adapters."""
    peft = sys.modules.get("peft")  # a model has adapters only if PEFT has been imported
    if peft is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, peft.PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "the model has PEFT's adapters: LISA would train the weights beside them, and save_pretrained "
            "saves the adapters alone; attach LISA to a model without adapters, or train the adapters alone"
        )


def warn_of_rounding(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn if weights of 16 bits are updated by an optimizer that rounds to nearest.

    At the learning rates of fine-tuning, most updates of a bf16 weight are smaller than half of its spacing,
    so the weight stands still (docs/optimizers.md).
    """
    narrow = {p.dtype for p in model.parameters() if p.requires_grad and p.element_size() == 2}
    rounds = all(group.get("rounding", "nearest") == "nearest" for group in optimizer.param_groups)
    keeps_rest = bool(getattr(optimizer, "lasting_state", ()))
    is_stochastic = getattr(optimizer, "bf16_stochastic_round", False)  # torchao's
    if narrow and rounds and not keeps_rest and not is_stochastic:
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        warnings.warn(
            f"the weights are {dtypes} and {type(optimizer).__name__} rounds each update to nearest, so at a "
            "small learning rate most weights never move; use lisatune.AdamW, whose updates are exact, or "
            "load the model with dtype=torch.float32",
            stacklevel=3,
        )
