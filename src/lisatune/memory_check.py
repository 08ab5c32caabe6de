"""Whether a run fits its device, known before weights load; and at its end, whether the plan was right."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from subprocess import SubprocessError

import torch

from lisatune import memory, progress, ranks
from lisatune.fit import find_fit
from lisatune.plan import MemoryPlan, plan_memory
from lisatune.plan_apart import plan_apart
from lisatune.plan_table import advice
from lisatune.recipe import Recipe

__all__ = ["MemoryCheck"]

PLAN_SECONDS = 300
"""Longest that ranks wait for their plan."""


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
        host_free = memory.available_bytes(torch.device("cpu"))
        free = memory.available_bytes(device)
        if device.type == "cpu" and free is not None:
            free //= ranks.on_this_machine()
        lacking = 0 if free is None else max(self.plan.needed_bytes - free, 0)
        if ranks.agreed(lacking):  # of the rank with least
            free = self.plan.needed_bytes - ranks.agreed(lacking)
            needed = progress.byte_text(self.plan.needed_bytes)
            change = _advice(recipe, self.plan, free)
            raise ValueError(
                f"the run needs {needed} of memory by its plan ({self.plan.kind}){_on_each()} and "
                f"{progress.byte_text(free)} are free on {device}: {change}; or set "
                "run.check_memory=false to run it as it is"
            )
        host = max(self.plan.host_bytes * ranks.on_this_machine(), self.plan.loaded_bytes)
        lacks_host = device.type != "cpu" and host_free is not None and host > host_free
        if ranks.agreed(int(lacks_host)):
            raise ValueError(
                f"the run needs {progress.byte_text(host)} of host memory by its plan ({self.plan.kind}) and "
                f"{progress.byte_text(host_free or 0)} are free: keep less optimizer state there, or set "
                "run.check_memory=false to run it as it is"
            )
        self._resident_before = memory.resident_bytes()

    @contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Count what is inside anew, so that no evaluation is in the step's peak."""
        self._other_peak = self._device_peak(device)
        memory.reset_device_peak(device)
        yield
        self._step_peak = max(self._step_peak, memory.device_peak_bytes(device) or 0)

    def _device_peak(self, device: torch.device) -> int:
        """Most memory that tensors took on the device, evaluation included; 0 where torch keeps no count."""
        return max(self._other_peak, self._step_peak, memory.device_peak_bytes(device) or 0)

    def outcome(self, device: torch.device) -> progress.Summary:
        """Say for the run's summary how much memory it took, and where there is a plan what that said.

        On CUDA that is the most that tensors took in a training step of this process. A CPU keeps no such
        count: there it is by how much resident memory has grown since before the weights loaded, at most.
        """
        resident = memory.peak_resident_bytes()
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
    if ranks.is_first():
        try:
            options = ("--ranks", str(ranks.count()), "--length", str(length))
            text = json.dumps(plan_apart(recipe, *options, seconds=PLAN_SECONDS))
        except (ValueError, OSError, SubprocessError) as error:
            text = f"!{error}"
    text = ranks.from_first(text)
    if text.startswith("!"):
        raise RuntimeError(text[1:])
    return MemoryPlan.from_dict(json.loads(text))


def _on_each() -> str:
    return "" if ranks.count() == 1 else f" on each of {ranks.count()} ranks"


def _advice(recipe: Recipe, plan: MemoryPlan, free: int) -> str:
    if ranks.count() == 1:
        return advice(find_fit(recipe, free, length=plan.length, first=plan))
    return f"`lisatune plan RECIPE --ranks {ranks.count()} --gpu SIZE` finds what fits"
