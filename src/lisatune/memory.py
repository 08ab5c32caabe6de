"""Memory in bytes: of this process, of an accelerator, of tensors."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from lisatune.storage import StorageTracker

__all__ = [
    "available_bytes",
    "device_peak_bytes",
    "measure",
    "peak_resident_bytes",
    "plain_tensors",
    "reset_device_peak",
    "resident_bytes",
    "tensors_bytes",
]


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    try:
        import psutil
    except ImportError as error:
        raise ImportError('reading resident memory needs psutil: pip install "lisatune[train]"') from error
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most memory this process ever had in RAM.

    Linux tells in /proc, of this program alone; `getrusage` there also counts the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on `device`; None where that can't be told.

    On a CPU that is what the system has, or what is left of a control group's limit. On an accelerator it is
    what is free there, with what torch keeps for this process without using it.
    """
    if device.type == "cpu":
        import psutil

        return min([int(psutil.virtual_memory().available), *_group_rooms()])
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _group_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left below the memory limits of this process's control groups on Linux, in bytes.

    Page cache counts as used there, and can be taken back.
    """
    rooms = []
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = root / "memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if folder != base and base not in folder.parents:
                break
            try:
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit: "max", or no such file
                continue
            rooms.append(max(most - taken + int(stat.get(cache, 0)), 0))
    return rooms


def device_peak_bytes(device: torch.device) -> int | None:
    """Most memory that tensors took on `device` since `reset_device_peak`; None if torch keeps no count."""
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def reset_device_peak(device: torch.device) -> None:
    """Start counting the peak anew; does nothing where torch keeps no count."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def measure(model: nn.Module, optimizer: Optimizer) -> "StorageTracker":
    """Count the live tensors of real training steps, by category and phase.

    Every operation inside the `with` costs some microseconds more; nothing computed changes.

    Example:
        >>> with memory.measure(model, optimizer) as measured:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     step = measured.end_step()
        >>> step.peak_bytes, step.phase, step.at_peak["activations"]
    """
    from lisatune.storage import StorageTracker

    return StorageTracker(model, optimizer)


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that the tensors' values take; storage that several of them share counts once.

    A tensor made of others counts as these: 8-bit moments as codes and scales, a sharded tensor as this
    rank's part.
    """
    # By the storage's own address: tensors on the meta device all have the data pointer 0.
    storages = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            storages[storage._cdata] = storage
    return sum(storage.nbytes() for storage in storages.values())


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Walk over what a tensor is made of: codes and scales, ids and rows, a shard's part, or itself."""
    if tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
        return
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            if isinstance(part, Tensor):  # a sharded tensor also names its mesh
                yield from plain_tensors(part)
    else:
        yield tensor
