"""Checkpoint folders: find them, tell which are complete, and refuse one that changed after it was written.

manifest.json holds size and sha256 of each of `FILES`. Several ranks write several files of weights and
optimizer state, and an index of them. Files are opened only by these names and never through links, so
nothing in a manifest can lead out of its folder.
"""

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from lisatune.distributed import ranks
from lisatune.files.disk import delete, sha256_of
from lisatune.files.parts import INDEX, part_name

__all__ = [
    "FILES",
    "DamagedCheckpointError",
    "checkpoint_name",
    "describe_file",
    "is_complete",
    "list_checkpoints",
    "newest_checkpoint",
    "prune",
    "set_aside",
    "verify",
    "write_manifest",
]

FILES = ("weights.safetensors", "optimizer.safetensors", "other.safetensors", "state.json")

FORMAT, FORMAT_OF_PARTS, FORMAT_WITHOUT_BASE = 1, 2, 3
"""Versions of the layout of a checkpoint: in one part, in several, and in any number without the weights that
never change. Another one is refused.
"""

DIVIDED = ("weights", "optimizer")
"""What several ranks write in a file each."""

MOST_PARTS = 2**20


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or changed after it was written; an earlier one may be intact."""


def checkpoint_name(step: int) -> str:
    """Name the checkpoint folder of a step."""
    return f"step-{step:06d}"


def list_files(parts: int = 1) -> tuple[str, ...]:
    """Name the files of a checkpoint in `parts` parts, without manifest.json."""
    if parts == 1:
        return FILES
    divided = (part_name(name, number, parts) for name in DIVIDED for number in range(parts))
    return *divided, INDEX, *FILES[len(DIVIDED) :]


def write_manifest(
    folder: Path,
    step: int,
    *,
    parts: int = 1,
    known: Mapping[str, Mapping[str, int | str]] | None = None,
    is_whole: bool = True,
) -> None:
    """Record size and sha256 of the files, which the folder must hold, in its manifest.json.

    Args:
        folder: the checkpoint.
        step: its optimizer steps.
        parts: in how many parts weights and optimizer state are.
        known: `describe_file` of files by name; the others are read.
        is_whole: whether the checkpoint holds all weights.

    Raises:
        OSError: a file could not be read, or manifest.json could not be written.
    """
    known = known or {}
    files = {name: known.get(name) or describe_file(folder / name) for name in list_files(parts)}
    if not is_whole:
        head = {"format": FORMAT_WITHOUT_BASE, "parts": parts}
    else:
        head = {"format": FORMAT} if parts == 1 else {"format": FORMAT_OF_PARTS, "parts": parts}
    (folder / "manifest.json").write_text(json.dumps({**head, "step": step, "files": files}, indent=1))


def describe_file(path: Path) -> dict[str, int | str]:
    """Return what a manifest holds of a file: its size in bytes and its sha256."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its hash.

    On several ranks every rank must call it. Each reads a share of the files, and all raise the same.

    Raises:
        DamagedCheckpointError: a file is missing, is a link, or changed after it was written.
        ValueError: the checkpoint has a format that this version cannot read.
    """
    problem = None
    try:
        hashes = _read_manifest(path)
        for name in sorted(hashes)[ranks.rank() :: ranks.count()]:
            if sha256_of(path / name) != hashes[name]:
                raise DamagedCheckpointError(
                    f"checkpoint {path} is damaged: {name} changed after it was written; load an earlier one"
                )
    except ValueError as error:
        problem = error
    failed = ranks.max_over_ranks(-1 if problem is None else ranks.rank())
    if failed < 0:
        return
    reason = ranks.broadcast_text(str(problem), source=failed)
    raise problem or DamagedCheckpointError(reason)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the folders with the name of a checkpoint, complete or not, highest step first."""
    named = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-[0-9]{1,18}", path.name)]
    found = [path for path in named if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=_step, reverse=True)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the complete checkpoint with the highest step; None where there is none.

    Complete means that every file is there and has its size. `verify` compares the hashes too.
    """
    return next((path for path in list_checkpoints(folder) if is_complete(path)), None)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `NAME.damaged`; `prune` deletes it once the run has passed its step.

    Raises:
        OSError: the folder cannot be written.
    """
    aside = path.with_name(f"{path.name}.damaged")
    delete(aside)
    path.rename(aside)


def prune(folder: str | Path, keep: int, *, best: Iterable[int] = ()) -> None:
    """Delete all but the `keep` newest complete checkpoints, and folders that kills and damage left behind.

    Nothing is deleted if no checkpoint is complete. Of the steps in `best`, each the best one up to then, the
    last one up to each kept checkpoint is kept too, so that a run can be resumed from any of them.

    Raises:
        ValueError: keep < 1.
        OSError: something could not be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    by_step = list_checkpoints(folder)
    complete = [path for path in by_step if is_complete(path)]
    if complete:
        newest, kept = by_step.index(complete[0]), complete[:keep]
        spared = {max((step for step in best if step <= _step(path)), default=None) for path in kept}
        older = [path for path in by_step[newest:] if path not in kept and _step(path) not in spared]
        killed = Path(folder).glob(".step-*.tmp-*")
        damaged = [path for path in Path(folder).glob("step-*.damaged") if _step(path) <= _step(complete[0])]
        for path in (*older, *killed, *damaged):
            delete(path)


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step-").partition(".")[0]
    return int(digits) if re.fullmatch("[0-9]{1,18}", digits) else -1


def is_complete(path: Path) -> bool:
    """Whether every file of a checkpoint is there and has its size. `verify` compares the hashes too."""
    try:
        _read_manifest(path)
    except ValueError:
        return False
    return True


def _read_manifest(path: Path) -> dict[str, str]:
    """Read the hash of each file by its name. Errors as in `verify`, but only sizes are compared."""
    try:
        _check_plain(path, ["manifest.json"])
        manifest = json.loads((path / "manifest.json").read_text())
        form = manifest["format"]
        parts = manifest["parts"] if form in (FORMAT_OF_PARTS, FORMAT_WITHOUT_BASE) else 1
        if not (isinstance(parts, int) and 1 <= parts <= MOST_PARTS):
            raise ValueError(f"parts is {parts!r:.80}")
        names = list_files(parts)
        _check_plain(path, names)
        files = {name: manifest["files"][name] for name in names}
        wrong = [name for name in names if (path / name).stat().st_size != files[name]["bytes"]]
        hashes = {name: str(files[name]["sha256"]) for name in names}
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"no complete checkpoint in {path} ({type(error).__name__}: {error})"
        ) from error
    if form not in (FORMAT, FORMAT_OF_PARTS, FORMAT_WITHOUT_BASE):
        raise ValueError(
            f"checkpoint {path} has format {form}, and this version reads {FORMAT} to {FORMAT_WITHOUT_BASE}"
        )
    if wrong:
        raise DamagedCheckpointError(
            f"checkpoint {path} is damaged: {wrong[0]} has another size than when it was written"
        )
    return hashes


def _check_plain(path: Path, names: Iterable[str]) -> None:
    for name in names:
        try:
            is_plain = stat.S_ISREG((path / name).lstat().st_mode)
        except FileNotFoundError:
            if "-of-" not in name:
                raise
            raise DamagedCheckpointError(
                f"no complete checkpoint in {path}: {name}, which one of its ranks wrote, is missing; put it "
                "there, or load an earlier one"
            ) from None
        if not is_plain:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} is not a plain file")
