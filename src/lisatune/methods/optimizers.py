"""The optimizers of recipes, by `optimizer.name`.

To add one: its file in `lisatune/optim` if it is our own, a function here that builds it from a recipe's
section, and its line in `OPTIMIZERS`. A name with a dot, such as `lion_pytorch.Lion`, is imported.

An optimizer must give a block that thaws a right first step. Those that count steps per param group do not
(`lisatune.lisa.group_state`), so each is tried on two small parameters before any weights load.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import has_values, is_sharded
from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.frozen_state import StatePolicy
from lisatune.lisa.group_state import GroupState
from lisatune.lisa.groups import build_fused_adamw, param_groups
from lisatune.nn.layers import LayerMap
from lisatune.nn.notices import silence_import_notices
from lisatune.optim.adamw import AdamW
from lisatune.optim.muon import MuonWithAdamW
from lisatune.optim.parts import on_parts, works_on_parts
from lisatune.optim.sophia import SophiaG
from lisatune.recipe import OptimizerConfig
from lisatune.recipe.values import unknown

__all__ = ["OPTIMIZERS", "build_from_groups", "build_optimizer", "check_name", "check_thaw"]

Groups = list[dict[str, Any]]
"""Param groups whose `params` are (name, parameter) pairs, as `lisatune.param_groups` returns them."""


def build_optimizer(
    model: nn.Module, layers: LayerMap, config: OptimizerConfig, *, ends: str | EndsPolicy = "train"
) -> Optimizer:
    """Build the recipe's optimizer over ends and blocks, one param group per layer.

    Args:
        model: everything that will ever train requires grad.
        layers: its blocks and ends.
        config: the recipe's section.
        ends: policy of the ends. Its state formats become options of their groups.

    Raises:
        ValueError: `config.name` is not in `OPTIMIZERS`.
    """
    groups = param_groups(model, layers, weight_decay=config.weight_decay, ends=ends, ends_lr=config.ends_lr)
    return build_from_groups(groups, config)


def build_from_groups(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build the recipe's optimizer over param groups; see `build_optimizer`.

    A group without `weight_decay` gets the recipe's.

    Raises:
        ValueError: there is no such optimizer, an option is not one of its own or out of range, or it cannot
            update weights of this dtype, or on several ranks.
        ImportError: its package is not installed.
    """
    check_name(config.name)
    groups = [{"weight_decay": config.weight_decay} | group for group in groups]
    if config.name == "adamw":
        return build_adamw(groups, config)
    narrow = {str(p.dtype).removeprefix("torch.") for g in groups for _, p in g["params"] if p.itemsize < 4}
    if narrow:
        raise ValueError(
            f"optimizer.name {config.name} would round its updates of {' and '.join(sorted(narrow))} weights "
            "to nearest, which loses most of them; use run.precision bf16-mixed or fp32, or optimizer.name "
            "adamw"
        )
    _refuse_keys_of_adamw(groups, config)
    try:
        optimizer = OPTIMIZERS.get(config.name, build_imported)(groups, config)
    except (TypeError, ValueError) as error:
        given = f" with optimizer.options {config.options}" if config.options else ""
        raise ValueError(f"optimizer.name {config.name} cannot be built{given}: {error}") from error
    if ranks.count() > 1:
        _check_parts(config)
    return optimizer


def _check_parts(config: OptimizerConfig) -> None:
    """Refuse an optimizer other than AdamW that cannot update divided parameters."""

    def build(named: list[tuple[str, nn.Parameter]]) -> Optimizer:
        return OPTIMIZERS.get(config.name, build_imported)([{"params": named, "layer": "block 0"}], config)

    why = ALONE.get(config.name)
    if config.moments != "fp32":
        why = f"a checkpoint cannot cut its moments in {config.moments}; set optimizer.moments: fp32"
    if why is None and not works_on_parts(build):
        why = "each of several ranks has rows of a matrix, and its step on them is not that on the whole"
    if why is not None:
        raise ValueError(f"optimizer.name {config.name} runs in one process only, because {why}; use adamw")


def check_name(name: str) -> None:
    """Refuse a name that is neither in `OPTIMIZERS` nor a module and a class.

    Raises:
        ValueError: names the nearest one.
    """
    if name not in OPTIMIZERS and "." not in name:
        raise ValueError(
            f"optimizer.name: {unknown('optimizer', name, OPTIMIZERS)}, or a class such as torch.optim.NAdam"
        )


def check_thaw(config: OptimizerConfig, state: StatePolicy) -> None:
    """Try whether a block that thaws late gets a right first step, on two small parameters.

    Args:
        config: the recipe's section.
        state: what is done with the state of a block that freezes.

    Raises:
        ValueError: its first step would be wrong, because the optimizer counts steps per param group; or the
            optimizer cannot make a step; or what `build_from_groups` raises.
    """
    if config.name == "adamw":
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        named = [("matrix", nn.Parameter(torch.randn(8, 4))), ("vector", nn.Parameter(torch.randn(4)))]
        if not has_values(named[0][1]):  # inside a memory plan, where nothing can be tried
            return
        optimizer = build_from_groups([{"params": named, "layer": "block 0"}], config)
        for _, p in named:
            p.grad = torch.randn_like(p)
    watch = GroupState(optimizer, state)
    watch.before_step(ends_period=False)
    try:
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"optimizer.name {config.name} cannot make a step from gradients: {error}"
        ) from error
    watch.after_step()


def build_adamw(groups: Groups, config: OptimizerConfig, kind: type[AdamW] = AdamW) -> Optimizer:
    """Build AdamW over param groups.

    With the default `kind` it is torch's fused AdamW, if weights are float32 or wider and not divided among
    ranks, moments are float32 with the weights, and updates happen in `step()`.

    Args:
        groups: param groups of (name, parameter) pairs.
        config: the recipe's section.
        kind: `lisatune.AdamW` or a subclass.
    """
    parameters = [p for group in groups for _, p in group["params"]]
    # torch's fused kernel takes no parameters that are divided among ranks; ours updates each rank's part.
    is_wide = all(p.dtype in (torch.float32, torch.float64) and not is_sharded(p) for p in parameters)
    is_plain = config.moments == "fp32" and config.state_device is None and not config.in_backward
    is_compact = any({"moments", "state_device", "rows"} & group.keys() for group in groups)
    if is_wide and is_plain and not is_compact and kind is AdamW:
        return build_fused_adamw(groups, config.lr, config.betas, config.eps, config.weight_decay)
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


def build_sgd(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build `torch.optim.SGD`, without momentum unless `optimizer.options` has it."""
    _refuse(config, "betas", "eps", "moments")
    return on_parts(torch.optim.SGD)(groups, lr=config.lr, **config.options)


def build_adafactor(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build `torch.optim.Adafactor`: the second moment as means of rows and columns, no first moment."""
    _refuse(config, "betas", "eps", "moments")
    return torch.optim.Adafactor(groups, config.lr, **config.options)


def build_muon(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build Muon for the matrices of blocks and adapters, and AdamW for embedding, head, norms and biases."""
    _refuse(config, "moments")
    divided: Groups = []
    for group in groups:
        of_ends = group.get("layer") == "ends"
        matrices = [pair for pair in group["params"] if pair[1].ndim == 2 and not of_ends]
        others = [pair for pair in group["params"] if pair[1].ndim != 2 or of_ends]
        divided += [group | {"params": matrices, "matrices": True}] if matrices else []
        divided += [group | {"params": others}] if others else []
    return MuonWithAdamW(
        divided,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        **config.options,
    )


def build_sophia(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build SophiaG; `optimizer.options` takes betas, rho and every."""
    _refuse(config, "betas", "eps", "moments")
    return SophiaG(groups, config.lr, **config.options)


def build_lion(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build bitsandbytes' Lion (Chen et al., arXiv 2302.06675)."""
    _refuse(config, "betas", "eps")
    return _build_bitsandbytes("Lion", groups, config)


def build_lamb(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build bitsandbytes' LAMB (You et al., arXiv 1904.00962)."""
    return _build_bitsandbytes("LAMB", groups, config, betas=config.betas, eps=config.eps)


def build_lars(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Build bitsandbytes' LARS (You et al., arXiv 1708.03888), with momentum 0.9."""
    _refuse(config, "betas", "eps")
    return _build_bitsandbytes("LARS", groups, config, momentum=0.9)


def build_imported(groups: Groups, config: OptimizerConfig) -> Optimizer:
    """Import a class by its full name, and build it with the learning rate and `optimizer.options`.

    Raises:
        ImportError: there is no such module.
        ValueError: the module has no such class, or it is no optimizer of torch.
    """
    module_name, _, class_name = config.name.rpartition(".")
    silence_import_notices()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"optimizer.name {config.name} needs the module {module_name}, which cannot be imported "
            f"({error}); install its package"
        ) from error
    kind = getattr(module, class_name, None)
    if kind is None or not _is_optimizer(kind):
        known = {name.lower(): name for name, each in vars(module).items() if _is_optimizer(each)}
        near = difflib.get_close_matches(class_name.lower(), known, n=1)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise ValueError(f"{module_name} has no torch.optim.Optimizer of the name {class_name}{hint}")
    _refuse(config, "betas", "eps", "moments")
    build: Callable[..., Optimizer] = on_parts(kind)
    return build(groups, lr=config.lr, **config.options)


def _is_optimizer(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Optimizer)


def _build_bitsandbytes(name: str, groups: Groups, config: OptimizerConfig, **own: Any) -> Optimizer:
    if config.moments not in ("fp32", "8bit"):
        raise ValueError(f"optimizer.moments {config.moments} belongs to adamw; use fp32 or 8bit")
    silence_import_notices()
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ImportError(
            f'optimizer.name {config.name} needs bitsandbytes: pip install "lisatune[train,8bit]"'
        ) from error
    kind = on_parts(getattr(optim, f"{name}8bit" if config.moments == "8bit" else name))
    has_shapes_only = not all(has_values(p) for group in groups for _, p in group["params"])
    built: Any = kind(groups, lr=config.lr, **own | config.options)
    if has_shapes_only:
        built.args.max_unorm = 0.0  # a plan's weights have no norm, whose place in the state is one number
    return cast(Optimizer, built)


def _refuse_keys_of_adamw(groups: Groups, config: OptimizerConfig) -> None:
    """Refuse what only `lisatune.AdamW` can do."""
    if any(group.get("rows") for group in groups):
        raise ValueError(
            "rows of embedding and head (method.ends rows, or model.new_tokens with frozen ends) train with "
            f"adamw alone, and optimizer.name is {config.name}; set it to adamw"
        )
    own = [group[key] for group in groups for key in ("moments", "state_device") if group.get(key)]
    if own:
        raise ValueError(
            f"method.ends {own[0]} belongs to adamw, and optimizer.name is {config.name}; leave it out"
        )
    for key, plain in (("state_device", None), ("in_backward", False)):
        if getattr(config, key) != plain:
            raise ValueError(
                f"optimizer.{key} {getattr(config, key)!r} belongs to adamw, and optimizer.name is "
                f"{config.name}; set it to {'null' if plain is None else 'false'}"
            )
    if config.rounding != "exact":
        raise ValueError(
            f"optimizer.rounding {config.rounding} belongs to adamw, and optimizer.name is {config.name}; "
            "leave it out"
        )


def _refuse(config: OptimizerConfig, *keys: str) -> None:
    """Refuse keys that an optimizer does not read, if they are not at their defaults."""
    for key in keys:
        default = getattr(OptimizerConfig, key)
        if getattr(config, key) != default:
            raise ValueError(
                f"{config.name} does not read optimizer.{key}; leave it out, or give the optimizer's own "
                "arguments in optimizer.options"
            )


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {
    "adamw": build_adamw,
    "adafactor": build_adafactor,
    "lamb": build_lamb,
    "lars": build_lars,
    "lion": build_lion,
    "muon": build_muon,
    "sgd": build_sgd,
    "sophia": build_sophia,
}

ALONE = {"sophia": "its pass with drawn labels reads logits of the whole model, which ranks divide"}
"""Optimizers that several ranks refuse though their step is elementwise, and why."""
