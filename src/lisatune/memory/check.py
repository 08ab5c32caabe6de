"""Check the memory of a run: before its weights load, at its end, and when memory runs out.

`MemoryCheck` refuses a run that does not fit and compares the plan with the memory that the run took.
`say_what_fits` turns an out-of-memory error into a sentence that says what to change.
"""

import json
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any, Literal

import torch

from lisatune.console import byte_text
from lisatune.distributed import ranks
from lisatune.distributed.ranks import pick_device
from lisatune.files import yaml
from lisatune.memory import process
from lisatune.memory.fit import describe_fit, find_fit
from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.memory.process import limit_bytes
from lisatune.recipe import Recipe
from lisatune.runs.summary import Summary

__all__ = ["MemoryCheck", "is_out_of_memory", "say_what_fits"]

RANKS_WAIT_SECONDS = 300
"""Longest time that ranks wait for their plan."""

ADVICE_SECONDS = 60
"""Longest time that a run that ran out of memory searches for settings that fit."""

ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory")
"""Texts by which an error of torch or its libraries is known to be about memory."""


class MemoryCheck:
    """Plans a run's memory and measures it.

    Planning takes as much Python as a few real steps: a quarter of a second for a tiny model, and seconds
    for a large one, whose weights take longer than that to load.

    Args:
        recipe: the run's recipe. With `run.check_memory: false` nothing is planned or refused.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.plan: MemoryPlan | None = None
        self._step_peak = self._other_peak = self._resident_before = 0

    def before_load(
        self,
        device: torch.device,
        *,
        steps: int,
        length: int,
        masters: Literal["ram", "disk"] | None = None,
    ) -> None:
        """Plan the run and refuse it if it does not fit.

        Args:
            device: where the run trains. On devices whose free memory is unknown, such as mps, the run is
                planned and never refused.
            steps: optimizer steps of the run.
            length: tokens per sequence of the longest batch.
            masters: what `method.master: auto` has chosen.

        Raises:
            ValueError: the run needs more memory than is free; the message says what to change.
        """
        if not self.recipe.run.check_memory:
            return
        recipe = replace(self.recipe, run=replace(self.recipe.run, steps=steps, device=device.type))
        if masters is not None:
            recipe = replace(recipe, method=replace(recipe.method, master=masters))
        try:
            self.plan = _plan_on_ranks(recipe, length)
        except Exception as error:  # the run was rehearsed before, so this is no reason to stop it
            warnings.warn(f"the run's memory cannot be planned ({error}); it starts without", stacklevel=2)
            return
        sharers = ranks.on_this_machine()
        free = process.available_bytes(device, processes=sharers)
        lacking = 0 if free is None else max(self.plan.needed_bytes - free, 0)
        if ranks.max_over_ranks(lacking):  # of the rank with least
            free = self.plan.needed_bytes - ranks.max_over_ranks(lacking)
            change = _advise(recipe, self.plan, free)
            raise ValueError(
                f"the run needs {byte_text(self.plan.needed_bytes)} of memory by its plan ({self.plan.kind})"
                f"{_on_each()} and {byte_text(free)} are free on {device}: {change}; or set "
                "run.check_memory=false to run it as it is"
            )
        host_free = process.available_bytes(torch.device("cpu"), processes=sharers)
        host = max(self.plan.host_bytes, self.plan.loaded_bytes)
        lacks_host = device.type != "cpu" and host_free is not None and host > host_free
        if ranks.max_over_ranks(int(lacks_host)):
            less = ["keep less optimizer state there"]
            less += ["set method.master=disk"] if masters == "ram" else []
            less += ["set run.save_async=false"] if self.plan.copy_bytes else []
            raise ValueError(
                f"the run needs {byte_text(host)} of host memory by its plan ({self.plan.kind}){_on_each()} "
                f"and {byte_text(host_free or 0)} are free: {', '.join(less)}, or set "
                "run.check_memory=false to run it as it is"
            )
        self._resident_before = process.resident_bytes()

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Measure the peak of a training step without that of evaluations in between."""
        self._other_peak = self._device_peak(device)
        process.reset_device_peak(device)
        yield
        self._step_peak = max(self._step_peak, process.device_peak_bytes(device) or 0)

    def _device_peak(self, device: torch.device) -> int:
        """Return the peak of the run so far, evaluations included; 0 if torch does not count."""
        return max(self._other_peak, self._step_peak, process.device_peak_bytes(device) or 0)

    def outcome(self, device: torch.device) -> Summary:
        """Return the memory that the run took and that was planned, in bytes, for the run's summary.

        On CUDA the measured figure is the peak of tensors in a training step of this process. On a CPU torch
        does not count tensors, so the figure is the growth of resident memory since before the weights
        loaded, up to its peak.
        """
        resident = process.peak_resident_bytes()
        peak_bytes = self._device_peak(device) or resident
        if self.plan is None:
            return {"peak_bytes": peak_bytes}
        grown = resident - self._resident_before
        return {
            "peak_bytes": peak_bytes,
            "planned_bytes": self.plan.tensor_bytes,
            "planned_at_peak": self.plan.at_peak,
            "plan": self.plan.kind,
            "measured_bytes": self._step_peak or grown,
            "measured": "tensors in a step" if self._step_peak else "growth of resident memory",
        }


def _plan_on_ranks(recipe: Recipe, length: int) -> MemoryPlan:
    """Plan a run. On several ranks, rank 0 plans in a new process, because planning fakes the ranks."""
    if ranks.count() == 1:
        return plan_memory(recipe, length=length)
    text = ""
    if ranks.is_rank0():
        try:
            options = ("--ranks", str(ranks.count()), "--length", str(length))
            text = json.dumps(_plan_in_new_process(recipe, *options, seconds=RANKS_WAIT_SECONDS))
        except (ValueError, OSError, SubprocessError) as error:
            text = f"!{error}"
    text = ranks.broadcast_text(text)
    if text.startswith("!"):
        raise RuntimeError(text[1:])
    return MemoryPlan.from_dict(json.loads(text))


def _on_each() -> str:
    return "" if ranks.count() == 1 else f" on each of {ranks.count()} ranks"


def _advise(recipe: Recipe, plan: MemoryPlan, free: int) -> str:
    """Say which settings fit the free bytes, or how to find them."""
    if ranks.count() == 1:
        return describe_fit(find_fit(recipe, free, length=plan.length, first=plan))
    return f"`lisatune plan RECIPE --ranks {ranks.count()} --gpu SIZE` finds what fits"


@contextmanager
def say_what_fits(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory error inside the `with` into a sentence that says what to change.

    Raises:
        RuntimeError: memory ran out.
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
        raise RuntimeError(f"memory ran out ({reason}); {_what_fits(recipe)}") from failure


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in ALLOCATORS)


def _release(error: BaseException | None) -> None:
    """Clear the variables of the failed calls, because they keep the model in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _what_fits(recipe: Recipe) -> str:
    """Ask `lisatune plan` in a new process, because this one may have too little memory left to plan."""
    plain = "lower run.batch_size or data.max_length, or set run.activation_checkpointing: true"
    try:
        device = pick_device(recipe.run.device)
        size = limit_bytes(device)
        if size is None:
            return plain
        asked = replace(recipe, run=replace(recipe.run, device=device.type))
        planned = _plan_in_new_process(asked, "--gpu", f"{size / 10**6:.3f}MB", seconds=ADVICE_SECONDS)
        fit = planned["fit"]
        if fit["fits"] and not fit["overrides"]:
            needs = byte_text(planned["needed_bytes"])
            return f"the plan needs {needs} of {byte_text(size)}, so something else uses the rest: free it"
        larger = "take a smaller model or a larger device"
        if not fit["overrides"]:
            return f"`lisatune plan` finds nothing that fits {byte_text(size)}; {larger}"
        found = "" if fit["fits"] else f", which still needs too much: {larger}"
        return f"`lisatune plan` suggests {fit['overrides']} for {byte_text(size)}{found}"
    except (ValueError, OSError, LookupError, RuntimeError, MemoryError, SubprocessError):
        return f"{plain}; `lisatune plan RECIPE --gpu SIZE` finds what fits"


def _plan_in_new_process(recipe: Recipe, *options: str, seconds: float) -> dict[str, Any]:
    """Run `lisatune plan --json` on a recipe.

    Args:
        recipe: the recipe; its `run.device` is a kind of device.
        options: more options of the command.
        seconds: longest time to wait.

    Returns:
        The JSON object that the command prints.

    Raises:
        SubprocessError: the command failed or took too long.
        ValueError, OSError: the command could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        plain = replace(recipe, run=replace(recipe.run, report_to=()))
        path.write_text(yaml.dump(plain.as_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "lisatune", "plan", str(path), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return values
