"""A run on several ranks: the first one writes, all of them stop together."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lisatune import ranks
from lisatune.data import Row
from lisatune.exits import Terminated
from lisatune.runs import RunFolder

__all__ = ["agreed_stop", "my_share", "open_folder"]

Stop = type[KeyboardInterrupt]


class _ReadOnlyFolder(RunFolder):
    """The run folder as ranks other than the first have it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lock=-1)
        self._lock = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def drop_metrics_after(self, step: int, *, evaluated: bool = True) -> None:
        """Do nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


@contextlib.contextmanager
def open_folder(
    path: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Open the run folder on the first rank, and what stands for it on the others."""
    opened = ranks.on_first(lambda: RunFolder.open(path, recipe, resume=resume, overwrite=overwrite))
    with opened or _ReadOnlyFolder(path) as folder:
        yield folder


def agreed_stop(asked: Callable[[], Stop | None]) -> Callable[[], Stop | None]:
    """Let all ranks stop where one is asked to; every rank must call the result as often."""
    if ranks.count() == 1:
        return asked
    kinds: tuple[Stop | None, ...] = (None, KeyboardInterrupt, Terminated)
    return lambda: kinds[ranks.agreed(kinds.index(asked()))]


def my_share(rows: Sequence[Row]) -> Sequence[Row]:
    """Take this rank's rows of a batch; where it has none, one without loss, for all must compute."""
    mine = rows[ranks.rank() :: ranks.count()]
    if mine:
        return mine
    ids = rows[0]["input_ids"][:2]
    blank = {"input_ids": ids, "labels": [-100] * len(ids)}
    return [blank | ({"seq_lengths": [len(ids)]} if "seq_lengths" in rows[0] else {})]
