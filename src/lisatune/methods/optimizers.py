"""The optimizers of recipes, by `optimizer.name`.

To add one: its file in `lisatune/optim`, a function here that builds it from a recipe's section, and its line
in `OPTIMIZERS`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.distributed.shards import is_sharded
from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.groups import build_fused_adamw, param_groups
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW
from lisatune.recipe import OptimizerConfig, unknown

__all__ = ["OPTIMIZERS", "build_from_groups", "build_optimizer"]

Groups = list[dict[str, Any]]
"""Param groups whose `params` are (name, parameter) pairs, as `lisatune.param_groups` returns them."""


def build_optimizer(
    model: nn.Module, layers: LayerMap, config: OptimizerConfig, *, ends: str | EndsPolicy = "train"
) -> Optimizer:
    """Build the recipe's optimizer over ends and blocks, one param group per layer.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        config: the recipe's section.
        ends: policy of the ends. Its state formats become options of their groups.

    Raises:
        ValueError: `config.name` is not in `OPTIMIZERS`.
    """
    groups = param_groups(model, layers, weight_decay=config.weight_decay, ends=ends, ends_lr=config.ends_lr)
    return build_from_groups(groups, config)


def build_from_groups(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build the recipe's optimizer over param groups; see `build_optimizer`."""
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name: {unknown('optimizer', config.name, OPTIMIZERS)}")
    return OPTIMIZERS[config.name](groups, config)


def build_adamw(groups: Groups, config: OptimizerConfig, kind: type[AdamW] = AdamW) -> Optimizer:
    """Build AdamW over param groups.

    With the default `kind` it is torch's fused AdamW, if weights are float32 or wider and not divided among
    ranks, moments are float32 with the weights, and updates happen in `step()`.

    Args:
        groups: param groups of (name, parameter) pairs.
        config: the recipe's section.
        kind: `lisatune.AdamW` or a subclass.
    """
    parameters = [p for group in groups for _, p in group["params"]]
    # torch's fused kernel takes no parameters that are divided among ranks; ours updates each rank's part.
    is_wide = all(p.dtype in (torch.float32, torch.float64) and not is_sharded(p) for p in parameters)
    is_plain = config.moments == "fp32" and config.state_device is None and not config.in_backward
    is_compact = any({"moments", "state_device", "rows"} & group.keys() for group in groups)
    if is_wide and is_plain and not is_compact and kind is AdamW:
        return build_fused_adamw(groups, config.lr, config.betas, config.eps, config.weight_decay)
    optimizer = kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        rounding=config.rounding,
        moments=config.moments,
        state_device=config.state_device,
    )
    if config.in_backward:
        optimizer.update_in_backward()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {"adamw": build_adamw}
