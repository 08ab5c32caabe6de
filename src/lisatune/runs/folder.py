"""The run folder: everything that a run leaves behind, enough to rebuild every table from it.

    recipe.yaml        the recipe with every default filled in
    environment.json   versions, device, commit and command line
    metrics.jsonl      one line for each logged step
    summary.json       the figures that the run ended with
    reference/         log-probabilities of the model before training, for losses that compare with it
    checkpoints/       from which the run can be resumed
    model/             the fine-tuned model, a plain Hugging Face folder
    evaluation/        benchmark scores and MT-Bench of the model
    export/            what `lisatune export` made of the model
    trackers/          files of TensorBoard and similar trackers

JSON files are written under another name and renamed, so that a reader never sees half of one. A lock keeps
two runs out of one folder; the system drops it when the process ends (flock, so POSIX only).
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lisatune.distributed import ranks
from lisatune.files.disk import check_writable, delete, explain_write_errors, replace_file, take_lock
from lisatune.runs.differences import differences
from lisatune.runs.summary import describe_environment

__all__ = [
    "NEW_FOLDER",
    "RunFolder",
    "check_output",
    "first_day",
    "first_value",
    "is_finished",
    "is_run",
    "is_untrained",
    "open_folder",
]

NEW_FOLDER = "name another run.output to start a new run"
"""What to do where a run cannot be resumed. No message advises to delete one."""

_FILES = ("recipe.yaml", "environment.json", "metrics.jsonl", "summary.json")
_FOLDERS = ("reference", "checkpoints", "model", "evaluation", "export", "trackers")
_LOCK = ".lock"
_BEFORE_TRAINING = {_LOCK, "recipe.yaml", "environment.json", "metrics.jsonl", "reference", "trackers"}
_LEFT_BY_A_KILL = re.compile(rf"\.({'|'.join(map(re.escape, (*_FILES, *_FOLDERS)))})\.tmp-.*")


class RunFolder:
    """An open run folder, locked until it is closed. Use it as a context manager.

    Attributes:
        path: the run folder.
        reference, checkpoints, model, trackers: folders in it, which may not exist yet.
        metrics: the file metrics.jsonl.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "run"
        >>> with RunFolder.open(path, {"run": {"seed": 1}}) as folder:
        ...     folder.log({"step": 1, "loss": 2.5})
        ...     folder.write_summary({"steps": 1})
        >>> sorted(entry.name for entry in path.iterdir())
        ['.lock', 'environment.json', 'metrics.jsonl', 'recipe.yaml', 'summary.json']
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.reference = path / "reference"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.trackers = path / "trackers"
        self.metrics = path / "metrics.jsonl"
        self._lock: int | None = lock
        self._unwritten: list[str] = []

    @classmethod
    def open(
        cls, path: str | Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> Self:
        """Create or open a run folder and write recipe and environment into it.

        Call it after every other check, because `overwrite` deletes the former run's files here.

        Args:
            path: the folder, `run.output`.
            recipe: `Recipe.as_dict()`.
            resume: continue the run in the folder.
            overwrite: delete the run in the folder first; files that no run wrote are left alone.

        Returns:
            The folder, locked.

        Raises:
            ValueError: as in `check_output`.
            RuntimeError: another process runs in the folder.
            OSError: the folder cannot be written.
        """
        path = Path(path)
        check_output(path, recipe, resume=resume, overwrite=overwrite)
        with explain_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, take_lock(path / _LOCK))
        try:
            with explain_write_errors(path):
                for entry in path.iterdir():
                    if _LEFT_BY_A_KILL.fullmatch(entry.name):
                        delete(entry)
            now = describe_environment()
            if resume:
                delete(path / "summary.json")  # of a finished run that is made longer
                before = _read_json(path / "environment.json")
                now = before | {"resumed": [*before.get("resumed", []), now]}
            else:
                folder._delete_run()
            from lisatune.files import yaml

            replace_file(path / "recipe.yaml", yaml.dump(dict(recipe)))
            replace_file(path / "environment.json", _to_json(now, indent=2))
        except BaseException:
            folder.close()
            raise
        return folder

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Args:
            record: values that JSON knows, with the key `step`; NaN and infinity become null.

        Raises:
            OSError: the line could not be written. No half line is left, and the next call writes it too.
        """
        self._unwritten.append(_to_json(record) + "\n")
        with explain_write_errors(self.metrics), self.metrics.open("ab", buffering=0) as file:
            size = file.tell()
            text = "".join(self._unwritten).encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
        self._unwritten.clear()

    def drop_metrics_after(self, step: int, *, evaluated: bool = True) -> None:
        """Delete the lines logged after `step`, so that a run resumed from there logs no step twice.

        Args:
            step: optimizer steps done when the checkpoint was saved.
            evaluated: whether the held-out loss at `step` was logged before the checkpoint was saved; if not,
                its line is deleted too.

        Raises:
            OSError: metrics.jsonl could not be written; it is as it was.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, LookupError, TypeError):  # a line cut off by a crash
                record = json.loads(line)
                if record["step"] < step or (
                    record["step"] == step and (evaluated or "held_out_loss" not in record)
                ):
                    kept.append(line + "\n")
        replace_file(self.metrics, "".join(kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; NaN and infinity become null.

        Raises:
            OSError: it could not be written; an earlier one is as it was.
        """
        replace_file(self.path / "summary.json", _to_json(summary, indent=2))

    def close(self) -> None:
        """Release the folder for another process."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _delete_run(self) -> None:
        """Delete the files of a run.

        The files that make the folder a run's come last, so that a kill in between leaves a run folder.
        """
        with explain_write_errors(self.path):
            for name in (*_FOLDERS, *reversed(_FILES)):
                delete(self.path / name)


@contextmanager
def open_folder(
    path: Path, recipe: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Open the run folder on rank 0; the other ranks get one that writes nothing. Every rank must call it.

    Args:
        path, recipe, resume, overwrite: as in `RunFolder.open`.
    """
    opened = ranks.on_rank0(lambda: RunFolder.open(path, recipe, resume=resume, overwrite=overwrite))
    with opened or _ReadOnlyFolder(path) as folder:
        yield folder


class _ReadOnlyFolder(RunFolder):
    """The run folder on every rank but rank 0: it has the paths and writes nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lock=-1)
        self._lock = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def drop_metrics_after(self, step: int, *, evaluated: bool = True) -> None:
        """Do nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


def check_output(
    path: str | Path,
    recipe: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    writes: bool = True,
) -> None:
    """Check that a run may start in this folder, without changing anything.

    Args:
        path, recipe, resume, overwrite: as in `RunFolder.open`.
        writes: False for a run that is finished and stays as it is.

    Raises:
        ValueError: the path is a file; the folder exists and neither flag is given; there is no run to
            resume or to overwrite; the run in the folder has another recipe.
        RuntimeError: another process runs in the folder.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; use one of them")
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.output {path} is a file; name a folder")
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"run.output {path} lies in {existing}, which is a file; name another folder")
    if writes and not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"cannot write to {existing}; name another run.output")
    if not path.exists():
        check_writable(path, "run.output")
    if (path / _LOCK).is_file() and os.access(path / _LOCK, os.W_OK):
        os.close(take_lock(path / _LOCK, sign=False))
    if resume:
        if not is_run(path):
            raise ValueError(
                f"there is no run to resume in {path}; start it without --resume, or with --resume=auto"
            )
        _check_same_recipe(path / "recipe.yaml", recipe)
    elif path.exists() and not is_untrained(path):
        if not overwrite:
            raise ValueError(
                f"run folder {path} holds a finished run; {NEW_FOLDER} (--overwrite would delete it)"
                if is_finished(path)
                else f"run folder {path} exists; use --resume to continue it, or name another run.output "
                "(--overwrite would delete it and start over)"
            )
        if not is_run(path):
            raise ValueError(
                f"{path} does not look like a run folder (it lacks recipe.yaml or environment.json), so "
                "nothing in it is overwritten; name another run.output"
            )


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (path / "recipe.yaml").is_file() and (path / "environment.json").is_file()


def is_finished(path: Path) -> bool:
    """Whether a folder holds a run that has written its model and, as its last file, its summary."""
    return is_run(path) and (path / "summary.json").is_file() and (path / "model").is_dir()


def is_untrained(path: Path) -> bool:
    """Whether a folder is empty, or holds only what a run leaves that was stopped before its first step.

    Such a run begins again without a flag, because nothing is lost: what it has computed of the model before
    training will be the same.
    """
    names = {entry.name for entry in path.iterdir()}
    left = {name for name in names if not _LEFT_BY_A_KILL.fullmatch(name)}
    is_runs = _LOCK in names or not names
    return is_runs and left <= _BEFORE_TRAINING and not _has_logged_steps(path / "metrics.jsonl")


def _has_logged_steps(metrics: Path) -> bool:
    if not metrics.exists():
        return False
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):  # a line cut off by a crash
            if json.loads(line)["step"] > 0:
                return True
    return False


def _check_same_recipe(stored: Path, recipe: Mapping[str, Any]) -> None:
    from lisatune.files import yaml

    try:
        before = yaml.load(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{stored}: {error}") from None
    if not isinstance(before, dict) or not all(isinstance(section, dict) for section in before.values()):
        raise ValueError(f"{stored} is damaged; {NEW_FOLDER}")
    changed = differences(before, recipe)
    if changed:
        raise ValueError(
            f"the recipe differs from the run in {stored.parent}: {'; '.join(changed)}; "
            f"undo that, or {NEW_FOLDER}"
        )


def first_day(path: Path) -> str | None:
    """Return the day that a run's chat template sees as today, YYYY-MM-DD; None if the folder is not a run's.

    It is in the run's recipe. A run from before the key `data.date` existed rendered on the day it began.
    """
    with suppress(OSError, ValueError):
        return (
            first_value(path, "data", "date")
            or datetime.fromisoformat(_read_json(path / "environment.json")["time"]).date().isoformat()
        )
    return None


def first_value(path: Path, section: str, key: str) -> Any:
    """Return a value of the recipe that a run began with; None if the folder is not a run's, or lacks it."""
    from lisatune.files import yaml

    with suppress(OSError, ValueError, AttributeError, KeyError):
        return yaml.load((path / "recipe.yaml").read_text(encoding="utf-8"))[section].get(key)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    value: Any = None
    with suppress(json.JSONDecodeError):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged; {NEW_FOLDER}")
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_replace_nonfinite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    return [_replace_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value
