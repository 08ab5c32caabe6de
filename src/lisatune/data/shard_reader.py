"""The records of a stream's shards, one shard after the other: what fails is tried again, then named.

What is left out of a shard is counted record by record, so that nothing is left out silently where a run ends
in the middle of one.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lisatune.console import first_line
from lisatune.data.cache import explain_cache_errors
from lisatune.data.records import Record, RecordReader
from lisatune.data.shards import ShardFolder, is_gone, is_of_disk, is_worth_another_try, read_shard
from lisatune.recipe import DataConfig

__all__ = ["ShardReader", "StreamError"]

WAITS: tuple[float, ...] = (1, 4, 16)
"""Seconds before each further try to read a shard."""


class StreamError(OSError):
    """A stream cannot continue: a shard cannot be read, or a record is bad. The message names it."""


class ShardReader:
    """Reads shards, and keeps what there is to say of them.

    Args:
        shards: their names, from `list_shards`.
        data: the section `data` of a recipe.
        cache: the folder of prepared tokens, in which shards from elsewhere are while they are read.
        stop: is set when the run is over.

    Raises:
        OSError: the cache cannot be written.
    """

    def __init__(self, shards: Sequence[str], data: DataConfig, cache: Path, stop: threading.Event) -> None:
        self._shards, self._data, self._cache, self._stop = shards, data, cache, stop
        with explain_cache_errors(cache):
            self._folder = ShardFolder(cache, shards, stop.is_set)
        self._notes: list[str] = []
        self._said: set[str] = set()
        self._skipped = self._media = 0

    def read(self, index: int, counted: int = 0) -> Iterator[tuple[Record, str]]:
        """Yield the records of a shard with their kind. One that breaks off is fetched and tried again.

        Args:
            index: which shard.
            counted: what was left out up to this record was counted before.

        Raises:
            StreamError: it cannot be read, or a record is bad.
        """
        shard, data, done = self._shards[index], self._data, 0
        keys = ("kind", "on_bad_row", "fields", "text_only")
        how: dict[str, Any] = {key: getattr(data, key) for key in keys}
        how["needs_answer"] = data.needs_answers
        left_out = (0, 0)
        for wait in (*WAITS, None):
            path = ""
            try:
                with self._folder.fetch(shard) as file:
                    path = str(file)
                    reader = RecordReader(path, **how, rows=read_shard)
                    for number, (_, record) in enumerate(reader, 1):
                        if self._stop.is_set():
                            raise StreamError("the run is over")
                        if number > done:
                            done = number
                            left_out = self._count(reader, left_out, shard, is_new=number > counted)
                            yield record, reader.kind
                    self._count(reader, left_out, shard, is_new=True)
                    return
            except StreamError:
                raise
            except (OSError, ValueError) as error:
                problem = first_line(error).replace(path, shard) if path else first_line(error)
                if "://" in shard and is_of_disk(error):
                    with explain_cache_errors(self._cache, what=f"the shard {shard}", kind=StreamError):
                        raise
                if not is_worth_another_try(error):
                    raise StreamError(problem) from error
                if wait is None or is_gone(error):
                    often = "" if wait is not None else f" after {len(WAITS) + 1} tries"
                    raise StreamError(
                        f"cannot read the shard {shard}{often} ({problem}); check its name and the connection"
                    ) from error
            if self._stop.wait(wait):
                raise StreamError("the run is over")

    def take_counts(self) -> tuple[int, int]:
        """Return how many records were skipped, and how many lost their media, since the last call."""
        counts = self._skipped, self._media
        self._skipped = self._media = 0
        return counts

    def take_notes(self) -> list[str]:
        """Return the warnings since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Delete what was downloaded."""
        self._folder.close()

    def _count(
        self, reader: RecordReader, before: tuple[int, int], shard: str, *, is_new: bool
    ) -> tuple[int, int]:
        """Count what a reader left out since its last record, and note what there is to say."""
        now = reader.skipped, reader.num_media
        if is_new:
            self._skipped += now[0] - before[0]
            self._media += now[1] - before[1]
        if reader.skipped:
            first = reader.first_skipped.replace(reader.source, shard)
            self._say(f"{shard} skipped", f"{first}; skipped, and more of this shard are counted")
        for field in reader.unused:
            self._say(f"{field} unused", f"{shard}: nothing reads the field {field}")
        if reader.num_empty:
            self._say("empty", f"{shard} has empty answers; from these the model learns to say nothing")
        return now

    def _say(self, what: str, note: str) -> None:
        """Note something, once for the whole stream."""
        if what not in self._said:
            self._said.add(what)
            self._notes.append(note)
