"""`benchmarks/overhead.py` counts what only some steps of a period pay."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_mean_over_whole_periods_counts_the_draw_and_the_median_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = runpy.run_path(str(BENCHMARKS / "overhead.py"))["measure_steps"]
    now, steps = 0.0, dict[Optimizer, int]()

    def step(model: Any, optimizer: Optimizer, ids: Any) -> None:
        nonlocal now
        steps[optimizer] = steps.get(optimizer, 0) + 1
        has_lisa = len(optimizer._optimizer_step_post_hooks) > 0
        now += 4 if has_lisa and steps[optimizer] % 3 == 0 else 1

    monkeypatch.setitem(measure.__globals__, "train_step", step)
    figures = measure(tiny.llama(blocks=2), torch.zeros(1, 1, dtype=torch.long), 7, lambda: now)
    assert figures["steps"] == 9
    assert (figures["step ratio"], figures["noise"]) == (1, 1)
    assert (figures["mean step ratio"], figures["mean noise"]) == (2, 1)
