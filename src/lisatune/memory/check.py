"""Whether a run fits its device, known before weights load; and at its end, whether the plan was right."""

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
from typing import Any

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

__all__ = ["MemoryCheck", "is_out_of_memory", "plan_apart", "say_what_fits"]

RANKS_WAIT_SECONDS = 300
"""Longest that ranks wait for their plan."""
ADVICE_SECONDS = 60
"""Longest that a run that ran out of memory searches for what fits."""
ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory")
"""How torch and its libraries begin or end a RuntimeError for memory."""


class MemoryCheck:
    """Plans a run's memory and measures it.

    The step is traced whatever the model's size. That takes as much Python as a few real steps: a quarter
    of a second for a tiny model, seconds for a large one, which takes longer to load.

    Args:
        recipe: of the run; with `run.check_memory: false` nothing is planned or refused.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.plan: MemoryPlan | None = None
        self._step_peak = self._other_peak = self._resident_before = 0

    def before_load(self, device: torch.device, *, steps: int, length: int) -> None:
        """Plan the run and refuse it where it does not fit.

        Args:
            device: where it will run. On one whose free memory torch can't tell, such as mps, it is planned
                and nothing refused.
            steps: optimizer steps of the run.
            length: tokens of its longest batch.

        Raises:
            ValueError: the run needs more memory than is free; the message says what to change.
        """
        if not self.recipe.run.check_memory:
            return
        recipe = replace(self.recipe, run=replace(self.recipe.run, steps=steps, device=device.type))
        try:
            self.plan = _planned(recipe, length)
        except Exception as error:  # the run itself has been rehearsed already: it may go on
            warnings.warn(f"the run's memory can't be planned ({error}); going on without", stacklevel=2)
            return
        host_free = process.available_bytes(torch.device("cpu"))
        free = process.available_bytes(device)
        if device.type == "cpu" and free is not None:
            free //= ranks.on_this_machine()
        lacking = 0 if free is None else max(self.plan.needed_bytes - free, 0)
        if ranks.max_over_ranks(lacking):  # of the rank with least
            free = self.plan.needed_bytes - ranks.max_over_ranks(lacking)
            needed = byte_text(self.plan.needed_bytes)
            change = _advice(recipe, self.plan, free)
            raise ValueError(
                f"the run needs {needed} of memory by its plan ({self.plan.kind}){_on_each()} and "
                f"{byte_text(free)} are free on {device}: {change}; or set "
                "run.check_memory=false to run it as it is"
            )
        host = max(self.plan.host_bytes * ranks.on_this_machine(), self.plan.loaded_bytes)
        lacks_host = device.type != "cpu" and host_free is not None and host > host_free
        if ranks.max_over_ranks(int(lacks_host)):
            raise ValueError(
                f"the run needs {byte_text(host)} of host memory by its plan ({self.plan.kind}) and "
                f"{byte_text(host_free or 0)} are free: keep less optimizer state there, or set "
                "run.check_memory=false to run it as it is"
            )
        self._resident_before = process.resident_bytes()

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Count what is inside anew, so that no evaluation is in the step's peak."""
        self._other_peak = self._device_peak(device)
        process.reset_device_peak(device)
        yield
        self._step_peak = max(self._step_peak, process.device_peak_bytes(device) or 0)

    def _device_peak(self, device: torch.device) -> int:
        """Most memory that tensors took on the device, evaluation included; 0 where torch keeps no count."""
        return max(self._other_peak, self._step_peak, process.device_peak_bytes(device) or 0)

    def outcome(self, device: torch.device) -> Summary:
        """Say for the run's summary how much memory it took, and where there is a plan what that said.

        On CUDA that is the most that tensors took in a training step of this process. A CPU keeps no such
        count: there it is by how much resident memory has grown since before the weights loaded, at most.
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


def _planned(recipe: Recipe, length: int) -> MemoryPlan:
    """Plan a run: on several ranks in a process of its own, for a plan pretends ranks."""
    if ranks.count() == 1:
        return plan_memory(recipe, length=length)
    text = ""
    if ranks.is_rank0():
        try:
            options = ("--ranks", str(ranks.count()), "--length", str(length))
            text = json.dumps(plan_apart(recipe, *options, seconds=RANKS_WAIT_SECONDS))
        except (ValueError, OSError, SubprocessError) as error:
            text = f"!{error}"
    text = ranks.broadcast_text(text)
    if text.startswith("!"):
        raise RuntimeError(text[1:])
    return MemoryPlan.from_dict(json.loads(text))


def _on_each() -> str:
    return "" if ranks.count() == 1 else f" on each of {ranks.count()} ranks"


def _advice(recipe: Recipe, plan: MemoryPlan, free: int) -> str:
    if ranks.count() == 1:
        return describe_fit(find_fit(recipe, free, length=plan.length, first=plan))
    return f"`lisatune plan RECIPE --ranks {ranks.count()} --gpu SIZE` finds what fits"


def plan_apart(recipe: Recipe, *options: str, seconds: float) -> dict[str, Any]:
    """Plan a recipe.

    Args:
        recipe: its `run.device` is a kind of device.
        options: of the command.
        seconds: longest to wait.

    Returns:
        What the command prints with --json.

    Raises:
        subprocess.SubprocessError: the command failed, or took too long.
        ValueError, OSError: it could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        plain = replace(recipe, run=replace(recipe.run, report_to=()))
        path.write_text(yaml.dump(plain.as_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "lisatune", "plan", str(path), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


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
        raise RuntimeError(f"memory ran out ({reason}); {_what_fits(recipe)}") from failure


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in ALLOCATORS)


def _release(error: BaseException | None) -> None:
    """Let go of the model, which the failed calls' variables hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _what_fits(recipe: Recipe) -> str:
    """Ask `lisatune plan` in a process of its own, since this one may have no memory left to do it."""
    plain = "lower run.batch_size or data.max_length, or set run.activation_checkpointing: true"
    try:
        device = pick_device(recipe.run.device)
        size = limit_bytes(device)
        if size is None:
            return plain
        asked = replace(recipe, run=replace(recipe.run, device=device.type))
        planned = plan_apart(asked, "--gpu", f"{size / 10**6:.3f}MB", seconds=ADVICE_SECONDS)
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
