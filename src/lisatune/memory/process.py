"""Memory of this process and of its device, in bytes: what is used, what is free, what the limits are.

On the CPU several limits hold at once: the machine's memory, those of the process's control groups (a
container's, a job's), and those that `ulimit -v` and `ulimit -d` set. `_cpu_limits` alone reads them.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "available_bytes",
    "device_peak_bytes",
    "limit_bytes",
    "peak_resident_bytes",
    "reset_device_peak",
    "resident_bytes",
]

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the control groups."""

PROC = Path("/proc/self")
"""Where Linux shows this process."""

RLIMITS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""Limits of `resource`, each with the line of /proc/self/status that says how much of it is used."""


def resident_bytes() -> int:
    """Return how much memory of this process is in RAM now."""
    return int(_import_psutil().Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most memory that this process ever had in RAM.

    On Linux the figure is from /proc, because the one of `getrusage` includes the process that started this
    one.
    """
    peak = _read_status().get("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: torch.device, *, processes: int = 1) -> int | None:
    """Return how much more memory this process can take on a device; None if that is unknown.

    On a CPU, the least that any limit leaves. On an accelerator, the free memory and what torch keeps there
    for this process without using it.

    Args:
        device: the device.
        processes: processes that share the CPU's memory equally. Limits of a process are not shared.
    """
    if device.type == "cpu":
        return min(limit.free // (processes if limit.is_shared else 1) for limit in _cpu_limits())
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def limit_bytes(device: torch.device) -> int | None:
    """Return how much memory a process can take on a device if it has the device to itself.

    On a CPU, the lowest limit; on an accelerator, its memory; None if that is unknown.
    """
    if device.type == "cpu":
        return min(limit.most for limit in _cpu_limits())
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).mem_get_info(device)[1])


def device_peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors took on a device since `reset_device_peak`.

    None on a CPU and on other devices for which torch does not count.
    """
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def reset_device_peak(device: torch.device) -> None:
    """Start a new count of the peak. Does nothing on devices for which torch does not count."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


@dataclass(frozen=True)
class _Limit:
    """A limit on memory, in bytes."""

    most: int
    free: int
    """What is left of it."""

    is_shared: bool = True
    """Whether other processes of the machine count too."""


def _cpu_limits() -> list[_Limit]:
    """Read every limit on the CPU memory of this process. The first is the machine's own memory."""
    machine = _import_psutil().virtual_memory()
    return [_Limit(machine.total, machine.available), *_cgroup_limits(), *_process_limits()]


def _cgroup_limits() -> list[_Limit]:
    """Read the limits of this process's control groups, of version 1 or 2, and of the groups above them.

    Page cache counts as used in a group, but the kernel can take it back: here it counts as free.
    """
    own = PROC / "cgroup"
    limits = []
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2
            base, limit, used, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit = CGROUPS / "memory", "memory.limit_in_bytes"
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
            limits.append(_Limit(most, max(most - taken + int(stat.get(cache, 0)), 0)))
    return limits


def _process_limits() -> list[_Limit]:
    """Read the limits that `ulimit -v` (address space) and `ulimit -d` (data) set for this process."""
    if os.name == "nt":
        return []
    import resource

    used = _read_status()
    limits = []
    for name, line in RLIMITS.items():
        most, _ = resource.getrlimit(getattr(resource, name))
        if most != resource.RLIM_INFINITY:
            limits.append(_Limit(most, max(most - used.get(line, 0), 0), is_shared=False))
    return limits


def _import_psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise ImportError('reading memory needs psutil: pip install "lisatune[train]"') from error
    return psutil


def _read_status() -> dict[str, int]:
    """Read the sizes in /proc/self/status, in bytes. Empty on systems without it."""
    path = PROC / "status"
    lines = path.read_text().splitlines() if path.exists() else []
    words = (line.split() for line in lines)
    return {each[0].rstrip(":"): int(each[1]) * 1024 for each in words if each[2:] == ["kB"]}
