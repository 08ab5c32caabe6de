"""Memory in bytes: of this process, of an accelerator, of tensors."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "available_bytes",
    "device_peak_bytes",
    "limit_bytes",
    "peak_resident_bytes",
    "reset_device_peak",
    "resident_bytes",
]

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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


def limit_bytes(device: torch.device) -> int | None:
    """Memory that a process may take on the device; None where it can't be told.

    On the CPU the least of the machine's memory, its container's (cgroup) and the process's (`ulimit -v`).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type != "cpu":
        return None
    import resource  # POSIX only

    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(soft)
    if CGROUP_LIMIT.is_file() and (text := CGROUP_LIMIT.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)
