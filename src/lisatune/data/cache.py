"""The cache of prepared tokens: where it is, what its entries are named by, what is in it.

An entry is a folder, named by a hash of all that its tokens depend on: content of the source, tokenizer, chat
template, settings, versions of packages, and the code that made it. So no entry ever becomes wrong.
`lisatune.data.store` says what is in one. It is written beside its final name and renamed, so that a kill
leaves no half entry. A process that finds another one at work on the same entry waits for it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lisatune.console import expand_home, terminal
from lisatune.data.records import RecordReader
from lisatune.data.shards import delete_left_behind
from lisatune.data.sources import hash_content
from lisatune.files.disk import cache_folder, delete, is_full, sha256_of

__all__ = [
    "Entry",
    "clear",
    "collect_facts",
    "explain_cache_errors",
    "hash_tokenizer",
    "list_entries",
    "name_entry",
    "read_meta",
    "tokens_folder",
    "work_alone",
]

VARIABLE = "LISATUNE_TOKENS"
"""Environment variable that moves prepared tokens alone; LISATUNE_CACHE moves converted models too."""

FORMAT = 1
"""Version of the files of an entry."""

PACKAGES = ("tokenizers", "transformers", "trl")
"""Packages that could make other tokens in another version."""

NAME = re.compile(r"\.?[0-9a-f]{24}(\.lock|\.tmp-.*)?")
"""Names of entries, their locks, and what a kill leaves of them. Nothing else is ever deleted."""


def tokens_folder(asked: str | None = None) -> Path:
    """Return the folder of prepared tokens; it may not exist yet.

    Args:
        asked: `data.cache`. Default: what LISATUNE_TOKENS names, or `tokens` in lisatune's cache folder.
    """
    if named := asked or os.environ.get(VARIABLE):
        return Path(expand_home(named)).absolute()
    return cache_folder() / "tokens"


def collect_facts(
    reader: RecordReader, tokenizer: Any, loss_on: str | tuple[str, ...], date: str | None
) -> dict[str, Any]:
    """Collect everything that the tokens of a source depend on, as JSON values.

    Raises:
        ValueError, FileNotFoundError, ImportError: the source cannot be read.
    """
    template = tokenizer.chat_template or ""
    template = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return {
        "format": FORMAT,
        "content": hash_content(reader.source, reader.split),
        "reading": reader.facts,
        "tokenizer": hash_tokenizer(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "loss_on": loss_on,
        "date": date if "strftime_now" in template else None,
        "packages": {name: version(name) for name in PACKAGES},
        "code": code.hexdigest(),
    }


def name_entry(facts: dict[str, Any]) -> str:
    """Return the name of the entry that is made from these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash what a tokenizer makes of texts."""
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.special_tokens_map}".encode())
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
        # Before this stand truncation and padding, which the first call switches off.
        digest.update((text.partition('"added_tokens"')[2] or text).encode())
        return digest.hexdigest()
    with TemporaryDirectory() as folder:
        for file in sorted(map(Path, tokenizer.save_pretrained(folder))):
            digest.update(f"{file.name} {sha256_of(file)}".encode())
    return digest.hexdigest()


def read_meta(entry: Path) -> dict[str, Any] | None:
    """Read what an entry says of itself; None if it is not there, or not as it was written."""
    try:
        meta: dict[str, Any] = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        is_whole = all((entry / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return meta if is_whole else None


@contextmanager
def work_alone(entry: Path, what: str) -> Iterator[None]:
    """Wait until no other process works on an entry, and let the others wait until this is done.

    What an earlier process left behind because it was killed is deleted first. Some network file systems have
    no locks. There, two processes may do the same work, and the first one's entry stays.

    Args:
        entry: its folder, which need not exist.
        what: what is made, for the line that says that this process waits.
    """
    import fcntl  # POSIX only

    with explain_cache_errors(entry.parent):
        file = os.open(entry.with_name(f"{entry.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            terminal().print(f"waiting for another process, which prepares {what} too", soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        if is_locked:
            for left in entry.parent.glob(f".{entry.name}.tmp-*"):
                with suppress(OSError):
                    delete(left)
        yield
    finally:
        os.close(file)  # this unlocks it


@contextmanager
def explain_cache_errors(
    folder: Path, *, what: str = "prepared tokens", kind: type[OSError] = OSError
) -> Iterator[None]:
    """Reword an OSError inside: it names the cache, and what helps.

    Args:
        folder: the cache.
        what: what cannot be written.
        kind: class of the new error.

    Raises:
        OSError: with that text.
    """
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        space = "free space, such as with `lisatune cache --clear`, or " if is_full(cause) else ""
        raise kind(
            f"cannot write {what} into the cache {folder}: {cause.strerror or cause}; {space}name another "
            f"folder with data.cache or {VARIABLE}"
        ) from error


@dataclass(frozen=True)
class Entry:
    """An entry of the cache, for a reader."""

    path: Path
    source: str
    """The file, folder or hub id that it was made from."""
    records: int
    tokens: int
    num_bytes: int
    used: float
    """When it was made or last used, in seconds since the epoch."""


def list_entries(folder: Path) -> list[Entry]:
    """List the whole entries of a cache, the last used one first."""
    found = []
    for path in folder.glob("*"):
        if NAME.fullmatch(path.name) and (meta := read_meta(path)) is not None:
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
            used = (path / "meta.json").stat().st_mtime
            found.append(Entry(path, meta["source"], meta["records"], meta["tokens"], num_bytes, used))
    return sorted(found, key=lambda entry: -entry.used)


def clear(folder: Path) -> tuple[int, list[str]]:
    """Delete all entries of a cache, and what kills left of some; nothing else in the folder.

    A run that reads an entry keeps its open files. An entry that a process is making now stays. Shards that a
    killed stream left behind are deleted too.

    Returns:
        The bytes that were deleted, and the names of entries that are being made.

    Raises:
        OSError: something could not be deleted.
    """
    import fcntl

    num_bytes, busy = 0, []
    delete_left_behind(folder)
    names = {path.name for path in folder.glob("*")} | {path.name for path in folder.glob(".*")}
    entries = {name.lstrip(".")[:24] for name in names if NAME.fullmatch(name)}
    for entry in sorted(entries):
        lock = folder / f"{entry}.lock"
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in (folder / entry, *folder.glob(f".{entry}.tmp-*")):
                if path.exists():
                    num_bytes += sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
                    delete(path)
            lock.unlink()
        except BlockingIOError:
            busy.append(entry)
        finally:
            os.close(file)
    return num_bytes, busy
