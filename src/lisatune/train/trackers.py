"""The trackers that a run reports to, such as TensorBoard or Weights & Biases, by Accelerate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks

__all__ = ["Log", "check_trackers", "open_trackers"]

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers, each by the name of the package that it needs."""

Log = Callable[[Mapping[str, Any], int], None]
"""Sends the numbers among a step's figures, and the step's number, to every tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown (ValueError) or not installed (ImportError).

    Accelerate leaves out a tracker that is not installed, without a warning.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"run.report_to has an unknown tracker {name!r}; known: {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ImportError(f"run.report_to: {name} needs `pip install {name}`")


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """Open trackers for the duration of a run; on several ranks, on the first one.

    Args:
        names: some of `TRACKERS`; may be empty.
        folder: run folder; trackers that write files write to `folder/trackers`.
        config: the recipe with every default, stored with the run if the tracker can do that.
    """
    if not names or not ranks.is_rank0():
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder / "trackers")
    flat = {f"{part}.{key}": str(value) for part, keys in config.items() for key, value in keys.items()}
    accelerator.init_trackers(folder.name, config=flat)

    def log(values: Mapping[str, Any], step: int) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        accelerator.log(numbers, step=step)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
