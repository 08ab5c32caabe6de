"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751, section 2.1), inside a model's blocks.

Attention and MLP of a block each end in a linear layer that projects back to the hidden size d. An adapter
takes that layer's output x, before it is added to the residual stream:

    x  ←  x + U f(D x + b) + c,      D [m, d],  b [m],  U [d, m],  c [d],  f = GELU (as in the authors' code)

D and U begin as N(0, 0.01²), cut off at two standard deviations, b and c as zeros: nearly the identity.
Because of f an adapter cannot be merged into a weight.

Shapes: d = hidden size, m = bottleneck size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from lisatune.nn.layers import find_layers, is_linear

__all__ = ["Bottleneck", "add_bottlenecks", "find_bottlenecks", "find_outputs", "find_tuned", "has_adapters"]

STD = 0.01


class Bottleneck(nn.Module):
    """An adapter of size m for vectors of size d, in float32; it computes in the dtype of its input.

    Args:
        hidden: d.
        size: m >= 1.
        device: where its parameters are. On the meta device they have no values.
    """

    def __init__(self, hidden: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(size, hidden, device=device))
        self.down_bias = nn.Parameter(torch.zeros(size, device=device))
        self.up = nn.Parameter(torch.zeros(hidden, size, device=device))
        self.up_bias = nn.Parameter(torch.zeros(hidden, device=device))
        for matrix in (self.down, self.up):
            nn.init.trunc_normal_(matrix, std=STD, a=-2 * STD, b=2 * STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + U f(D x + b) + c for x of shape [..., d]."""
        narrow = gelu(linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        return x + linear(narrow, self.up.to(x.dtype), self.up_bias.to(x.dtype))


def add_bottlenecks(model: nn.Module, size: int, outputs: Sequence[str]) -> None:
    """Put adapters after layers of a model, in place. They are the layers' children `bottleneck`.

    Args:
        model: any model.
        size: m.
        outputs: paths of linear layers, whose outputs get adapters; from `find_outputs`.
    """
    for path in outputs:
        layer: Any = model.get_submodule(path)
        layer.bottleneck = Bottleneck(_width(layer), size, layer.weight.device)
        layer.register_forward_hook(_adapt)


def _adapt(layer: Any, args: Any, out: Tensor) -> Tensor:
    adapted: Tensor = layer.bottleneck(out)
    return adapted


def find_outputs(model: nn.Module, names: Sequence[str] = ()) -> list[str]:
    """Find the layers that project attention and MLP of each block back to the hidden size.

    They are found by structure. Of the linear layers in one child of a block (attention, MLP; or of those
    that are children of the block themselves), it is the last that has d outputs.

    Args:
        model: may be on the meta device.
        names: last parts of their paths, such as `o_proj`, in place of the search.

    Raises:
        ValueError: a block has not exactly two such layers, or none of the names; the message has all names.
    """
    hidden = _hidden_size(model)
    found: list[str] = []
    for block in find_layers(model).blocks:
        inside = {
            path: layer
            for path, layer in model.get_submodule(block).named_modules(prefix=block)
            if is_linear(layer)
        }
        known = ", ".join(sorted({path.rpartition(".")[2] for path in inside}))
        if names:
            own = [path for path in inside if path.rpartition(".")[2] in names]
            if missing := sorted({*names} - {path.rpartition(".")[2] for path in own}):
                raise ValueError(f"{block} has no linear layer {missing[0]!r}; its linear layers are {known}")
            if narrow := [path for path in own if _width(inside[path]) != hidden]:
                raise ValueError(
                    f"{narrow[0]} has {_width(inside[narrow[0]])} outputs and the hidden size is {hidden}; "
                    f"name the layers that project back to it. The linear layers are {known}"
                )
        else:
            last: dict[str, str] = {}
            for path, layer in inside.items():
                first, _, rest = path.removeprefix(f"{block}.").partition(".")
                if _width(layer) == hidden:
                    last[first if rest else ""] = path
            own = list(last.values())
            in_lists = [path for path in own if any(p.isdigit() for p in path[len(block) :].split("."))]
            if len(own) != 2 or in_lists:  # a list holds experts
                raise ValueError(
                    f"{block} does not show which layers end its attention and its MLP; name them. Its "
                    f"linear layers are {known}"
                )
        found += own
    return found


def find_bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """Return a model's adapters by the path of the layer that they follow; empty if it has none."""
    return {
        path.removesuffix(".bottleneck"): module
        for path, module in model.named_modules()
        if isinstance(module, Bottleneck)
    }


def find_tuned(model: nn.Module, *, norms: bool) -> dict[str, nn.Parameter]:
    """Return what trains: the adapters, and with `norms` the layer norms of the blocks, by name.

    A norm's parameters are those of one dimension in a block that belong neither to a linear layer nor to an
    adapter.
    """
    tuned = {}
    for block in find_layers(model).blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            is_norm = not is_linear(module)
            for name, p in module.named_parameters(prefix=path, recurse=False):
                if isinstance(module, Bottleneck) or (norms and is_norm and p.ndim == 1):
                    tuned[name] = p
    return tuned


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of its own beside its weights, PEFT's or these: they alone are written."""
    return hasattr(model, "peft_config") or bool(find_bottlenecks(model))


def _hidden_size(model: Any) -> int:
    embedding: Tensor = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    return int(getattr(config, "hidden_size", embedding.shape[1]))


def _width(layer: Any) -> int:
    """Number of outputs of a linear layer; GPT-2's stores its weight transposed."""
    return int(layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight.shape[1])
