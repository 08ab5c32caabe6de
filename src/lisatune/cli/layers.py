"""A table of a model's layers: what is a block, what is an end, what never trains, and how large each is."""

from collections.abc import Mapping
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lisatune.console import count_text, plural, terminal
from lisatune.nn.layers import find_layers

__all__ = ["layer_table", "print_layers"]

TYPICAL_ACTIVE = 2


Row = tuple[str, str, str, int]


def print_layers(name: str, model: nn.Module, console: Console | None = None) -> None:
    """Print the table for a model; its weights may be on the meta device.

    Raises:
        ValueError: as `find_layers`.
    """
    console = console or terminal()
    rows = layer_table(model)
    total = sum(count for *_, count in rows)
    table = Table(title=f"{name}: {count_text(total)} parameters", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", style="cyan")
    table.add_column("where", overflow="fold")
    table.add_column("shape", justify="right", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for kind, where, shape, count in rows:
        table.add_row(kind, Text(where), shape, f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    layers = find_layers(model)
    sizes = sorted((_count(block) for block in layers.block_parameters(model)), reverse=True)
    ends = _count(layers.end_parameters(model))
    active = min(TYPICAL_ACTIVE, layers.num_blocks)
    most = ends + sum(sizes[:active])
    console.print(
        f"LISA with active={active} trains {count_text(most)} parameters at a time ({most / total:.1%}): "
        f"the ends and {active} of {plural(layers.num_blocks, 'block')}.",
        soft_wrap=True,
    )


def layer_table(model: nn.Module) -> list[Row]:
    """List a model's layers as (kind, where, shape, parameters); every parameter is in exactly one row.

    Blocks of one size that follow each other share a row, and so do frozen parameters of one module.
    """
    layers = find_layers(model)
    aliases: dict[str, list[str]] = {}
    for alias, name in layers.tied:
        aliases.setdefault(name, []).append(alias)
    ends: list[Row] = []
    for name, parameter in layers.end_parameters(model).items():
        also = f" = {', '.join(aliases[name])}" if name in aliases else ""
        ends.append(("end", f"{name}{also}", " × ".join(map(str, parameter.shape)), parameter.numel()))
    blocks: list[Row] = []
    sized = zip(layers.blocks, map(_count, layers.block_parameters(model)), strict=True)
    for size, same in groupby(sized, key=lambda block: block[1]):
        paths = [path for path, _ in same]
        where = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
        kind = "block" if len(paths) == 1 else f"{len(paths)} blocks"
        blocks.append((kind, where, f"{len(paths)} × {size:,}", len(paths) * size))
    frozen: list[Row] = []
    for module, named in groupby(layers.frozen_parameters(model).items(), key=lambda item: _top(item[0])):
        parameters = dict(named)
        frozen.append(("frozen", module, plural(len(parameters), "tensor"), _count(parameters)))
    return [*ends, *blocks, *frozen]


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _top(name: str) -> str:
    """The two outermost modules that a parameter lies in."""
    return ".".join(name.split(".")[:-1][:2])


def layers(model: str, /, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Show what is a block and what is an end of a model, without loading its weights.

        lisatune layers smollm2-135m
        lisatune layers path/to/model

    Args:
        model: Hugging Face folder, hub id, .gguf file or `smollm2-135m`.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python code that comes with the model.
    """
    from lisatune.models.load import meta_model

    print_layers(model, meta_model(model, revision=revision, trust_remote_code=trust_remote_code))
    return 0
