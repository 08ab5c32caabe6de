"""The optimizer's param groups, one per layer: how they are built."""

from typing import Any

import torch
from torch import nn

from lisatune.lisa.ends import EndsPolicy, find_row_embedding, find_span_weights
from lisatune.nn.layers import LayerMap

__all__ = [
    "build_adamw",
    "build_fused_adamw",
    "param_groups",
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
            `lisatune.AdamW` reads. With `rows` the embedding has a group of its own, and with
            `rows:A-B` embedding and head.
        ends_lr: learning rate of the ends' groups; None uses the optimizer's.

    Returns:
        Dicts with `params` as (name, parameter) pairs, `weight_decay`, and `layer`: "ends" or "block 7";
        those of the ends also have `lr` if `ends_lr` is given.

    Raises:
        ValueError: `rows` for an embedding that is unknown, frozen or tied.
    """
    policy = EndsPolicy.parse(ends or "train")
    of_rows = {id(find_row_embedding(model, layers).weight)} if policy.rows else set()
    if policy.span is not None:
        of_rows = {id(p) for p in find_span_weights(policy.span, model, layers).values()}
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
            for chosen, own in ((rows, policy.row_options()), (others, options)):
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
    """Build torch's AdamW over groups of `param_groups`, fused if the device has the kernel.

    The kernel walks through memory as if weight, gradient and moments had one layout, so weights that are not
    contiguous do not get it.
    """
    parameters = [p for group in groups for _, p in group["params"]]
    fused = all(p.device.type in FUSED_DEVICES and p.is_contiguous() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
