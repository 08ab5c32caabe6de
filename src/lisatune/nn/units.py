"""Blocks divided into units, the modules of a block that hold a matrix, so that they can be drawn one by one.

In a Llama block the units are q, k, v, o, gate, up and down. A module is a unit if it holds a parameter of
two dimensions or more that can train: a linear layer, the fused experts of a mixture, a router. A bias
belongs to the unit of its module. What is left in a block (norms, biases of their own, matrices that do not
require grad) goes with the block's first unit, in the order of `named_parameters`. In most models that is the
query projection: its gradient passes through all that follows it in the block, so the norms that go with it
cost no backward pass that it does not need, but for the block's first norm.

A block without such a module is one unit.
"""

from dataclasses import dataclass

from torch import nn

from lisatune.nn.layers import LayerMap

__all__ = ["UnitMap", "divide_blocks"]


@dataclass(frozen=True)
class UnitMap(LayerMap):
    """A `LayerMap` whose blocks are units of a model's blocks; `divide_blocks` makes one."""

    others: tuple[tuple[str, int], ...] = ()
    """Pairs (module path, unit): what is in the module, but in no named one below it, goes with the unit."""

    of_block: tuple[int, ...] = ()
    """The block of each unit, in rising order."""

    def _paths(self) -> dict[str, int]:
        return super()._paths() | dict(self.others)


def divide_blocks(layers: LayerMap, model: nn.Module) -> UnitMap:
    """Divide a model's blocks into units.

    Args:
        layers: its blocks and ends.
        model: what will ever train requires grad. Parameters may be on the meta device, or divided among
            ranks.

    Returns:
        The units, nearest the input first, in `blocks`; ends and frozen parameters as they were.

    Example:
        >>> from lisatune.nn.layers import find_layers
        >>> block = lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> model = nn.Sequential(block(), block())
        >>> units = divide_blocks(find_layers(model, blocks=""), model)
        >>> units.blocks
        ('0.1', '0.2', '1.1', '1.2')
        >>> [sorted(unit) for unit in units.block_parameters(model)][0]
        ['0.0.bias', '0.0.weight', '0.1.bias', '0.1.weight']
    """
    units: list[str] = []
    others: list[tuple[str, int]] = []
    of_block: list[int] = []
    for index, block in enumerate(layers.block_parameters(model)):
        holders = {name.rpartition(".")[0]: False for name in block}
        for name, parameter in block.items():
            holders[name.rpartition(".")[0]] |= parameter.ndim >= 2 and parameter.requires_grad
        own = [path for path, is_unit in holders.items() if is_unit] or [layers.blocks[index]]
        others += [(path, len(units)) for path in holders if path not in own]
        units += own
        of_block += [index] * len(own)
    return UnitMap(
        blocks=tuple(units),
        ends=layers.ends,
        frozen=layers.frozen,
        embedding=layers.embedding,
        head=layers.head,
        tied=layers.tied,
        others=tuple(others),
        of_block=tuple(of_block),
    )
