"""What LISA refuses or warns of: when it is attached to a model and an optimizer, at a step, and on resume.

Longer than 400 lines: whoever looks for a refusal finds it here, and each of them is short.
"""

import gc
import operator
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import is_sharded
from lisatune.lisa.moved_share import rounds_to_nearest
from lisatune.nn.blocks import is_compiled_whole
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW

__all__ = [
    "as_whole",
    "check_kinds",
    "check_layers",
    "check_parameters",
    "is_copied",
    "refuse_compiled_blocks",
    "refuse_first_fsdp",
    "refuse_frozen",
    "refuse_reordered",
    "refuse_replaced",
    "refuse_second",
    "unwrap_ddp",
    "unwrap_optimizer",
    "warn_of_compiling",
    "warn_of_early_state",
    "warn_of_rounding",
    "warn_of_untrained_blocks",
]


def as_whole(name: str, value: Any) -> int:
    """Return a whole number, NumPy's too, as int; ValueError if the argument is something else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def check_kinds(model: Any, layers: Any, masters: Any) -> None:
    """Refuse a name or a path in the place of what it names.

    Raises:
        TypeError: the model is no module, `layers` no `LayerMap`, or `masters` a folder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}; load it first")
    if not isinstance(layers, LayerMap | None):
        raise TypeError(
            f"layers must be what find_layers(model) returns, got {layers!r}; to name the blocks write "
            'layers=find_layers(model, blocks="model.layers")'
        )
    if isinstance(masters, str | os.PathLike):
        raise TypeError(
            f"masters must be a store of weights, got {masters!r}; to keep them in this folder write "
            f'masters=lisatune.DiskMasters("{os.fspath(masters)}")'
        )


def check_layers(layers: LayerMap, model: nn.Module) -> None:
    """Refuse blocks and ends that are not those of a model as it is now.

    Raises:
        ValueError: the model has not what they name, or a parameter that trains and that they leave out.
    """
    named = dict(model.named_parameters())
    modules = {path for path, _ in model.named_modules()}
    unknown = [name for name in (*layers.ends, *layers.frozen) if name not in named]
    unknown += [path for path in layers.blocks if path not in modules]
    if unknown:
        raise ValueError(
            f"layers names {unknown[0]!r}, which {type(model).__name__} does not have; make them from the "
            "model as it is now: layers=find_layers(model)"
        )
    known = {*layers.ends, *layers.frozen}.union(*layers.block_parameters(model))
    if left_out := [name for name, p in named.items() if p.requires_grad and name not in known]:
        raise ValueError(
            f"parameter {left_out[0]!r} is in no block, end or frozen part of layers, so it would train in "
            "every step and nobody would know; name it in ends, or call requires_grad_(False) on it"
        )


def unwrap_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside Accelerate's wrapper.

    Raises:
        TypeError: it is no torch optimizer, or LBFGS, or the model or optimizer is DeepSpeed's.
        ValueError: the optimizer updates in backward, and a loss scaler is in use.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for each in (model, optimizer, inner):
        if type(each).__module__.startswith("deepspeed"):
            raise TypeError(
                "LISA cannot work with DeepSpeed, which fixes the trained parameters when its engine starts: "
                "later blocks would silently never train; use one device or torch's FSDP2"
            )
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(inner, LBFGS):
        raise TypeError(
            "LISA cannot work with LBFGS, which steps all weights along one direction found from earlier "
            "gradients, so frozen blocks would move too; use an optimizer that updates each parameter on its "
            "own, such as AdamW"
        )
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and isinstance(inner, AdamW) and inner.in_backward is not None:
        raise ValueError(
            f"update in backward cannot work with a loss scaler ({type(scaler).__name__}, fp16), because "
            "gradients are still scaled then; train in bf16, or update in step()"
        )
    return inner


def refuse_first_fsdp(model: nn.Module) -> None:
    """Refuse a model that torch's older FullyShardedDataParallel has divided among ranks.

    Its parameters are pieces of one flat tensor, of which each rank would train its own as if it were whole.

    Raises:
        TypeError: a part of the model is wrapped, and there are several ranks.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # no model is wrapped before it is imported
    if ranks.count() == 1 or fsdp is None:
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "LISA cannot work with FullyShardedDataParallel (FSDP1), which flattens and divides parameters; "
            "use torch's fully_shard, which is FSDP2 (fsdp_version 2 in Accelerate and HF Trainer)"
        )


def refuse_second(model: nn.Module, optimizer: Optimizer, attached: Collection[Optimizer]) -> None:
    """Refuse a model or an optimizer that another LISA already drives.

    Args:
        model, optimizer: what a new LISA is about to be attached to.
        attached: the optimizers to which a LISA is attached now.

    Raises:
        RuntimeError: one of them is this optimizer, or holds parameters of this model.
    """
    if optimizer in attached:
        raise RuntimeError("a LISA is already attached to this optimizer; call its detach() first")
    mine = set(model.parameters())
    if not _find_holder(mine, attached):
        return
    gc.collect()  # a LISA that nobody holds any more waits for this in a circle with its optimizer
    if (other := _find_holder(mine, attached)) is not None:
        raise RuntimeError(
            f"a LISA is already attached to this model by another optimizer ({type(other).__name__}), and "
            "two would freeze each other's blocks; call detach() of the first one before you attach a second"
        )


def _find_holder(parameters: set[nn.Parameter], optimizers: Collection[Optimizer]) -> Optimizer | None:
    """Return an optimizer that holds one of the parameters."""
    for optimizer in tuple(optimizers):
        if any(not parameters.isdisjoint(group["params"]) for group in optimizer.param_groups):
            return optimizer
    return None


def check_parameters(layers: LayerMap, model: nn.Module, optimizer: Optimizer) -> None:
    """Check that everything that will ever train is in the optimizer and able to train.

    A parameter that does not require grad never trains, and a warning names it.

    Raises:
        ValueError: one is not; or the model has adapters, or a block in which nothing requires grad.
    """
    _refuse_adapters(model)
    ends, blocks = layers.end_parameters(model), layers.block_parameters(model)
    named = {name: p for layer in (ends, *blocks) for name, p in layer.items()}
    for name, parameter in named.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype} and cannot train; load unquantised weights"
            )
    frozen = [name for name, p in named.items() if not p.requires_grad]
    trained = {name: p for name, p in named.items() if p.requires_grad}
    _refuse_missing(ends.keys() & trained.keys(), trained, optimizer)
    for index, block in enumerate(blocks):
        if not any(p.requires_grad for p in block.values()):
            raise ValueError(
                f"nothing in block {index} requires grad, so it would never train; build the optimizer over "
                "model.parameters() and attach LISA before anything is frozen, and detach() an earlier LISA; "
                "in a copy of a model that LISA trains, call requires_grad_(True) first"
            )
    if frozen:
        more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
        warnings.warn(
            f"{', '.join(frozen[:3])}{more} did not require grad when LISA was attached and will never train",
            stacklevel=3,
        )


def _refuse_missing(ends: set[str], trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Refuse an optimizer that lacks parameters, and say what kind of optimizer it seems to be.

    Args:
        ends: names of the ends among `trained`.
        trained: all parameters that will ever train, by name.
        optimizer: what should hold them.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = {name: p for name, p in trained.items() if p not in held}
    if not missing:
        return
    kind = type(optimizer).__name__
    more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
    what = f"parameter {next(iter(missing))!r}{more} not in the optimizer"
    if all(p.ndim == 2 for p in held) and all(p.ndim != 2 for p in missing.values()):
        raise ValueError(
            f"{what}, because {kind} holds matrices alone; LISA needs one optimizer over all that trains: "
            "use lisatune.AdamW, which takes vectors too, or freeze them with requires_grad_(False)"
        )
    if missing.keys() >= ends or missing.keys() >= trained.keys() - ends:
        lost = "embedding, head and norm" if missing.keys() >= ends else "the blocks"
        raise ValueError(
            f"{what}, as if a second optimizer held {lost}; "
            "LISA needs one optimizer over the whole model: instead of two optimizers use param groups, each "
            "with its own lr (lisatune.build_adamw has ends_lr)"
        )
    raise ValueError(
        f"{what}, so it would never train; build the optimizer over model.parameters() before anything is "
        "frozen, and attach LISA after that"
    )


def _refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with PEFT's adapters."""
    peft = sys.modules.get("peft")  # a model has adapters only if PEFT has been imported
    if peft is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, peft.PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "the model has PEFT's adapters: LISA would train the weights beside them, and save_pretrained "
            "saves the adapters alone; attach LISA to a model without adapters, or train the adapters alone"
        )


def warn_of_rounding(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn if weights of 16 bits are updated by an optimizer that rounds to nearest.

    At the learning rates of fine-tuning, most updates of a bf16 weight are smaller than half of its spacing,
    so the weight stands still (docs/optimizers.md).
    """
    narrow = {p.dtype for p in model.parameters() if p.requires_grad and p.element_size() == 2}
    if narrow and rounds_to_nearest(optimizer):
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        warnings.warn(
            f"the weights are {dtypes} and {type(optimizer).__name__} rounds each update to nearest, so at a "
            "small learning rate most weights never move; use lisatune.AdamW, whose updates are exact, or "
            "load the model with dtype=torch.float32",
            stacklevel=3,
        )


def warn_of_early_state(
    optimizer: Optimizer, ends: Iterable[nn.Parameter], blocks: Sequence[Iterable[nn.Parameter]]
) -> None:
    """Warn if an optimizer looks as if a state that LISA saved had been loaded before LISA is attached.

    torch drops LISA's position then, so LISA begins with its first period, and the run is another one.

    Args:
        optimizer: to which no LISA was attached before.
        ends: parameters outside the blocks that may train.
        blocks: parameters of each block that train when it is drawn.
    """
    has_state = [any(p in optimizer.state for p in block) for block in blocks]
    if not all(has_state) and (any(has_state) or any(p in optimizer.state for p in ends)):
        warnings.warn(
            f"the optimizer has state already, but of {sum(has_state)} of {len(blocks)} blocks only; if LISA "
            "saved it, load it after LISA is attached, or LISA begins with its first period again",
            stacklevel=3,
        )


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel; any other as it is."""
    inside: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inside


def is_copied(model: nn.Module) -> bool:
    """Whether each of several ranks holds the whole model, so that gradients must be exchanged.

    Raises:
        RuntimeError: torch's `fully_shard` has divided a part of the model.
    """
    if ranks.count() == 1:
        return False
    parts = [is_sharded(p) for p in model.parameters() if not p.is_meta]
    if any(parts) and not all(parts):
        raise RuntimeError(
            "fully_shard has divided a part of the model among the ranks, and LISA needs all of it or "
            "nothing; call fully_shard on the model too, after its blocks, and build the optimizer then"
        )
    return bool(parts) and not any(parts) and ranks.has_others()


def warn_of_untrained_blocks(
    chances: Sequence[float], visits: Sequence[int], total_steps: int, period: int, word: str = "block"
) -> None:
    """Warn of blocks or units that could be drawn, and will not be in a run of `total_steps`.

    Args:
        chances: of each block to train in a period.
        visits: in how many periods of the run each block will train.
        total_steps, period: of the run, in optimizer steps.
        word: what they are called.
    """
    never = [i for i, count in enumerate(visits) if count == 0 and chances[i] > 0]
    often = "" if period == 1 else " draw more often,"
    if never and any(visits):
        warnings.warn(
            f"{len(never)} of {len(visits)} {word}s will never train in {total_steps} "
            f"step{'' if total_steps == 1 else 's'} with period={period}: {', '.join(map(str, never))}; "
            f"train longer,{often} or let more train at a time",
            stacklevel=3,
        )


def refuse_replaced(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse a model that holds other parameters than when LISA was attached.

    The optimizer would train the old ones, which the model no longer reads, and nothing the new ones. Weights
    that are divided among ranks are left out: the parameters of a module change with every forward pass.

    Args:
        model: the model.
        named: the parameters that LISA drives, by name.

    Raises:
        RuntimeError: one of them is gone.
    """
    present = set(model.parameters())
    gone = [name for name, p in named.items() if p not in present]
    if gone and not any(is_sharded(p) for p in (*present, *named.values())):
        more = f" and {len(gone) - 1} more were" if len(gone) > 1 else " was"
        raise RuntimeError(
            f"parameter {gone[0]!r}{more} replaced in the model after LISA was attached (as "
            "resize_token_embeddings and load_state_dict(assign=True) do), so nothing trains the new one; "
            "change the model first, then build the optimizer, then attach LISA"
        )


def refuse_frozen(moving: Iterable[nn.Parameter], named: Mapping[str, nn.Parameter]) -> None:
    """Refuse a step if something has frozen a parameter that trains in this period.

    LISA would thaw it at a later draw, and whoever froze it would never know.

    Args:
        moving: what trains in this period.
        named: the parameters that LISA drives, by name.

    Raises:
        RuntimeError: one of them does not require grad.
    """
    frozen = {p for p in moving if not p.requires_grad}
    if frozen:
        names = [name for name, p in named.items() if p in frozen]
        more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
        raise RuntimeError(
            f"parameter {names[0]!r}{more} frozen after LISA was attached, and LISA would thaw it at a later "
            "draw; call requires_grad_(False) before you attach LISA, which then leaves it frozen, or use "
            'LISA\'s ends="head" (no embedding) or "frozen"'
        )


def refuse_reordered(saved: Sequence[str], now: Sequence[str]) -> None:
    """Refuse an optimizer state that was saved with the same parameters in another order.

    torch numbers parameters in a state, so their moments would go to other weights, and nothing would fail.

    Args:
        saved, now: names of all parameters of the optimizer, in its order.

    Raises:
        ValueError: they are the same names in another order.
    """
    if sorted(saved) != sorted(now):  # of another model, or renamed
        return
    for was, is_now in zip(saved, now, strict=True):
        if was != is_now:
            raise ValueError(
                f"this optimizer state was saved with the parameters in another order ({was!r} was where "
                f"{is_now!r} is), and torch loads by order, so moments would go to other weights; build the "
                "optimizer over the parameters, and its groups, in the order that they had then"
            )


def refuse_compiled_blocks(model: nn.Module) -> None:
    """Refuse blocks that are compiled, if their modules are drawn one by one: each draw would compile anew.

    Raises:
        ValueError: a block is compiled.
    """
    ways = [vars(module)["_block_forward"] for module in model.modules() if "_block_forward" in vars(module)]
    if any(way.compiled for way in ways):
        raise ValueError(
            "blocks are compiled as a whole, frozen or active, and unit module trains parts of them, so each "
            "draw would compile anew; do not compile, or use unit block"
        )


def warn_of_compiling(model: nn.Module) -> bool:
    """Warn if torch.compile has taken the whole model, and tell whether it has."""
    compiled = is_compiled_whole(model)
    if compiled:
        warnings.warn(
            "torch.compile has compiled the whole model, so each draw of LISA compiles it again, and after a "
            "few draws it runs uncompiled; call lisatune.compile_blocks(model) in place of torch.compile",
            stacklevel=3,
        )
    return compiled
