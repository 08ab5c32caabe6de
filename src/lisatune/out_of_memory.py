"""What a run says when memory runs out: one sentence, with what `lisatune plan` finds to change."""

import os
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lisatune import models
from lisatune.plan_apart import plan_apart
from lisatune.progress import byte_text
from lisatune.recipe import Recipe

__all__ = ["is_out_of_memory", "limit_bytes", "say_what_fits"]

ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory")
"""How torch and its libraries begin or end a RuntimeError for memory."""

PLAN_SECONDS = 60
"""Longest that a run which has failed anyway goes on looking for what fits."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@contextmanager
def say_what_fits(recipe: Recipe) -> Iterator[None]:
    """Turn memory that runs out inside into one sentence.

    Raises:
        RuntimeError: the sentence.
    """
    failure = None
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    if failure is not None:
        lines = str(failure).strip().splitlines() or ["no memory left"]
        reason = lines[0].partition(". ")[0].rstrip(".")[-160:]
        _release(failure)
        raise RuntimeError(f"memory ran out ({reason}); {_advice(recipe)}") from failure


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in ALLOCATORS)


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


def _release(error: BaseException | None) -> None:
    """Let go of the model, which the failed calls' variables hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _advice(recipe: Recipe) -> str:
    """Ask `lisatune plan` in a process of its own, since this one may have no memory left to do it."""
    plain = "lower run.batch_size or data.max_length, or set run.activation_checkpointing: true"
    try:
        device = models.pick_device(recipe.run.device)
        size = limit_bytes(device)
        if size is None:
            return plain
        asked = replace(recipe, run=replace(recipe.run, device=device.type))
        planned = plan_apart(asked, "--gpu", f"{size / 10**6:.3f}MB", seconds=PLAN_SECONDS)
        fit = planned["fit"]
        if fit["fits"] and not fit["overrides"]:
            needs = byte_text(planned["needed_bytes"])
            return f"the plan needs {needs} of {byte_text(size)}, so something else takes the rest: free that"
        larger = "take a smaller model or a larger device"
        if not fit["overrides"]:
            return f"`lisatune plan` finds nothing that fits {byte_text(size)}; {larger}"
        found = "" if fit["fits"] else f", which still is too much: {larger}"
        return f"`lisatune plan` suggests {fit['overrides']} for {byte_text(size)}{found}"
    except (ValueError, OSError, LookupError, RuntimeError, MemoryError, subprocess.SubprocessError):
        return f"{plain}; `lisatune plan RECIPE --gpu SIZE` finds what fits"
