"""The layers that a study reports on: embedding, blocks or units of them, and head, as matrices by name."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lisatune.distributed import ranks
from lisatune.methods.adapters import find_linear_layers
from lisatune.methods.sampler_file import Layers, describe_layers
from lisatune.nn.layers import find_layers
from lisatune.nn.units import divide_blocks
from lisatune.recipe import Recipe

__all__ = ["StudiedLayers", "find_studied_layers", "refuse_ranks"]

Unit = Literal["block", "module"]


@dataclass(frozen=True)
class StudiedLayers:
    """Module paths of matrices by layer."""

    blocks: tuple[tuple[str, ...], ...]
    """Linear layers of each block or unit, nearest the input first."""

    embedding: str | None
    head: str | None
    is_tied: bool
    described: Layers
    """Path and number of parameters of each block or unit."""

    @property
    def named(self) -> dict[str, tuple[str, ...]]:
        """Matrices of each layer, from the input to the output."""
        ends = {name: (path,) for name, path in (("embedding", self.embedding), ("head", self.head)) if path}
        first = {"embedding": ends["embedding"]} if "embedding" in ends else {}
        last = {"head": ends["head"]} if "head" in ends else {}
        return first | {path: self.blocks[i] for i, (path, _) in enumerate(self.described)} | last


def find_studied_layers(model: nn.Module, unit: Unit) -> StudiedLayers:
    """Find the layers of a model without adapters.

    Args:
        model: everything that may train requires grad.
        unit: whether its blocks or the modules in them are studied.

    Raises:
        ValueError: a block or unit has no linear layer.
    """
    layers = find_layers(model)
    drawn = layers if unit == "block" else divide_blocks(layers, model)
    linear = {f"{path}.weight": path for path in find_linear_layers(model)}
    matrices = [
        tuple(linear[name] for name in block if name in linear) for block in drawn.block_parameters(model)
    ]
    if not all(matrices):
        raise ValueError(
            f"{drawn.blocks[matrices.index(())]} has no linear layer, and a study looks at these alone"
        )
    sizes = [sum(p.numel() for p in block.values()) for block in drawn.block_parameters(model)]
    hf: Any = model
    paths = {module: path for path, module in model.named_modules()}
    head = hf.get_output_embeddings()
    return StudiedLayers(
        blocks=tuple(matrices),
        embedding=paths.get(hf.get_input_embeddings()),
        head=None if head is None else paths.get(head),
        is_tied=layers.is_tied,
        described=describe_layers(drawn.blocks, sizes),
    )


def refuse_ranks(recipe: Recipe) -> None:
    """Refuse several ranks, whose weights are in parts.

    Raises:
        ValueError: there are several.
    """
    if ranks.count() > 1:
        raise ValueError(
            f"a study of {recipe.model.name} reads whole weights and runs in one process only; start it "
            "without torchrun"
        )
