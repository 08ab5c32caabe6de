"""How far a run moved the weights of each block."""

import math

import torch
from torch import Tensor, nn

from lisatune.nn.layers import find_layers

__all__ = ["measure_movement"]


def measure_movement(before: nn.Module, after: nn.Module) -> list[float]:
    """Measure how far training has moved each block from its first weights.

        movement of block l = ‖θ_l - θ_l⁰‖ / ‖θ_l⁰‖

    over all parameters of the block, in float64. It is 0 for a block that never trained.

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
            moved += _sum_squares(parameter.detach(), old[name].detach())
            size += _sum_squares(old[name].detach())
        movements.append(math.sqrt(moved / size) if size else 0.0)
    return movements


def _sum_squares(weight: Tensor, origin: Tensor | None = None) -> float:
    """Sum the squares of a weight, or of its difference to `origin`."""
    difference = weight.double() if origin is None else weight.double() - origin.double()
    return float(torch.sum(difference * difference))
