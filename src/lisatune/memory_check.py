"""Whether a run fits its device, known before weights load; and at its end, whether the plan was right."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lisatune import memory, progress, ranks
from lisatune.fit import find_fit
from lisatune.plan import MemoryPlan, plan_memory
from lisatune.plan_table import advice
from lisatune.recipe import Recipe

__all__ = ["MemoryCheck"]


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
        if not self.recipe.run.check_memory or ranks.count() > 1:  # the plan traces a model that is whole
            return
        recipe = replace(self.recipe, run=replace(self.recipe.run, steps=steps, device=device.type))
        try:
            self.plan = plan_memory(recipe, length=length)
        except Exception as error:  # the run itself has been rehearsed already: it may go on
            warnings.warn(f"the run's memory can't be planned ({error}); going on without", stacklevel=2)
            return
        free = memory.available_bytes(device)
        if free is not None and self.plan.needed_bytes > free:
            fit = find_fit(recipe, free, length=length, first=self.plan)
            needed = progress.byte_text(self.plan.needed_bytes)
            raise ValueError(
                f"the run needs {needed} of memory by its plan ({self.plan.kind}) and "
                f"{progress.byte_text(free)} are free on {device}: {advice(fit)}; or set "
                "run.check_memory=false to run it as it is"
            )
        host = max(self.plan.host_bytes, self.plan.at_peak["weights"])  # weights load into host memory first
        host_free = memory.available_bytes(torch.device("cpu"))
        if device.type != "cpu" and host_free is not None and host > host_free:
            raise ValueError(
                f"the run needs {progress.byte_text(host)} of host memory by its plan ({self.plan.kind}) and "
                f"{progress.byte_text(host_free)} are free: keep less optimizer state there, or set "
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
