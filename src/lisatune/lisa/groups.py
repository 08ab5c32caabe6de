"""The optimizer's param groups, one per layer: how they are built, and their learning rates.

A block's learning rate follows from its chance to train. A block that trains in a share π of the steps moves
less far at the same learning rate than one that always trains. Where the noise of gradients decides how large
a rate may be, that of Adam goes with the square root of the data behind an update (Malladi et al., On the
SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022). A block sees a share π of the data, and 1/√π
makes up for it. One rate, that of full fine-tuning, then serves every γ; π = 1 changes nothing. Measured in
docs/results.md.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.lisa.ends import ROW_OPTIONS, EndsPolicy, find_row_embedding
from lisatune.nn.layers import LayerMap

__all__ = [
    "Scaling",
    "Warmup",
    "build_adamw",
    "build_fused_adamw",
    "compute_lr_factors",
    "find_block_groups",
    "param_groups",
    "scale_block_lr",
]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

Scaling = Literal["sqrt", "inverse", "none"]

POWER: dict[Scaling, float] = {"sqrt": -0.5, "inverse": -1.0, "none": 0.0}


def param_groups(
    model: nn.Module,
    layers: LayerMap,
    *,
    weight_decay: float = 0.0,
    ends: str | EndsPolicy | None = None,
    ends_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Build the param groups of the ends and of each block.

    With weight decay each layer has a second group, with `weight_decay` 0, for norms, biases and embeddings:
    all parameters of fewer than two dimensions and all weights of `nn.Embedding`.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        weight_decay: of the groups that are decayed.
        ends: policy of the ends (`EndsPolicy`). Its state formats become options of their groups, which
            `lisatune.AdamW` reads. With `rows` the embedding has a group of its own.
        ends_lr: learning rate of the ends' groups; None uses the optimizer's.

    Returns:
        Dicts with `params` as (name, parameter) pairs, `weight_decay`, and `layer`: "ends" or "block 7";
        those of the ends also have `lr` if `ends_lr` is given.

    Raises:
        ValueError: `rows` for an embedding that is unknown, frozen or tied.
    """
    policy = EndsPolicy.parse(ends or "train")
    of_rows = {id(find_row_embedding(model, layers).weight)} if policy.rows else set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named_layers = [("ends", layers.end_parameters(model))]
    named_layers += [(f"block {i}", block) for i, block in enumerate(layers.block_parameters(model))]
    end_options = {} if ends_lr is None else {"lr": ends_lr}
    groups = []
    for layer, parameters in named_layers:
        undecayed = {name for name, p in parameters.items() if p.ndim < 2 or id(p) in embeddings}
        if weight_decay == 0:
            undecayed = set()
        for decay, names in ((weight_decay, parameters.keys() - undecayed), (0.0, undecayed)):
            options = policy.state_options() if layer == "ends" else {}
            shared = end_options if layer == "ends" else {}
            pairs = [(name, p) for name, p in parameters.items() if name in names]
            rows = [pair for pair in pairs if id(pair[1]) in of_rows]
            others = [pair for pair in pairs if id(pair[1]) not in of_rows]
            for chosen, own in ((rows, ROW_OPTIONS), (others, options)):
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "layer": layer, **shared, **own})
    return groups


def build_adamw(
    model: nn.Module,
    layers: LayerMap,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    ends_lr: float | None = None,
) -> torch.optim.AdamW:
    """Build torch's AdamW over ends and blocks, fused if the device has the kernel.

    `ends_lr` is the learning rate of embedding, head and final norm, if it is not `lr`.
    """
    groups = param_groups(model, layers, weight_decay=weight_decay, ends_lr=ends_lr)
    return build_fused_adamw(groups, lr, betas, eps, weight_decay)


def build_fused_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build torch's AdamW over groups of `param_groups`, fused if the device has the kernel.

    The kernel walks through memory as if weight, gradient and moments had one layout, so weights that are not
    contiguous do not get it.
    """
    parameters = [p for group in groups for _, p in group["params"]]
    fused = all(p.device.type in FUSED_DEVICES and p.is_contiguous() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def scale_block_lr(optimizer: Optimizer, chances: Sequence[float], scaling: Scaling = "sqrt") -> None:
    """Multiply the learning rate of each block's param groups by its factor; that of the ends stays.

    Call it once, before a schedule reads the rates.

    Args:
        optimizer: over groups of `param_groups`, as `build_adamw` makes it.
        chances: π of each block, 0 <= π <= 1: γ/N for all, or `Sampler.inclusion()`.
        scaling: the factor is 1/√π for `sqrt`, 1/π for `inverse`, 1 for `none`.

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
    for block, factor in enumerate(compute_lr_factors(chances, scaling)):
        for group in blocks[block]:
            group["lr"] = group["lr"] * factor  # not in place: groups may share one tensor


def compute_lr_factors(chances: Sequence[float], scaling: Scaling) -> tuple[float, ...]:
    """Return each block's factor, 1/√π, 1/π or 1; it is 1 for a block that never trains, π = 0."""
    return tuple(chance ** POWER[scaling] if chance > 0 else 1.0 for chance in chances)


class Warmup:
    """Ramps up the learning rates of layers that have just thawed: lr·i/(steps + 1) at step i of a period.

    Args:
        steps: steps of a period over which rates ramp up; 0 leaves all rates as they are.
        blocks: the parameters of each block.
        ends: the parameters of the ends that may thaw.
        resting: those of the ends that never train.
    """

    def __init__(
        self,
        steps: int,
        blocks: Sequence[tuple[nn.Parameter, ...]],
        ends: tuple[nn.Parameter, ...],
        resting: tuple[nn.Parameter, ...],
    ) -> None:
        self._steps, self._blocks, self._ends, self._resting = steps, blocks, ends, resting
        self._ramped: list[tuple[dict[str, Any], Any, Any]] = []

    def find_groups(self, optimizer: Optimizer) -> None:
        """Look up the layers' param groups, again after `load_state_dict` has replaced them.

        Raises:
            ValueError: a group mixes layers, or has no learning rate.
        """
        self._ramped = []
        if self._steps:
            self._of_block = find_block_groups(optimizer, self._blocks, (*self._ends, *self._resting))
            ends = set(self._ends)
            self._of_ends = [g for g in optimizer.param_groups if not ends.isdisjoint(g["params"])]

    def ramp(self, done: int, blocks: Iterable[int], *, with_ends: bool) -> None:
        """Lower the learning rates of thawed layers for one step; `restore` must follow it.

        Args:
            done: steps of the period that were made before.
            blocks: indices of the blocks that have thawed in this period.
            with_ends: whether the ends have thawed, too.
        """
        self.restore()  # a step that raised has left its ramp behind
        if done >= self._steps:
            return
        thawed = [group for block in blocks for group in self._of_block[block]]
        for group in [*thawed, *(self._of_ends if with_ends else ())]:
            ramped = group["lr"] * ((done + 1) / (self._steps + 1))
            self._ramped.append((group, group["lr"], ramped))
            group["lr"] = ramped

    def restore(self, _: Optimizer | None = None) -> None:
        """Give every group the learning rate that it had before `ramp`."""
        for group, lr, ramped in self._ramped:
            if group["lr"] is ramped:  # else a scheduler has set another rate after a step that raised
                group["lr"] = lr
        self._ramped = []


def find_block_groups(
    optimizer: Optimizer, blocks: Sequence[tuple[nn.Parameter, ...]], ends: tuple[nn.Parameter, ...]
) -> list[list[dict[str, Any]]]:
    """Return the param groups of each block, whose learning rates `Warmup` ramps.

    Raises:
        ValueError: a group mixes layers, or has no learning rate.
    """
    owner = {p: index for index, block in enumerate(blocks) for p in block} | dict.fromkeys(ends, -1)
    groups: list[list[dict[str, Any]]] = [[] for _ in blocks]
    for group in optimizer.param_groups:
        if group["lr"] is None:
            raise ValueError(
                f"warmup needs a learning rate to ramp, and {type(optimizer).__name__} has lr=None; "
                "give it one, or set warmup=0"
            )
        owners = {owner.get(p, -1) for p in group["params"]}
        if len(owners) > 1:
            raise ValueError(
                "warmup needs param groups that do not mix layers; build the optimizer from "
                "lisatune.param_groups(model, lisatune.find_layers(model))"
            )
        for index in owners - {-1}:
            groups[index].append(group)
    return groups
