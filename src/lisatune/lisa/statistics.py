"""How far training has moved the weights of each block from where they began.

    movement of block l = ‖θ_l - θ_l⁰‖ / ‖θ_l⁰‖

over all parameters of the block, in float64: 0 is a block that never trained.
"""

import math

import torch
from torch import Tensor, nn

from lisatune.nn.layers import find_layers

__all__ = ["block_movement"]


def block_movement(before: nn.Module, after: nn.Module) -> list[float]:
    """Movement of each block.

    Args:
        before, after: the same model before and after training, on the CPU.

    Raises:
        ValueError: the two are not the same model.
    """
    old, layers = dict(before.named_parameters()), find_layers(after)
    movements = []
    for block in layers.block_parameters(after):
        moved = size = 0.0
        for name, parameter in block.items():
            if name not in old or old[name].shape != parameter.shape:
                raise ValueError(f"the base model has no {name} of shape {tuple(parameter.shape)}")
            moved += _squares(parameter.detach(), old[name].detach())
            size += _squares(old[name].detach())
        movements.append(math.sqrt(moved / size) if size else 0.0)
    return movements


def _squares(weight: Tensor, origin: Tensor | None = None) -> float:
    """Sum of squares, of the difference to `origin` if given."""
    difference = weight.double() if origin is None else weight.double() - origin.double()
    return float(torch.sum(difference * difference))
