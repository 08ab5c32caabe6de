"""Experiment trackers by name, through Accelerate: tensorboard, wandb, trackio, mlflow."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Log", "check_trackers", "trackers"]

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Tracker names and the package each needs."""


class Log(Protocol):
    """Sends one step's numbers to every tracker."""

    def __call__(self, values: Mapping[str, float], step: int) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown (ValueError) or not installed (ImportError).

    Accelerate would leave out a tracker that is not installed without a word.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"run.report_to has an unknown tracker {name!r}; known: {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name]) is None:
            raise ImportError(f"run.report_to: {name} needs `pip install {TRACKERS[name]}`")


@contextmanager
def trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """Open trackers for the length of a run.

    Args:
        names: keys of `TRACKERS`; may be empty.
        folder: run folder; trackers that write files write to `folder/trackers`.
        config: the resolved recipe, stored with the run where the tracker can.
    """
    if not names:
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    check_trackers(names)
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder / "trackers")
    flat = {f"{part}.{key}": str(value) for part, keys in config.items() for key, value in keys.items()}
    accelerator.init_trackers(folder.name, config=flat)
    try:
        yield lambda values, step: accelerator.log(dict(values), step=step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
