"""Folders that appear complete or not at all, and the hash that tells whether a file is still the same."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["sha256_of", "written_aside"]


@contextmanager
def written_aside(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill the folder given inside; at the end it is synced to disk and renamed to `target`.

    Args:
        target: the final folder; its parents are made.
        replace: what to do with a `target` that is there at the end: put the new one in its place, or keep
            it (another process was quicker).

    Raises:
        OSError: writing failed. The new folder is gone, a `target` from before is as it was.
    """
    from safetensors import SafetensorError

    aside = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        _put_in_place(aside, target, replace)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {target} ({error}); free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _put_in_place(aside: Path, target: Path, replace: bool) -> None:
    if replace and target.exists():
        old = aside.with_name(f"{aside.name}-old")
        target.rename(old)
        try:
            aside.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)
        return
    try:
        aside.rename(target)  # fails on a folder with files in it
    except OSError:
        if replace or not target.exists():
            raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows can't open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
