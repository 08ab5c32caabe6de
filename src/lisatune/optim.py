"""AdamW over the layers of a model, and what LISA asks of an optimizer.

Param groups are built once, ends first, then one per block, and never replaced: learning-rate schedules
and sharding hold on to them. A group whose block is frozen costs nothing, since none of its parameters
has a gradient.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.adamw import AdamW
from lisatune.adamw_state import is_host_state
from lisatune.ends import ROW_OPTIONS, EndsPolicy, row_embedding
from lisatune.layers import LayerMap
from lisatune.memory import tensors_bytes
from lisatune.recipe import OptimizerConfig
from lisatune.shards import is_sharded, local_part

__all__ = [
    "StateMeter",
    "build_adamw",
    "build_optimizer",
    "check_parameters",
    "groups_by_block",
    "host_state",
    "optimizer_over",
    "param_groups",
    "plain_optimizer",
    "state_bytes",
    "state_elements",
    "translate_group",
]

OURS = frozenset(("rounding", "moments", "state_device", "rows", "seed", "steps_done"))
"""Options of a param group that `lisatune.AdamW` has and torch's lacks."""
TORCHS = frozenset(
    ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
)
"""The reverse."""

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def param_groups(
    model: nn.Module,
    layers: LayerMap,
    *,
    weight_decay: float = 0.0,
    ends: str | EndsPolicy | None = None,
    ends_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Build the param groups of the ends and of each block.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        weight_decay: of the groups that are decayed.
        ends: policy of the ends (`lisatune.ends`); the state formats in it become options of their groups,
            which `lisatune.AdamW` reads. With `rows` the embedding has a group of its own.
        ends_lr: learning rate of the ends' groups; None leaves the optimizer's.

    With weight decay each layer has a second group, with `weight_decay` 0, for norms, biases and
    embeddings: all parameters of fewer than two dimensions and all weights of `nn.Embedding`.

    Returns:
        Dicts with `params` as (name, parameter) pairs, `weight_decay`, and `layer`: "ends" or "block 7";
        those of the ends with `lr` where `ends_lr` is given.

    Raises:
        ValueError: `rows` for an embedding that is unknown, frozen or tied.
    """
    policy = EndsPolicy.parse(ends or "train")
    of_rows = {id(row_embedding(model, layers).weight)} if policy.rows else set()
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
    """Build AdamW over ends and blocks, with the fused kernel where the device has one.

    `ends_lr` is the learning rate of embedding, head and final norm where it is not `lr`.
    """
    groups = param_groups(model, layers, weight_decay=weight_decay, ends_lr=ends_lr)
    return _fused_adamw(groups, lr, betas, eps, weight_decay)


def build_optimizer(
    model: nn.Module, layers: LayerMap, config: OptimizerConfig, *, ends: str | EndsPolicy = "train"
) -> Optimizer:
    """Build AdamW over ends and blocks, one param group per layer, as a recipe asks.

    torch's fused AdamW where weights are wide, moments float32 and updates made in `step()`; else
    `lisatune.AdamW`.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        config: the recipe's section.
        ends: policy of the ends, whose state formats their groups take; see `lisatune.ends`.
    """
    groups = param_groups(model, layers, weight_decay=config.weight_decay, ends=ends, ends_lr=config.ends_lr)
    return optimizer_over(groups, config)


def optimizer_over(
    groups: list[dict[str, Any]], config: OptimizerConfig, kind: type[AdamW] = AdamW
) -> Optimizer:
    """Build AdamW over param groups of (name, parameter) pairs as a recipe asks; see `build_optimizer`.

    A `kind` of its own is never replaced by torch's.
    """
    parameters = [p for group in groups for _, p in group["params"]]
    # torch's fused kernel takes no parameters that are divided among ranks; ours updates each rank's part.
    is_wide = all(p.dtype in (torch.float32, torch.float64) and not is_sharded(p) for p in parameters)
    is_plain = config.moments == "fp32" and config.state_device is None and not config.in_backward
    is_compact = any({"moments", "state_device", "rows"} & group.keys() for group in groups)
    if is_wide and is_plain and not is_compact and kind is AdamW:
        return _fused_adamw(groups, config.lr, config.betas, config.eps, config.weight_decay)
    optimizer = kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        rounding=config.rounding,
        moments=config.moments,
        state_device=config.state_device,
    )
    if config.in_backward:
        optimizer.update_in_backward()
    return optimizer


def _fused_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    fused = all(p.device.type in FUSED_DEVICES for group in groups for _, p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of all tensors in the optimizer's state, each parameter's step counter included."""
    return _bytes_of(optimizer.state.values())


def state_elements(optimizer: Optimizer) -> int:
    """Count the elements of the state that is shaped like its parameter or its rows: AdamW's two moments.

    Those of a projected gradient count as they are, without its basis. The remainder of a bf16 weight is a
    part of the weight.
    """
    lasting = optimizer.lasting_state if isinstance(optimizer, AdamW) else ()
    return sum(
        value.numel()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and (
            value.shape == local_part(parameter).shape
            or (value.ndim == 2 and ("row_ids" in state or ("basis" in state and key != "basis")))
        )
        and key not in lasting
    )


class StateMeter:
    """Measures the optimizer's state after every step, before a draw can release any of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.bytes = 0
        self.elements = 0
        optimizer.register_step_post_hook(self._measure)

    def _measure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.bytes, self.elements = state_bytes(optimizer), state_elements(optimizer)


def host_state(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the state that `state_device: cpu` keeps in host memory, also where that is the only memory."""
    if not isinstance(optimizer, AdamW):
        return []
    return [
        value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
        if is_host_state(group, key)
    ]


def translate_group(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Make a param group that torch's AdamW saved one of ours, and the reverse: their state is the same.

    A run on several ranks always uses ours, one on a single rank may use torch's. Options that only one of
    them has are those of now. Any other group comes back as it is.
    """
    for mine, theirs in ((OURS, TORCHS), (TORCHS, OURS)):
        if mine <= now.keys() and theirs <= saved.keys() and not mine & saved.keys():
            shared = {key: value for key, value in saved.items() if key not in theirs}
            return shared | {key: now[key] for key in mine}
    return saved


def plain_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside Accelerate's wrapper; refuse what can't work."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for each in (model, optimizer, inner):
        if type(each).__module__.startswith("deepspeed"):
            raise TypeError(
                "LISA can't work with DeepSpeed: it fixes the trained parameters when its engine starts, so "
                "later blocks would silently never train; use one device or torch's FSDP2"
            )
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and isinstance(inner, AdamW) and inner.in_backward is not None:
        raise ValueError(
            f"update in backward can't work with a loss scaler ({type(scaler).__name__}, fp16): weights "
            "would move by gradients that are still scaled; train in bf16, or update in step()"
        )
    return inner


def check_parameters(layers: LayerMap, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError unless everything that will ever train is in the optimizer and able to train."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = dict(layers.end_parameters(model))
    for block in layers.block_parameters(model):
        wanted |= block
    for name, parameter in wanted.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype} and can't train; load unquantised weights"
            )
        if id(parameter) not in held:
            raise ValueError(
                f"parameter {name!r} is not in the optimizer, so it would never train; build the optimizer "
                f"over model.parameters() before anything is frozen, and attach LISA after that"
            )


def groups_by_block(
    optimizer: Optimizer, blocks: Sequence[tuple[nn.Parameter, ...]], ends: tuple[nn.Parameter, ...]
) -> list[list[dict[str, Any]]]:
    """Return each block's param groups, which must hold nothing else for their lr to be ramped."""
    owner = {p: index for index, block in enumerate(blocks) for p in block} | dict.fromkeys(ends, -1)
    groups: list[list[dict[str, Any]]] = [[] for _ in blocks]
    for group in optimizer.param_groups:
        if group["lr"] is None:
            raise ValueError(
                f"warmup needs a learning rate to ramp, and {type(optimizer).__name__} has lr=None; "
                f"give it one, or set warmup=0"
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


def _bytes_of(states: Iterable[dict[str, Any]]) -> int:
    return tensors_bytes(v for state in states for v in state.values() if isinstance(v, torch.Tensor))
