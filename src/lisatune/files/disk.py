"""Write files and folders complete or not at all, lock a folder, and hash a file's content."""

import errno
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lisatune.console import expand_home

__all__ = [
    "cache_folder",
    "check_writable",
    "delete",
    "explain_write_errors",
    "is_full",
    "name_aside",
    "refuse_lfs_pointer",
    "replace_file",
    "sha256_of",
    "sync",
    "take_lock",
    "write_aside",
]

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the text that Git leaves in place of a large file that it has not fetched."""

OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust write the system's number of an error."""


def cache_folder() -> Path:
    """Return lisatune's folder for what can be made again; it may not exist yet.

    It is $LISATUNE_CACHE, or `lisatune` in the user's cache folder: $XDG_CACHE_HOME or ~/.cache, on macOS
    ~/Library/Caches, on Windows %LOCALAPPDATA%.
    """
    if named := os.environ.get("LISATUNE_CACHE"):
        return Path(expand_home(named)).absolute()
    if sys.platform == "darwin":
        user = "~/Library/Caches"
    elif sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expand_home(user)).absolute() / "lisatune"


@contextmanager
def write_aside(target: Path, *, replace: bool = True, aside: Path | None = None) -> Iterator[Path]:
    """Write a folder under another name, then sync it to disk and rename it to `target`.

    A process that is killed inside leaves `.TARGET.tmp-…` beside the target. The next one that writes the
    target deletes it first. A folder that is being written is locked, so it stays.

    Args:
        target: the final folder; its parents are created.
        replace: what to do if `target` exists at the end: replace it, or keep it because another process was
            quicker.
        aside: the other name, from `name_aside`. Default: one that is made here.

    Yields:
        The folder to fill.

    Raises:
        OSError: writing failed. The new folder is gone, and an earlier `target` is as it was.
    """
    aside = name_aside(target) if aside is None else aside
    existing = next(folder for folder in aside.absolute().parents if folder.exists())
    lock = None
    try:
        _delete_left_behind(target)
        aside.mkdir(parents=True)
        lock = _lock_folder(aside)
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
        _put_in_place(aside, target, replace)
        for folder in target.absolute().parents:
            sync(folder)
            if folder == existing:
                break
    except Exception as error:
        if not _is_of_disk(error):
            raise
        what = "free some space or choose" if is_full(error) else "choose"
        raise OSError(f"could not write {target} ({error}); {what} another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed; None if another has locked it, or it cannot be locked."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # some network file systems have no locks
        os.close(descriptor)
        return None
    return descriptor


def _delete_left_behind(target: Path) -> None:
    """Delete what processes left that were killed while they wrote a folder.

    A folder that has just been made may not be locked yet, so an empty one stays. The target itself has the
    name `….tmp-…-old` for a moment while it is replaced; that one stays until there is a target again.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.tmp-[0-9a-f]{{8}}(-old)?")
    with suppress(OSError):
        for left in [each for each in target.parent.iterdir() if name.fullmatch(each.name)]:
            is_old = left.name.endswith("-old")
            if is_old and (left.with_name(left.name.removesuffix("-old")).exists() or not target.exists()):
                continue
            with suppress(OSError):
                lock = _lock_folder(left)
                if lock is None:
                    continue
                try:
                    if any(left.iterdir()):
                        shutil.rmtree(left)
                finally:
                    os.close(lock)


def _is_of_disk(error: Exception) -> bool:
    """Whether an error says that a file could not be written.

    safetensors and tokenizers have errors of their own; that of tokenizers is a bare Exception.
    """
    from safetensors import SafetensorError

    return isinstance(error, OSError | SafetensorError) or OS_ERROR.search(str(error)) is not None


def name_aside(target: Path) -> Path:
    """Return a name beside a folder under which `write_aside` can write it."""
    return target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:8]}"


def refuse_lfs_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has not fetched.

    Raises:
        ValueError: it is one.
    """
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
            )


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name, flush it to the disk and rename it over the old file.

    Raises:
        OSError: the file could not be written; the old one is as it was.
    """
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with explain_write_errors(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


class _UnwritableError(OSError):
    """An OSError that says which file could not be written, and what to do."""


@contextmanager
def explain_write_errors(path: Path, place: str = "output") -> Iterator[None]:
    """Reword an OSError inside so that it names the file or folder that could not be written.

    Args:
        path: the file or folder. One inside it that is explained on its own keeps its name.
        place: what another one is given as.
    """
    try:
        yield
    except _UnwritableError:
        raise
    except OSError as error:
        reason, what = error.strerror or error, "free space or name" if is_full(error) else "name"
        raise _UnwritableError(f"cannot write {path}: {reason}; {what} another {place}") from error


def check_writable(path: Path, place: str = "output") -> None:
    """Refuse a file or folder that cannot be written, before the work whose result goes there.

    A nameless file is made in the nearest folder that exists; nothing stays.

    Args:
        path, place: as in `explain_write_errors`.

    Raises:
        OSError: no file can be made there.
    """
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    folder = nearest if nearest.is_dir() or nearest != path else path.absolute().parent
    with explain_write_errors(path, place), tempfile.TemporaryFile(dir=folder):
        pass


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, says that a disk is full, or the user's share of it.

    Errors of safetensors and tokenizers have the system's number in their text alone.
    """
    if error is None:
        return False
    named = OS_ERROR.search(str(error))
    number = getattr(error, "errno", None) if named is None else int(named[1])
    return number in (errno.ENOSPC, errno.EDQUOT) or is_full(error.__cause__)


def delete(path: Path) -> None:
    """Delete a folder, file or link. A folder is renamed first, so that no half-deleted one has its name.

    Raises:
        OSError: it could not be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        hidden = path.name if path.name.startswith(".") else f".{path.name}"
        aside = path.with_name(f"{hidden}.tmp-{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def take_lock(path: Path, *, what: str = "run folder", option: str = "run.output", sign: bool = True) -> int:
    """Lock a file, which is created if it is missing. The lock ends with the process, however that ends.

    Args:
        path: the lock file. It locks the folder that it is in.
        what: what kind of folder that is, for the error message.
        option: the option that names another folder, for the error message.
        sign: write this process's number and machine into the file.

    Returns:
        Descriptor of the open file; closing it releases the lock.

    Raises:
        RuntimeError: another process holds the lock. The message names that process by what it wrote into
            the file.
    """
    import fcntl  # POSIX only

    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise RuntimeError(
            f"{what} {path.parent} is in use by {owner}; wait for it or name another {option}"
        ) from None
    if sign:
        with suppress(OSError):  # a full disk: then the error message cannot name this process
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


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
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        aside.rename(target)  # fails if the target is a folder with files in it
    except OSError:
        if replace or not target.exists():
            raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
