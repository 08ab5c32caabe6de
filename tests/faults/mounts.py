"""A disk of its own for a forked process: a tmpfs that fills up or turns read-only, seen by nobody else."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from forks import ended, forked

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18

libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A mounted tmpfs of some bytes."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Mount it, in the forked process only; OSError if the system does not allow it."""
        self.path = path
        path.mkdir(exist_ok=True)
        if libc.unshare(NEW_MOUNTS) and libc.unshare(NEW_USER | NEW_MOUNTS):
            raise _error("unshare")
        _mount(Path("/"), RECURSIVE | PRIVATE)
        _mount(path, 0, f"size={num_bytes}")

    def read_only(self, folder: Path) -> None:
        """Make a folder on it read-only, also for root."""
        _mount(folder, BIND, source=folder)
        _mount(folder, BIND | REMOUNT | READ_ONLY)

    def writable(self, folder: Path) -> None:
        """Make the folder writable again."""
        if libc.umount2(str(folder).encode(), 0):
            raise _error("umount")

    def fill(self, left: int) -> None:
        """Fill the disk except for some bytes."""
        state = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(max(0, state.f_bavail * state.f_bsize - left)))

    def empty(self) -> None:
        """Delete the file that fills the disk."""
        (self.path / "ballast").unlink(missing_ok=True)


def can_mount(folder: Path) -> bool:
    """Whether a forked process may mount a disk here."""

    def act() -> int:
        Disk(folder / "try", 2**16)
        return 0

    return ended(forked(act, folder / "mount.log")) == 0


def on_a_disk(folder: Path, num_bytes: int, act: Callable[[Disk], int]) -> int:
    """Call something in a forked process that has a disk at `folder`/disk; return its exit code."""
    code = ended(forked(lambda: act(Disk(folder / "disk", num_bytes)), folder / "log"))
    assert code is not None
    return code


def _mount(path: Path, flags: int, options: str = "", source: Path = Path("tmpfs")) -> None:
    if libc.mount(str(source).encode(), str(path).encode(), b"tmpfs", flags, options.encode()):
        raise _error(f"mount {path}")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
