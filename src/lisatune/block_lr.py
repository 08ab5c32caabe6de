"""A block's learning rate by its chance to train.

A block that trains in a share π of the steps goes less far at the same learning rate than one that always
trains. Where the noise of gradients decides how large a rate may be, that of Adam goes with the square root
of the data behind an update (Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
2022), and a block sees π of the data: 1/√π makes up for it. So one rate, that of full fine-tuning, serves
every γ; π = 1 changes nothing. Measured in docs/results.md.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer

__all__ = ["Scaling", "lr_factors", "scale_block_lr"]

Scaling = Literal["sqrt", "inverse", "none"]
POWER = {"sqrt": -0.5, "inverse": -1.0, "none": 0.0}


def lr_factors(chances: Sequence[float], scaling: Scaling) -> tuple[float, ...]:
    """Return 1/√π, 1/π or 1 for each block's chance π; 1 for a block that never trains, π = 0."""
    return tuple(chance ** POWER[scaling] if chance > 0 else 1.0 for chance in chances)


def scale_block_lr(optimizer: Optimizer, chances: Sequence[float], scaling: Scaling = "sqrt") -> None:
    """Multiply the learning rate of each block's param groups by `lr_factors`; that of the ends stays.

    Call it once, before a schedule reads the rates.

    Args:
        optimizer: over groups of `param_groups`, as `build_adamw` makes it.
        chances: π of each block, 0 <= π <= 1: γ/N for all, or `Sampler.inclusion()`.
        scaling: `sqrt` by 1/√π, `inverse` by 1/π, `none` by 1.

    Raises:
        ValueError: there are not as many chances as blocks with param groups of their own.
    """
    blocks: dict[int, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        kind, _, block = group.get("layer", "").partition(" ")
        if kind == "block":
            blocks.setdefault(int(block), []).append(group)
    if len(blocks) != len(chances):
        raise ValueError(
            f"got {len(chances)} chances for {len(blocks)} blocks with param groups of their own; give one "
            "per block, to an optimizer over lisatune.param_groups(model, lisatune.find_layers(model))"
        )
    for block, factor in enumerate(lr_factors(chances, scaling)):
        for group in blocks[block]:
            group["lr"] = group["lr"] * factor  # not in place: a tensor would be one that groups share
