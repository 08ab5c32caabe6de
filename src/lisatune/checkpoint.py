"""Checkpoints from which a run goes on bit for bit: safetensors and JSON, never a pickle.

    checkpoints/step-000012/
        weights.safetensors     parameters (tied ones once) and persistent buffers, by name
        optimizer.safetensors   "PARAMETER//KEY": optimizer state, only of the parameters that have some
        other.safetensors       tensors that stand inside state.json, such as RNG states
        state.json              param groups with parameter names, every other key of optimizer.state_dict(),
                                scheduler, RNGs, and what the caller adds
        manifest.json           size and sha256 of the files above

A folder is written under another name, synced and renamed, so what has its final name is complete. Loading
opens these files only, after checking them against the manifest.
"""

import json
import random
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lisatune.disk import sha256_of, written_aside
from lisatune.named_state import check_same, from_json, from_names, restore_dtypes, to_json, to_names

__all__ = ["load_checkpoint", "newest_checkpoint", "prune", "save_checkpoint"]

FILES = ("weights.safetensors", "optimizer.safetensors", "other.safetensors", "state.json")
FORMAT = 1


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/step-NNNNNN`; an earlier checkpoint of that step is replaced once this one is complete.

    Args:
        folder: the run's checkpoints folder, made if missing.
        step: optimizer steps done.
        model: owns every parameter of the optimizer.
        optimizer: its `state_dict()` is taken, so hooks such as LISA's add their part.
        scheduler: learning-rate schedule.
        extra: what else the run needs to go on, such as its place in the data; JSON values, tuples, tensors.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written. Nothing is left behind, earlier checkpoints are as they were.
        TypeError: a value is neither a plain tensor nor JSON.
    """
    from safetensors.torch import save_file

    weights = _weights(model)
    other: dict[str, Tensor] = {}
    optimizer_state, optimizer_tensors = to_names(model, optimizer)
    state = {
        "step": step,
        "weights": _describe(weights),
        "optimizer": to_json(optimizer_state, "optimizer", other),
        "scheduler": None if scheduler is None else to_json(scheduler.state_dict(), "scheduler", other),
        "rng": to_json(_rng_states(), "rng", other),
        "extra": to_json(dict(extra or {}), "extra", other),
    }
    target = Path(folder) / f"step-{step:06d}"
    with written_aside(target) as aside:
        save_file(_storable(weights), aside / "weights.safetensors")
        save_file(_storable(optimizer_tensors), aside / "optimizer.safetensors")
        save_file(_storable(other), aside / "other.safetensors")
        (aside / "state.json").write_text(json.dumps(state))
        files = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": sha256_of(aside / name)}
            for name in FILES
        }
        (aside / "manifest.json").write_text(
            json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
        )
    return target


def load_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None = None
) -> dict[str, Any]:
    """Put weights, optimizer, scheduler and RNGs back, in this order, and return what `extra` was.

    Names, shapes, dtypes and param groups are compared before anything changes.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or it is not of this model, optimizer
            and scheduler.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = Path(path)
    _verify(path)
    state = from_json(json.loads((path / "state.json").read_text()), load_file(path / "other.safetensors"))
    optimizer_tensors = load_file(path / "optimizer.safetensors")
    weights = _weights(model)
    try:
        check_same("the model's weights", state["weights"], _describe(weights))
        optimizer_state = from_names(model, optimizer, state["optimizer"], optimizer_tensors)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} does not fit: {error}") from error
    if (scheduler is None) != (state["scheduler"] is None):
        kind = "with" if scheduler is None else "without"
        raise ValueError(f"checkpoint {path} does not fit: it was saved {kind} a scheduler")

    with safe_open(path / "weights.safetensors", framework="pt") as file, torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(file.get_tensor(name))
    hook = optimizer.register_load_state_dict_post_hook(
        lambda loaded: restore_dtypes(model, loaded, optimizer_tensors),
        prepend=True,  # before LISA moves a frozen block's state to host memory
    )
    try:
        optimizer.load_state_dict(optimizer_state)
    finally:
        hook.remove()
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    _set_rng_states(state["rng"])
    extra: dict[str, Any] = state["extra"]
    return extra


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the complete checkpoint with the highest step, by file sizes; None where there is none."""
    return next((path for path in _by_step(Path(folder)) if _is_complete(path)), None)


def prune(folder: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and what interrupted writing left behind.

    Raises:
        ValueError: keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    complete = [path for path in _by_step(Path(folder)) if _is_complete(path)]
    for path in (*complete[keep:], *Path(folder).glob(".step-*.tmp-*")):
        shutil.rmtree(path)


# ---- tensors


def _weights(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def _describe(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in weights.items()}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain dense tensors, none sharing memory with another: what safetensors accepts."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise TypeError(f"can't save {name}: {type(tensor).__name__} is not a plain dense tensor")
        dense = tensor.detach().contiguous()
        address = dense.untyped_storage().data_ptr()
        storable[name] = dense.clone() if address in seen else dense
        seen.add(address)
    return storable


# ---- random number generators


def _rng_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_rng_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


# ---- files


def _by_step(folder: Path) -> list[Path]:
    """Checkpoint folders, the highest step first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _is_complete(path: Path) -> bool:
    try:
        _manifest(path)
    except ValueError:
        return False
    return True


def _manifest(path: Path) -> dict[str, str]:
    """Hash of each file by name; ValueError where a file is missing, cut, or from another format."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = {name: manifest["files"][name] for name in FILES}
        wrong = [name for name in FILES if (path / name).stat().st_size != files[name]["bytes"]]
        hashes = {name: str(files[name]["sha256"]) for name in FILES}
        is_known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no complete checkpoint in {path} ({type(error).__name__}: {error})") from error
    if not is_known:
        raise ValueError(f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT}")
    if wrong:
        raise ValueError(
            f"checkpoint {path} is damaged: {wrong[0]} has another size than when it was written"
        )
    return hashes


def _verify(path: Path) -> None:
    for name, sha256 in _manifest(path).items():
        if sha256_of(path / name) != sha256:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} is not what was written; "
                "delete the folder to use an earlier one"
            )
