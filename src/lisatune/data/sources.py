"""Read rows as they are stored in a file, in a folder or on the hub, each with its place.

This file only checks whether a row can be read; `records` checks its content. Files are not read by
`datasets`, because it neither names the line of a bad row nor continues after it. Nothing is ever unpickled.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from lisatune.console import first_line
from lisatune.data import python_docs
from lisatune.files.disk import refuse_lfs_pointer, sha256_of
from lisatune.files.hub import UNREACHABLE, ask_hub

__all__ = [
    "BOM",
    "COMPRESSED",
    "EXTENSIONS",
    "BadRowError",
    "Meter",
    "file_type",
    "has_splits",
    "hash_content",
    "list_hub_files",
    "open_file",
    "read_rows",
]

T = TypeVar("T")

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
"""Types of files that can be read, also compressed."""

COMPRESSED = (".gz", ".xz", ".zst")
"""Endings of compressed files."""

DAMAGED = (OSError, gzip.BadGzipFile)
"""Kinds of OSError that say that a compressed file cannot be read."""

BOM = b"\xef\xbb\xbf"
"""Byte order mark, which some programs put at the beginning of a UTF-8 file."""


class BadRowError(ValueError):
    """A row that cannot be used. The message does not name the row's place."""


class Meter:
    """How much of a source was read."""

    def __init__(self) -> None:
        self.total = 0
        """Its bytes, rows or files; 0 while that is unknown."""
        self.read: Callable[[], int] = lambda: 0
        """Returns how many of them were read."""

    def share(self) -> float:
        """Return the share that was read, 0 to 1."""
        return self.read() / self.total if self.total else 0.0

    def count(self, items: Sequence[T]) -> Iterator[T]:
        """Yield items one after the other, as the parts of the source."""
        done = 0
        self.total, self.read = len(items), lambda: done
        for done, item in enumerate(items):  # noqa: B007 - `read` reads it
            yield item
        self.end()

    def end(self) -> None:
        """Note that all was read."""
        total = self.total
        self.read = lambda: total


def read_rows(source: str, *, split: str = "train", meter: Meter | None = None) -> Iterator[tuple[str, Any]]:
    """Read rows one after another.

    Args:
        source: as for `lisatune.data.records.read_records`.
        split: split of a hub dataset.
        meter: shows how much was read.

    Yields:
        Place (`FILE, line N`) and row. In place of an unreadable row comes a `BadRowError`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file type is unknown, or the file, folder or dataset cannot be read.
        ImportError: reading this source needs a package of lisatune[train] that is not installed.
    """
    try:
        yield from _open_source(source, split, meter or Meter())
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        suffix = Path(source).suffix
        # pyarrow has no class of its own for a .zst file that is cut off or damaged.
        if suffix not in COMPRESSED or (isinstance(error, OSError) and type(error) not in DAMAGED):
            raise
        name = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}[suffix]
        raise ValueError(
            f"{source} is not a complete {name} file ({error}); create or download it again"
        ) from error


def hash_content(source: str, split: str = "train") -> str:
    """Hash what `read_rows` would read; errors as there.

    Of a file or folder these are the bytes of its files, of a hub dataset the files that it was loaded into.
    """
    path = Path(source).expanduser()
    digest = hashlib.sha256(split.encode())
    files: list[Path] = []
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif has_splits(source):
        files = [Path(file["filename"]) for file in _load_from_hub(source, split).cache_files]
    for file in files:
        name = file.relative_to(path) if path.is_dir() else file.suffixes
        digest.update(f"{name} {sha256_of(file)} ".encode(errors="surrogateescape"))
    if not files:  # it is small, is in memory, or does not exist
        for place, row in read_rows(source, split=split):
            digest.update(f"{place} {row}".encode())
    return digest.hexdigest()


def _open_source(source: str, split: str, meter: Meter) -> Iterator[tuple[str, Any]]:
    name, _, part = source.partition(":")
    if name == "python-docs":
        pairs = python_docs.make_pairs(part or "train")  # type: ignore[arg-type]  # it checks the part
        return ((source, {"instruction": pair["prompt"], "output": pair["completion"]}) for pair in pairs)
    path = Path(source).expanduser()
    suffix = file_type(path)
    if path.is_dir():
        return _read_folder(path, meter)
    if not path.exists():
        if _is_on_hub(source):
            return _read_hub(source, split, meter)
        hint = _suggest(source) or "; check the path"
        hint = "; give the path by which this machine knows it" if _is_windows_path(source) else hint
        hint = "; addresses and patterns need data.streaming: true" if _is_pattern(source) else hint
        hint = f"; several sources are a list: [{source.replace(',', ', ')}]" if "," in source else hint
        raise FileNotFoundError(f"there is no file or folder {source}{hint}")
    if suffix not in EXTENSIONS:
        raise ValueError(
            f"cannot read {source}: unknown file type {suffix or '(none)'}; "
            f"use {', '.join(EXTENSIONS)} (also {', '.join(COMPRESSED)}) or a folder of .txt files"
        )
    refuse_lfs_pointer(path)
    return {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_json)(path, meter)


def has_splits(source: str) -> bool:
    """Whether a source is a data set on the hub, which has splits."""
    is_local = Path(source).expanduser().exists() or source.partition(":")[0] == "python-docs"
    return not is_local and _is_on_hub(source)


def _is_on_hub(source: str) -> bool:
    """Whether the name of something that is not on this machine may be one of the hub."""
    path = Path(source)
    is_path = file_type(path) in (*EXTENSIONS, ".txt") or path.suffix in COMPRESSED or _is_pattern(source)
    return not (is_path or _is_windows_path(source) or source.startswith((".", "/", "~")))


def _is_pattern(source: str) -> bool:
    """Whether it is an address or a pattern, of which `data.streaming` makes a list of files."""
    return "://" in source or any(sign in source for sign in "*?[{")


def _is_windows_path(source: str) -> bool:
    return "\\" in source or re.match("[A-Za-z]:/", source) is not None


def _suggest(source: str) -> str:
    """Suggest the file or folder whose name is nearest; empty if none is near."""
    path = Path(source).expanduser()
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*")], 1, 0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def file_type(path: Path) -> str:
    """Tell the type of a file: its extension, or the one before that of the compression."""
    return Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower()


@contextmanager
def open_file(path: Path, meter: Meter | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes as they were before they were compressed."""
    with path.open("rb") as raw:
        if meter is not None:
            meter.total, meter.read = path.stat().st_size, raw.tell
        try:
            with _decompress(raw, path.suffix) as file:
                yield file
        finally:
            if meter is not None:
                meter.end()


def _decompress(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError('reading .zst needs pyarrow: pip install "lisatune[train]"') from error
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(raw))
    return cast(IO[bytes], gzip.open(raw)) if suffix == ".gz" else raw


def _read_json(path: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    """One object per line, or in a .json file a list of objects."""
    if file_type(path) == ".json":
        with open_file(path) as file:
            text = file.read()
        if text.lstrip(BOM + b" \t\r\n").startswith(b"["):
            place, rows = _parse(text.removeprefix(BOM), path, 1)
            if isinstance(rows, BadRowError):
                raise ValueError(f"{place}: {rows}")
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(meter.count(rows), 1))
            return
    with open_file(path, meter) as file:
        for number, line in enumerate(file, 1):
            if line.strip(BOM + b" \t\r\n"):
                yield _parse(line.removeprefix(BOM).rstrip(), path, number)


def _parse(text: bytes, path: Path, start_line: int) -> tuple[str, Any]:
    line = start_line
    try:
        return f"{path}, line {line}", json.loads(text.decode())
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        problem = f"not UTF-8 (byte 0x{text[error.start]:02x}); save it as UTF-8"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].strip()
        if (before.endswith(",") or after.startswith(",")) and after.lstrip(", \n")[:1] in ("", "]", "}"):
            problem = f"not JSON (a comma with nothing after it, near column {error.colno}); delete the comma"
        else:
            hint = "" if text.startswith(b"[") else "; one record is one JSON object on one line"
            problem = f"not JSON ({error.msg} at column {error.colno}){hint}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        problem = f"not JSON that can be read ({error})"
    return f"{path}, line {line}", BadRowError(problem)


def _read_csv(path: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    try:
        with open_file(path) as first:
            header = first.readline()
        delimiter = next((sign for sign in ",;\t" if sign.encode() in header), ",")
        with (
            open_file(path, meter) as binary,
            io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            for row in iter(partial(_next_row, reader), None):
                problem = BadRowError(f"more fields than the header's {len(reader.fieldnames or ())}")
                yield f"{path}, line {reader.line_num}", problem if None in row else row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: not CSV ({error}); check the quotes"
        ) from error


def _next_row(reader: "csv.DictReader[str]") -> dict[str | Any, Any] | None:
    """Read a row, None after the last. Its fields may be longer than 128 KiB, csv's limit for all readers."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)  # now, because another file may be read before the next row of this one


def _read_parquet(path: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading .parquet needs pyarrow: pip install "lisatune[train]"') from error
    number = 0
    try:
        with open_file(path) as file:
            table = pyarrow.parquet.ParquetFile(
                io.BytesIO(file.read()) if path.suffix in COMPRESSED else path
            )
        meter.total, meter.read = table.metadata.num_rows, lambda: number
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file after row {number}: {error}") from error


def _read_folder(folder: Path, meter: Meter) -> Iterator[tuple[str, Any]]:
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        hint = "name a file or another folder"
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            hint = "it is the folder of a model; name one of data, or a file"
        elif any(folder.rglob("*.arrow")):
            hint = "write the data set with its method to_parquet"
        elif files := sorted(path for path in folder.rglob("*") if file_type(path) in EXTENSIONS):
            hint = f"name one file, such as {files[0]}"
        raise ValueError(f"folder {folder} has no .txt file in it or below, it holds {names}; {hint}")
    for path in meter.count(paths):
        refuse_lfs_pointer(path)
        text = path.read_bytes().removeprefix(BOM)
        yield str(path), {"text": text.decode(errors="surrogateescape")}


def _read_hub(source: str, split: str, meter: Meter) -> Iterator[tuple[str, Any]]:
    rows = meter.count(_load_from_hub(source, split))
    return ((f"{source}, {split} row {number}", row) for number, row in enumerate(rows, 1))


def list_hub_files(source: str, split: str) -> list[str]:
    """List the files of a split of a hub data set as hf:// addresses with the commit.

    Raises:
        FileNotFoundError: the hub has no such data set, and no file has that name.
        ValueError: the data set has no such split, or is not made of files.
        ImportError: datasets is not installed.
    """
    if not _is_on_hub(source):
        raise FileNotFoundError(
            f"there is no file or folder {source}{_suggest(source) or '; check the path'}"
        )
    datasets = _check_hub(source)
    name, _, config = source.partition(":")
    try:
        files = datasets.load_dataset_builder(name, config or None).config.data_files or {}
        if split not in files:
            raise ValueError(f"it has no split of that name, but {', '.join(map(str, files)) or 'none'}")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explain_hub(source, split, error) from error
    return [str(file) for file in files[split]]


def _load_from_hub(source: str, split: str) -> Any:
    datasets = _check_hub(source)
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explain_hub(source, split, error) from error


def _explain_hub(source: str, split: str, error: Exception) -> ValueError:
    return ValueError(
        f"cannot load split {split!r} of {source!r} from the Hugging Face hub, and no file or folder has "
        f"that name: {first_line(error)}"
    )


def _check_hub(source: str) -> Any:
    """Ask the hub whether it has a data set, and return the package `datasets`."""
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise ImportError('reading from the hub needs datasets: pip install "lisatune[train]"') from error
    name = source.partition(":")[0]
    problem = ask_hub(name, "dataset")
    if problem and not constants.HF_HUB_OFFLINE:  # offline, datasets looks for an earlier download
        earlier = (
            "; set HF_HUB_OFFLINE=1 to use an earlier download" if problem.startswith(UNREACHABLE) else ""
        )
        raise FileNotFoundError(
            f"there is no file or folder {source}, and {problem}{_suggest(name)}{earlier}"
        )
    return datasets
