"""Where a model's blocks and ends are, found by structure and held as names.

blocks  the N decoder layers: the outermost `nn.ModuleList` of the language model that is as long as the
        config's number of hidden layers; without such a number, the only outermost list there is. In a
        model without a text config, such as a diffusion transformer, several outermost lists whose names end
        in `blocks` are one sequence. A `nn.ModuleDict` with numbers as keys, as in torchtitan, is a list
ends    everything that trains besides the blocks: embedding, head, final norm
frozen  everything else, such as vision towers and projectors: never trains

Every parameter is in exactly one of the three. Tied parameters count once, under their first name. A
parameter that several blocks share is an end, because it belongs to every one of them.

A module around one Hugging Face model has that model's blocks; what it adds are ends.

A `LayerMap` holds module paths and parameter names, never parameters: sharding replaces those.
"""

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["LayerMap", "find_layers", "find_score", "is_linear", "select_named"]

_List = nn.ModuleList | nn.ModuleDict


@dataclass(frozen=True)
class LayerMap:
    """Names of a model's blocks and ends; `find_layers` makes one.

    Example:
        >>> layers = LayerMap(blocks=("layers.0", "layers.1"), ends=("head.weight",), head="head.weight")
        >>> layers.num_blocks, layers.is_tied
        (2, False)
    """

    blocks: tuple[str, ...]
    """Module path of each block, nearest the input first."""

    ends: tuple[str, ...]
    """Names of the parameters outside the blocks that train: embedding, head, final norm."""

    frozen: tuple[str, ...] = ()
    """Names of the parameters that never train."""

    embedding: str | None = None
    """Name of the input embedding's weight, None if the model does not name it."""

    head: str | None = None
    """Name of the output head's weight, or of a classifier's score; the embedding's when the two are tied."""

    tied: tuple[tuple[str, str], ...] = ()
    """Pairs (alias, name): the alias is the same parameter under another name."""

    @property
    def num_blocks(self) -> int:
        """N, the number of blocks."""
        return len(self.blocks)

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one parameter."""
        return self.head is not None and self.head == self.embedding

    def block_parameters(self, model: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Return the parameters of each block by name; those shared between blocks are ends."""
        ends = set(self.ends)
        blocks: list[dict[str, nn.Parameter]] = [{} for _ in self.blocks]
        where = self._paths()
        for name, parameter in model.named_parameters():
            block = _owner(name, where)
            if block is not None and name not in ends:
                blocks[block][name] = parameter
        return blocks

    def _paths(self) -> dict[str, int]:
        """Return the module paths that belong to each block, and the block's index."""
        return {path: i for i, path in enumerate(self.blocks)}

    def end_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of the ends by name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self.ends}

    def frozen_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that never train by name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self.frozen}


def find_layers(
    model: nn.Module,
    *,
    blocks: str | Sequence[str] | None = None,
    ends: str | Sequence[str] | None = None,
) -> LayerMap:
    """Find the blocks and ends of a model.

    Args:
        model: a Hugging Face model, or with `blocks` any module. Parameters may be on the meta device.
        blocks: path of the module whose children are the blocks ("transformer.h"), or one path per block.
            Default: found by structure.
        ends: module path or parameter name that trains besides the blocks, or several of them. Default:
            everything outside the blocks; in a model with a vision or audio tower only what belongs to its
            language model.

    Returns:
        The blocks, nearest the input first, the ends and the frozen parameters, by name.

    Raises:
        TypeError: the model is no module.
        ValueError: no or several module lists qualify, or a given path does not exist.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({
        ...     "embedding": nn.Embedding(16, 8),
        ...     "layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)),
        ...     "head": nn.Linear(8, 16, bias=False),
        ... })
        >>> layers = find_layers(model, blocks="layers")
        >>> layers.blocks
        ('layers.0', 'layers.1')
        >>> layers.ends
        ('embedding.weight', 'head.weight')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}; load it first")
    paths = _find_blocks(model) if blocks is None else _given_blocks(model, blocks)
    where = {path: i for i, path in enumerate(paths)}
    names = _names_by_parameter(model)
    outside = [own[0] for own in names if {_owner(name, where) for name in own} == {None}]
    shared = [own[0] for own in names if len({_owner(name, where) for name in own}) > 1]
    if ends is None and _has_towers(model):
        ends = _language_model_part(model, paths)
    if isinstance(ends, str):
        ends = [ends]
    trained = outside if ends is None else _below(names, outside, ends)
    end_names = [own[0] for own in names if own[0] in {*trained, *shared}]
    canonical = {alias: own[0] for own in names for alias in own}
    _refuse_empty_blocks(paths, {_owner(own[0], where) for own in names if own[0] not in shared})
    layers = LayerMap(
        blocks=paths,
        ends=tuple(end_names),
        frozen=tuple(name for name in outside if name not in set(trained)),
        embedding=canonical.get(f"{_path_from(model, 'get_input_embeddings')}.weight"),
        head=canonical.get(f"{_path_from(model, 'get_output_embeddings') or find_score(model)}.weight"),
        tied=tuple((alias, own[0]) for own in names for alias in own[1:]),
    )
    if blocks is not None or _transformers_model(model) is not model:
        _warn_of_lists_in_ends(model, layers)
    return layers


def find_score(model: nn.Module) -> str | None:
    """Return the path of a classifier's or reward model's linear layer; None for any other model.

    It is the last module that a transformers model without output embeddings registers. PEFT may have put it
    beside a copy that trains.
    """
    if _transformers_model(model) is not model or _path_from(model, "get_output_embeddings") is not None:
        return None
    last = list(model.named_children())[-1:]
    linear = {name: getattr(module, "original_module", module) for name, module in last}
    return next((name for name, module in linear.items() if isinstance(module, nn.Linear)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or GPT-2's with a transposed weight (transformers' `Conv1D`)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def select_named(paths: Collection[str], names: Iterable[str], key: str) -> list[str]:
    """Return those paths of linear layers that end in one of `names`, in their order.

    Raises:
        ValueError: no path ends in a name; the message says `key` and the names that exist.
    """
    found = {name: [path for path in paths if f".{path}".endswith(f".{name}")] for name in names}
    for name, matching in found.items():
        if not matching:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise ValueError(f"{key} names {name!r}, but the blocks' linear layers are {known}")
    return [path for path in paths if any(path in matching for matching in found.values())]


def _warn_of_lists_in_ends(model: nn.Module, layers: LayerMap) -> None:
    """Warn of module lists without a block that hold two thirds of what the blocks do, such as a decoder."""
    lists = _outermost_lists(model)
    others = [
        path for path in lists if not any(f"{block}.".startswith(f"{path}.") for block in layers.blocks)
    ]
    ends = {name: p.numel() for name, p in layers.end_parameters(model).items()}
    of_others = sum(size for name, size in ends.items() if name.startswith(tuple(f"{p}." for p in others)))
    of_blocks = sum(p.numel() for block in layers.block_parameters(model) for p in block.values())
    if 3 * of_others > 2 * of_blocks:
        share = of_others / (of_blocks + sum(ends.values()))
        warnings.warn(
            f"{share:.0%} of what trains is in {' and '.join(others)}, "
            f"which are ends here and train in every step; for fewer, {_advise_blocks(lists)}",
            stacklevel=3,
        )


def _advise_blocks(lists: dict[str, _List]) -> str:
    """Say how the children of several module lists become blocks."""
    paths = list(lists)
    names = f'"{paths[0]}.0", …, "{paths[-1]}.{len(lists[paths[-1]]) - 1}"'
    return f"take the children of all: find_layers(model, blocks=[{names}])"


def _find_blocks(model: nn.Module) -> tuple[str, ...]:
    config = _config(model)
    if config is None:
        depth, wanted = None, "a model without a config"
    elif getattr(config, "is_encoder_decoder", False):
        # Its num_hidden_layers is the encoder's alone: the decoder would count as ends.
        depth, wanted = None, "an encoder-decoder"
    else:
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
        wanted = f"num_hidden_layers={depth}"
    lists = _outermost_lists(model)
    if config is None and len(lists) > 1 and (named := _lists_named_blocks(model, lists)):
        return tuple(f"{path}.{child}" for path in named for child, _ in lists[path].named_children())
    fitting = {path: module for path, module in lists.items() if len(module) == depth}
    if depth is None and len(lists) == 1 and not getattr(config, "is_encoder_decoder", False):
        fitting = {path: module for path, module in lists.items() if len(module) > 1}
    embedding = _path_from(model, "get_input_embeddings")
    if len(fitting) > 1 and embedding is not None:
        # A vision tower can be as deep as the language model: the text embedding tells them apart.
        near = {path: _common_depth(path, embedding) for path in fitting}
        fitting = {path: fitting[path] for path in fitting if near[path] == max(near.values())}
    if len(fitting) != 1:
        known = ", ".join(f"{path} ({len(module)} modules)" for path, module in lists.items()) or "none"
        several = f"; or {_advise_blocks(lists)}" if depth is None and len(lists) > 1 else ""
        raise ValueError(
            f"cannot tell which module list holds the blocks of {type(model).__name__} ({wanted}, "
            f"{len(fitting)} fit); candidates: {known}. "
            f'Name one: find_layers(model, blocks="PATH"){several}; pass the result as LISA(..., layers=...)'
        )
    ((path, module),) = fitting.items()
    return tuple(f"{path}.{child}" for child, _ in module.named_children())


def _lists_named_blocks(model: nn.Module, lists: dict[str, _List]) -> list[str]:
    """Return the lists whose names end in `blocks`, in order of registration: together they are the blocks.

    A UNet has a block beside its lists, between those that go down and those that go up. Its place is not
    known from the structure, so such a model is refused with the list to give.
    """
    named = [path for path in lists if path.endswith("blocks")]
    parents = {path.rpartition(".")[0] for path in named}
    between = [
        path
        for path, module in model.named_modules()
        if path.endswith("block")
        and path.rpartition(".")[0] in parents
        and any(True for _ in module.parameters())
    ]
    if named and between:
        children = [[f"{path}.{child}" for child, _ in lists[path].named_children()] for path in named]
        order = [*(path for each in children[:-1] for path in each), *between, *children[-1]]
        text = ", ".join(f'"{path}"' for path in order)
        raise ValueError(
            f"{type(model).__name__} has {' and '.join(between)} beside {' and '.join(named)}, and their "
            f"order is not known from the structure; give it, nearest the input first: "
            f"find_layers(model, blocks=[{text}]); pass the result as LISA(..., layers=...)"
        )
    return named


def _given_blocks(model: nn.Module, blocks: str | Sequence[str]) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    wanted = [blocks] if isinstance(blocks, str) else list(blocks)
    for path in wanted:
        if path not in modules:
            known = ", ".join(_outermost_lists(model)) or "none"
            raise ValueError(f"the model has no module {path!r}; its module lists: {known}")
    if isinstance(blocks, str):
        wanted = [f"{blocks}.{child}".lstrip(".") for child, _ in modules[blocks].named_children()]
    if not wanted:
        raise ValueError(f"the module {blocks!r} has no children to be used as blocks")
    return tuple(wanted)


def _refuse_empty_blocks(paths: Sequence[str], owners: set[int | None]) -> None:
    empty = [path for index, path in enumerate(paths) if index not in owners]
    if empty:
        raise ValueError(
            f"block {empty[0]!r} has no parameter of its own and could never train; "
            f"leave it out of `blocks`, and name no block twice"
        )


def _outermost_lists(model: nn.Module) -> dict[str, _List]:
    lists: dict[str, _List] = {}
    for path, module in model.named_modules():
        inside_another = any(path.startswith(f"{outer}.") for outer in lists)
        numbered = isinstance(module, nn.ModuleDict) and all(key.isdecimal() for key in module)
        if (isinstance(module, nn.ModuleList) or numbered) and len(module) > 0 and not inside_another:
            lists[path] = module
    return lists


def _language_model_part(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Paths of what belongs to the language model: itself, its head, and what a wrapper adds.

    The language model is the smallest module that holds the blocks and the text embedding. The head is the
    output embedding, or without one (classifiers) what the model registers after its language model.
    """
    inner: Any = _transformers_model(model)
    around = next(
        path.split(".") if path else [] for path, module in model.named_modules() if module is inner
    )
    embedding = _path_from(model, "get_input_embeddings")
    shared = _common_depth(blocks[0], embedding or blocks[0])
    decoder = blocks[0].split(".")[: max(shared, len(around) + 1)]
    head = _path_from(model, "get_output_embeddings")
    if head is not None:
        heads = [head]
    else:
        children = [name for name, child in inner.named_children() if any(True for _ in child.parameters())]
        after = children[children.index(decoder[len(around)]) + 1 :]
        heads = [".".join([*around, name]) for name in after]
    own = set(inner.parameters())
    return [".".join(decoder), *heads, *(name for name, p in model.named_parameters() if p not in own)]


def _below(names: Sequence[Sequence[str]], outside: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Parameters outside the blocks that are at one of `paths`, or below it, under any of their names."""
    found: set[str] = set()
    for path in paths:
        there = {own[0] for own in names if any(f"{name}.".startswith(f"{path}.") for name in own)}
        if not there & set(outside):
            raise ValueError(
                f"{path!r} names no parameter outside the blocks; "
                f"`ends` takes module paths and parameter names as in model.named_parameters()"
            )
        found |= there
    return [name for name in outside if name in found]


def _names_by_parameter(model: nn.Module) -> list[list[str]]:
    """All names of each parameter, the one `named_parameters()` uses first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _owner(name: str, where: dict[str, int]) -> int | None:
    """Index of the block that a parameter's name lies in."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((where[path] for path in paths if path in where), None)


def _config(model: nn.Module) -> Any | None:
    """The Hugging Face config of the model, or of the one that it wraps."""
    return getattr(_transformers_model(model), "config", None)


def _transformers_model(model: nn.Module) -> Any | None:
    """The model itself if it is Hugging Face's, else the only such model in it."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside_another = any(path.startswith(f"{outer}.".lstrip(".")) for outer in found)
        tells = hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings")
        if tells and hasattr(getattr(module, "config", None), "get_text_config") and not inside_another:
            found[path] = module
    return next(iter(found.values())) if len(found) == 1 else None


def _has_towers(model: nn.Module) -> bool:
    """Whether the language model is only a part: its config is then a part of the model's config."""
    config = _config(model)
    return config is not None and config.get_text_config() is not config


def _path_from(model: nn.Module, getter: str) -> str | None:
    """Path of the module that a Hugging Face model's `get_…_embeddings` returns."""
    inner = _transformers_model(model)
    try:
        wanted = None if inner is None else getattr(inner, getter)()
    except NotImplementedError:  # transformers cannot tell: speech models, models of one's own
        return None
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _common_depth(path: str, other: str) -> int:
    """How many leading parts two module paths share."""
    depth = 0
    for mine, theirs in zip(path.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        depth += 1
    return depth
