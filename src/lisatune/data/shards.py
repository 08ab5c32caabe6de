"""The files of a stream: which there are, and how one is brought here and read.

A shard is a file on this machine, an http or https address, or a file of a data set on the hub. One that is
elsewhere is downloaded whole into a folder of the cache, read, and deleted. So a row is named by shard and
line as anywhere else, and a shard that is cut off is noticed.
"""

import errno
import gzip
import http.client
import lzma
import os
import re
import shutil
import urllib.error
import urllib.request
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import unquote, urlsplit

from lisatune.console import expand_home, first_line
from lisatune.data.sources import (
    BOM,
    COMPRESSED,
    EXTENSIONS,
    Meter,
    file_type,
    list_hub_files,
    open_file,
    read_rows,
)
from lisatune.files.disk import delete

__all__ = [
    "ShardFolder",
    "delete_left_behind",
    "is_gone",
    "is_of_disk",
    "is_worth_another_try",
    "list_shards",
    "read_shard",
]

SECONDS = 60
"""How long a server may be silent."""

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
"""Numbers in an address: part-{000..127}.jsonl.gz."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of errors that say that a file cannot be written here."""

GONE = (401, 403, 404, 410)
"""Answers of a server that another try does not change."""


def list_shards(source: str, split: str = "train") -> list[str]:
    """List the shards that a source names, in a fixed order.

    Args:
        source: a file, a glob such as `data/*.jsonl.gz`, a folder, an address, or a hub id, also as
            `id:config`. Files and addresses may have numbers, such as `part-{000..127}.jsonl.gz`.
        split: split of a hub data set.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of no known type, or numbers count down.
    """
    if source.startswith(("http://", "https://")):
        shards = _count_up(source)
    elif (path := Path(expand_home(source))).is_file():  # whose name may look like a pattern
        shards = [str(path)]
    elif RANGE.search(source):
        shards = _count_up(expand_home(source))
        if missing := next((shard for shard in shards if not Path(shard).is_file()), None):
            raise FileNotFoundError(
                f"data.train: {source} names {missing}, which is not there; check the numbers"
            )
    elif any(sign in source for sign in "*?["):
        found = glob(expand_home(source), recursive=True)  # noqa: PTH207 - a pattern may begin anywhere
        shards = sorted(path for path in found if Path(path).is_file())
        if not shards:
            raise FileNotFoundError(f"data.train: no file matches {source}; check the path")
    elif path.is_dir():
        every = (file for file in path.rglob("*") if file.is_file())
        shards = sorted(str(file) for file in every if file_type(file) in (*EXTENSIONS, ".txt"))
        if not shards:
            raise FileNotFoundError(f"data.train: folder {source} has no file of a known type in it or below")
    else:
        shards = list_hub_files(source, split)
    for shard in shards:
        if file_type(_name(shard)) not in (*EXTENSIONS, ".txt"):
            raise ValueError(
                f"cannot read {shard}: unknown file type {_name(shard).suffix or '(none)'}; use "
                f"{', '.join(EXTENSIONS)} or .txt (also {', '.join(COMPRESSED)})"
            )
    return shards


def _count_up(address: str) -> list[str]:
    """Write out the numbers of an address; ValueError if they count down."""
    found = RANGE.search(address)
    if found is None:
        return [address]
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(
            f"data.train: {address} counts down from {first} to {last}; write {{{last}..{first}}}"
        )
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    before, after = address[: found.start()], address[found.end() :]
    return [shard for number in numbers for shard in _count_up(before + number + after)]


def _name(shard: str) -> Path:
    """Return the name of a shard's file."""
    is_local = "://" not in shard
    return Path(shard) if is_local else Path(Path(unquote(urlsplit(shard).path)).name)


def read_shard(path: str, *, split: str, meter: Meter) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file as `read_rows` does; a .txt file is one row."""
    if file_type(Path(path)) != ".txt":
        yield from read_rows(path, split=split, meter=meter)
        return
    with open_file(Path(path)) as file:
        text = file.read().removeprefix(BOM)
    yield path, {"text": text.decode(errors="surrogateescape")}


def is_worth_another_try(error: Exception) -> bool:
    """Whether what reading a shard raised says that it did not arrive whole, and not that a record is bad."""
    cut_off = (OSError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    is_parquet = type(error.__cause__).__module__.startswith("pyarrow")
    return isinstance(error, OSError) or isinstance(error.__cause__, cut_off) or is_parquet


def is_gone(error: BaseException | None) -> bool:
    """Whether a server said that the shard is not there, or not for us."""
    if isinstance(error, FileNotFoundError):
        return True
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status in GONE or (error is not None and is_gone(error.__cause__))


def is_of_disk(error: BaseException | None) -> bool:
    """Whether a shard did not arrive because this machine cannot keep it."""
    if isinstance(error, OSError) and error.errno in DISK:
        return True
    return error is not None and is_of_disk(error.__cause__)


class ShardFolder:
    """Where shards from elsewhere are while they are read.

    It is a folder of the cache with a lock. What a kill left behind is deleted by the next one.

    Args:
        cache: the folder of prepared tokens.
        shards: all shards of the stream. If all are on this machine, no folder is made.
        is_over: whether a download is no longer needed.
    """

    def __init__(self, cache: Path, shards: Sequence[str], is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._folder: Path | None = None
        self.close: Callable[[], Any] = lambda: None
        """Deletes the folder."""
        if any("://" in shard for shard in shards):
            cache.mkdir(parents=True, exist_ok=True)
            delete_left_behind(cache)
            self._folder = Path(mkdtemp(prefix="stream-", dir=cache))
            lock = _lock(self._folder)
            self.close = weakref.finalize(self, _close, self._folder, lock)

    @contextmanager
    def fetch(self, shard: str) -> Iterator[Path]:
        """Bring a shard here, and delete it at the end; one that is here already stays.

        Raises:
            OSError: it did not arrive whole.
        """
        if "://" not in shard:
            yield Path(shard)
            return
        assert self._folder is not None
        folder = Path(mkdtemp(dir=self._folder))
        try:
            from_hub = shard.startswith("hf://")
            yield _download_from_hub(shard, folder) if from_hub else self._download(shard, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _download(self, address: str, folder: Path) -> Path:
        file = folder / _name(address)
        request = urllib.request.Request(address, headers={"Accept-Encoding": "identity"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer, file.open("wb") as out:
                while (data := answer.read(2**20)) and not self._is_over():
                    out.write(data)
                expected = answer.headers["Content-Length"]
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            raise
        except urllib.error.URLError as error:
            raise OSError(str(error.reason)) from error
        except http.client.HTTPException as error:
            raise OSError(f"the connection broke: {error}") from error
        size = file.stat().st_size
        if expected is not None and int(expected) != size:
            raise OSError(f"the connection ended after {size:,} of {int(expected):,} bytes")
        return file


def _download_from_hub(shard: str, folder: Path) -> Path:
    """Download `hf://datasets/OWNER/NAME@COMMIT/PATH`."""
    from huggingface_hub import hf_hub_download

    named, _, rest = shard.removeprefix("hf://datasets/").partition("@")
    commit, _, path = rest.partition("/")
    try:
        return Path(hf_hub_download(named, path, repo_type="dataset", revision=commit, local_dir=folder))
    except Exception as error:  # whatever the HTTP library of this version of huggingface_hub raises
        raise OSError(first_line(error)) from error


def _lock(folder: Path) -> int:
    """Lock a folder of shards; raises BlockingIOError if another process has it."""
    import fcntl  # POSIX only

    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise
    except OSError:  # some network file systems have no locks
        pass
    return file


def delete_left_behind(cache: Path) -> None:
    """Delete the folders of shards in a cache that no process reads."""
    for folder in cache.glob("stream-*"):
        with suppress(OSError):
            lock = _lock(folder)
            delete(folder)
            os.close(lock)


def _close(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
