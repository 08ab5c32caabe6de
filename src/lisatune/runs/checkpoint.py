"""Checkpoints from which a run resumes bit for bit: safetensors and JSON, never a pickle.

    checkpoints/step-000012/
        weights.safetensors     parameters (tied ones once) and persistent buffers, by name, without those of
                                the base model that never change
        optimizer.safetensors   "PARAMETER//KEY": optimizer state, only of the parameters that have some
        other.safetensors       tensors that state.json refers to, such as RNG states
        state.json              param groups with parameter names, every other key of optimizer.state_dict(),
                                scheduler, RNGs, the caller's `extra`, and a hash of each weight left out
        manifest.json           size and sha256 of the files above

Several ranks write it together, each the rows that it holds, and nothing is gathered. In place of the first
two files each rank then has one of each (`lisatune.files.parts`), and index.json says which rows they hold.
Any number of ranks reads a checkpoint, whoever wrote it: each rank its own rows.

`begin_checkpoint` can copy all values to host memory first, so that the run trains on while they are written.

A folder is written under another name, synced and renamed, so a folder with its final name is complete.
Loading checks these files against the manifest, and opens no other file and never a link.

Values are checked although the files' hashes are: whoever edits a checkpoint together with its hashes gets an
error, not a run that fails in a later step (docs/reliability.md; tests/faults/test_fuzz.py).
"""

import json
import random
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lisatune.console import first_line
from lisatune.distributed.shards import holds_first_copy, local_part, reshard
from lisatune.files.copies import Files, copy_files, copy_size
from lisatune.files.parts import open_tensors
from lisatune.files.states import describe_states, read_states
from lisatune.files.tensors import check_storable, describe_tensors, named_weights, read_part
from lisatune.lisa.correction import find_correction
from lisatune.lisa.rates import MARK
from lisatune.nn.coded import coded_weights
from lisatune.optim.meter import restore_dtypes
from lisatune.runs.left_out import check_left_out, name_fixed
from lisatune.runs.manifest import DamagedCheckpointError, checkpoint_name, verify
from lisatune.runs.named_state import (
    MisfitError,
    check_kinds,
    check_same,
    from_json,
    from_names,
    to_json,
    to_names,
)
from lisatune.runs.together import CheckpointWriter

__all__ = [
    "begin_checkpoint",
    "copied_bytes",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "translate_group",
]

OURS = frozenset(("rounding", "moments", "state_device", "rows", "seed", "steps_done"))
"""Options of a param group that `lisatune.AdamW` has and torch's AdamW lacks."""

TORCHS = frozenset(
    ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
)
"""Options of a param group that torch's AdamW has and `lisatune.AdamW` lacks."""

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""Errors that a damaged or foreign file can raise while it is read."""


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint `folder/step-NNNNNN`; on several ranks every rank must call it.

    An earlier checkpoint of the same step is replaced once this one is complete.

    Args:
        folder: the run's folder of checkpoints, created if it is missing.
        step: optimizer steps done, >= 0.
        model: the model, which owns every parameter of the optimizer.
        optimizer: its `state_dict()` is saved, so hooks such as LISA's add their part.
        scheduler: learning-rate schedule.
        extra: whatever else the run needs to resume, such as its place in the data; JSON values, tuples and
            tensors.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written. Nothing is left behind, and earlier checkpoints are as they were.
        TypeError: a value is neither a plain tensor nor JSON.
        ValueError: the optimizer holds a parameter that the model does not own.

    Example:
        >>> path = save_checkpoint("checkpoints", step=12, model=model, optimizer=optimizer,
        ...                        extra={"batch": 48})
        >>> load_checkpoint(path, model=model, optimizer=optimizer)
        {'batch': 48}
    """
    writer = begin_checkpoint(
        folder, step=step, model=model, optimizer=optimizer, scheduler=scheduler, extra=extra
    )
    writer.write()
    writer.finish()
    return writer.target


def begin_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
    left_out: Mapping[str, int] | None = None,
    copies: bool = False,
) -> CheckpointWriter:
    """Take down what a checkpoint holds; `write` and `finish` of the result then write it.

    Args:
        folder, step, model, optimizer, scheduler, extra: as for `save_checkpoint`.
        left_out: from `hash_fixed`, weights that the checkpoint need not hold. The model that loads it must
            have them already.
        copies: copy the values to host memory, so that they may change before `write` ends. Parameters that
            the optimizer does not hold never change, and are not copied.

    Raises:
        OSError, TypeError, ValueError: as in `save_checkpoint`.
    """
    reshard(model)
    other = {
        "step": step,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": _rng_states(),
        "extra": dict(extra or {}),
    }
    state, files = _take_down(model, optimizer, other, left_out or {})
    for tensors in files.values():
        check_storable(tensors)
    files, wait = copy_files(files, name_fixed(model, optimizer)) if copies else (files, None)
    target, writes = Path(folder) / checkpoint_name(step), holds_first_copy(model.parameters())
    return CheckpointWriter(target, files, state, writes=writes, wait=wait)


def copied_bytes(model: nn.Module, optimizer: Optimizer, device: str) -> int:
    """Count the bytes of host memory that this rank's copies take in `begin_checkpoint`.

    Args:
        model, optimizer: those of the run; their tensors may have shapes alone.
        device: kind of device that the run trains on.
    """
    files, fixed = _take_down(model, optimizer, {}, {})[1], name_fixed(model, optimizer)
    return sum(
        copy_size(tensor.part.nbytes, device)
        for tensors in files.values()
        for name, tensor in tensors.items()
        if name not in fixed
    )


def _take_down(
    model: nn.Module, optimizer: Optimizer, other: Mapping[str, Any], left_out: Mapping[str, int]
) -> tuple[dict[str, Any], Files]:
    """Collect what a checkpoint holds: the contents of state.json, and the tensors of each file."""
    weights = named_weights(model)
    optimizer_state, optimizer_tensors = to_names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    state = {
        name: to_json(value, name, tensors) for name, value in {**other, "optimizer": optimizer_state}.items()
    }
    return state | {"weights": _describe(weights), "left_out": dict(left_out)}, {
        "weights": describe_tensors({name: each for name, each in weights.items() if name not in left_out}),
        "optimizer": describe_states(optimizer_tensors, dict(model.named_parameters())),
        "other": describe_tensors(tensors),
    }


def load_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None = None
) -> dict[str, Any]:
    """Restore weights, optimizer, scheduler and random-number generators, in this order.

    Names, shapes, dtypes and param groups are compared before anything changes. Every rank must call it, but
    there may be more or fewer ranks than when the checkpoint was saved.

    Args:
        path: the checkpoint's folder, `…/step-NNNNNN`.
        model: a model with the same parameters and buffers as the saved one; its weights are overwritten.
            Those that the checkpoint left out must be as they were.
        optimizer: an optimizer over the same param groups. Attach LISA to it before this call if LISA was
            attached when the checkpoint was saved.
        scheduler: a scheduler of the same kind, or None if none was saved.

    Returns:
        The `extra` that `save_checkpoint` was given.

    Raises:
        DamagedCheckpointError: the checkpoint is incomplete or damaged. It is a `ValueError`.
        ValueError: it belongs to another model, optimizer or scheduler.

    Example:
        >>> extra = load_checkpoint("checkpoints/step-000012", model=model, optimizer=optimizer)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    verify(path)
    reshard(model)
    weights = named_weights(model)
    try:
        state = from_json(
            json.loads((path / "state.json").read_text()), load_file(path / "other.safetensors")
        )
        parameters = dict(model.named_parameters())
        with open_tensors(path, "optimizer") as file:
            optimizer_tensors = read_states(file, parameters)
        check_same("the model's weights", state["weights"], _describe(weights))
        left_out: Mapping[str, int] = state.get("left_out", {})
        check_left_out(left_out, weights)
        groups = state["optimizer"]["param_groups"]
        if len(groups) == len(optimizer.param_groups):
            both = zip(groups, optimizer.param_groups, strict=True)
            state["optimizer"]["param_groups"] = [translate_group(dict(was), now) for was, now in both]
        optimizer_state = from_names(model, optimizer, state["optimizer"], optimizer_tensors)
        _check_plain(state, optimizer, scheduler)
        extra = dict(state["extra"])
    except MisfitError as error:
        raise ValueError(f"checkpoint {path} does not fit: {error}") from error
    except (*UNREADABLE, SafetensorError) as error:
        raise _damaged(path, error) from error
    if (scheduler is None) != (state["scheduler"] is None):
        kind = "with" if scheduler is None else "without"
        raise ValueError(f"checkpoint {path} does not fit: it was saved {kind} a scheduler")

    hook = optimizer.register_load_state_dict_post_hook(
        lambda loaded: restore_dtypes(loaded, optimizer_state["state"]),
        prepend=True,  # before LISA moves a frozen block's state to host memory
    )
    try:
        with open_tensors(path, "weights") as file, torch.no_grad():
            _copy_weights(model, weights, file, left_out)
        optimizer.load_state_dict(optimizer_state)
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        _set_rng_states(state["rng"])
        return extra
    except (LookupError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
        raise _damaged(path, error) from error
    finally:
        hook.remove()


def load_weights(path: str | Path, *, model: nn.Module) -> None:
    """Restore the weights of a checkpoint, adapters of a correction included; every rank must call it.

    Args:
        path: the checkpoint's folder, `…/step-NNNNNN`.
        model: the model that was saved there. Weights that the checkpoint left out are not compared.

    Raises:
        DamagedCheckpointError: the checkpoint is incomplete, damaged, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    verify(path)
    reshard(model)
    try:
        state = json.loads((path / "state.json").read_text())
        with open_tensors(path, "weights") as file, torch.no_grad():
            _copy_weights(model, named_weights(model), file, state.get("left_out", {}))
        if (correction := find_correction(model)) is not None:
            with safe_open(path / "other.safetensors", framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            correction.load_weights(from_json(state["optimizer"]["lisa"]["correction"], tensors))
    except (*UNREADABLE, SafetensorError) as error:
        raise _damaged(path, error) from error


def translate_group(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Turn a param group that torch's AdamW saved into one of `lisatune.AdamW`, or the reverse.

    Both have the same state. A run on several ranks always uses `lisatune.AdamW`, and a run on a single rank
    may use torch's. Options that only one of them has are taken from `now`. Any other group is returned as it
    is.

    Args:
        saved: the group in the checkpoint, with parameter names.
        now: the group of the optimizer that is going to load it.
    """
    for mine, theirs in ((OURS, TORCHS), (TORCHS, OURS)):
        if mine <= now.keys() and theirs <= saved.keys() and not mine & saved.keys():
            shared = {key: value for key, value in saved.items() if key not in theirs}
            return shared | {key: now[key] for key in mine}
    return saved


def _check_plain(state: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Refuse values of the wrong kind, before they get to a place where only a later step would fail.

    Raises:
        LookupError, TypeError, AttributeError: there is such a value.
    """
    saved, now = state["optimizer"], optimizer.state_dict()
    for i, (was, group) in enumerate(zip(saved["param_groups"], now["param_groups"], strict=True)):
        if missing := group.keys() - was.keys() - {MARK}:  # which older versions did not set
            raise KeyError(f"param_groups.{i}.{min(missing)}")
        check_kinds(f"param_groups.{i}", {**was, "params": []}, {**group, "params": []})
    for key in now.keys() - {"state", "param_groups"}:
        check_kinds(key, saved[key], now[key])
    for name, entry in saved["state"].items():
        for key, value in entry.items():
            if not isinstance(value, int | float | None):
                raise TypeError(f"state.{name}.{key} is {value!r:.80}")
    if scheduler is not None and state["scheduler"] is not None:
        plan = scheduler.state_dict()
        if plan.keys() != state["scheduler"].keys():
            raise KeyError(f"scheduler: {', '.join(sorted(plan.keys() ^ state['scheduler'].keys()))}"[:80])
        check_kinds("scheduler", state["scheduler"], plan)
    state["rng"]["python"], state["rng"]["torch"]


def _copy_weights(
    model: nn.Module, weights: Mapping[str, Tensor], file: Any, left_out: Container[str]
) -> None:
    """Copy stored tensors into the model's `named_weights`, but for those that were not stored."""
    coded = coded_weights(model)
    for name, tensor in weights.items():
        if name in left_out:
            continue
        if name in coded:
            coded[name].load(_read(tensor, file, name))
        else:
            local_part(tensor).copy_(_read(tensor, file, name))


def _read(tensor: Tensor, file: Any, name: str) -> Tensor:
    """Read this rank's part of a stored tensor, in the dtype and shape that `tensor` has."""
    stored = file.get_slice(name)
    part = read_part(file, name, tensor)
    if tuple(stored.get_shape()) != tuple(tensor.shape) or part.dtype != tensor.dtype:
        raise TypeError(f"{name} is {part.dtype} {stored.get_shape()}, not what state.json says")
    return part


def _describe(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in weights.items()}


def _rng_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_rng_states(states: Mapping[str, Any]) -> None:
    try:
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if "numpy" in states:
            import numpy as np

            np.random.set_state(states["numpy"])
    except (ValueError, RuntimeError) as error:
        raise TypeError(f"the state of a random number generator: {error}") from error
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _damaged(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {path} holds what no run wrote ({type(error).__name__}: {first_line(error)[:200]})"
    )
