"""The command `lisatune layers`: which parts of a model are blocks, ends or never train, and their sizes."""

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from lisatune.console import count_text, plural, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

__all__ = ["LayerRow", "layers", "list_layers", "print_layers"]

TYPICAL_ACTIVE = 2
"""Active blocks of the example that is printed under the table."""

LayerRow = tuple[str, str, str, int]
"""Kind, where, shape, and number of parameters."""


def layers(model: str, /, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Show which parts of a model are blocks and which are ends, without loading its weights.

    Neighbouring blocks of the same size share a row:

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


def print_layers(name: str, model: "nn.Module", console: "Console | None" = None) -> None:
    """Print the layers of a model as a table. Its weights may be on the meta device.

    Raises:
        ValueError: as in `find_layers`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lisatune.nn.layers import find_layers

    console = console or terminal()
    rows = list_layers(model)
    total = sum(count for *_, count in rows)
    title = Text(f"{name}: {count_text(total)} parameters")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", style="cyan")
    table.add_column("where", overflow="fold")
    table.add_column("shape", justify="right", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for kind, where, shape, count in rows:
        table.add_row(kind, Text(where), shape, f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    found = find_layers(model)
    sizes = sorted((_count(block) for block in found.block_parameters(model)), reverse=True)
    active = min(TYPICAL_ACTIVE, found.num_blocks)
    most = _count(found.end_parameters(model)) + sum(sizes[:active])
    console.print(
        f"LISA with active={active} trains {count_text(most)} parameters at a time ({most / total:.1%}): "
        f"the ends and {active} of {plural(found.num_blocks, 'block')}.",
        soft_wrap=True,
    )


def list_layers(model: "nn.Module") -> list[LayerRow]:
    """List the layers of a model. Every parameter counts in exactly one row.

    Neighbouring blocks of the same size share a row, and so do the frozen parameters of one module.
    """
    from lisatune.nn.layers import find_layers

    found = find_layers(model)
    aliases: dict[str, list[str]] = {}
    for alias, name in found.tied:
        aliases.setdefault(name, []).append(alias)
    ends: list[LayerRow] = []
    for name, parameter in found.end_parameters(model).items():
        also = f" = {', '.join(aliases[name])}" if name in aliases else ""
        ends.append(("end", f"{name}{also}", " × ".join(map(str, parameter.shape)), parameter.numel()))
    blocks: list[LayerRow] = []
    sized = zip(found.blocks, map(_count, found.block_parameters(model)), strict=True)
    for size, same in groupby(sized, key=lambda block: block[1]):
        paths = [path for path, _ in same]
        where = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
        kind = "block" if len(paths) == 1 else f"{len(paths)} blocks"
        blocks.append((kind, where, f"{len(paths)} × {size:,}", len(paths) * size))
    frozen: list[LayerRow] = []
    by_module = groupby(found.frozen_parameters(model).items(), key=lambda item: _outer_modules(item[0]))
    for module, named in by_module:
        parameters = dict(named)
        frozen.append(("frozen", module, plural(len(parameters), "tensor"), _count(parameters)))
    return [*ends, *blocks, *frozen]


def _count(parameters: "Mapping[str, nn.Parameter]") -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _outer_modules(name: str) -> str:
    """Return the path of the two outermost modules that contain a parameter."""
    return ".".join(name.split(".")[:-1][:2])
