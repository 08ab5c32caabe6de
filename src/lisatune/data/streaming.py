"""Data that is read while a run trains: shard after shard, window after window.

A stream is an endless sequence of records: all shards in a shuffled order, then again in another. A window is
so many records of it, one after the other. They are tokenised, divided and packed as a file would be, and
their rows are shuffled. The windows' rows, one window after the other, are what a run trains on. While it
trains on one window, a thread makes the next.

The rows of a window depend on the place where it begins and on the seed alone. So a checkpoint needs to know
that place, and a resumed run reads nothing that lies before it but the beginning of one shard.

On several ranks the shards, in their order, are dealt out to the ranks, and each rank has windows of its own.
If there are fewer shards than ranks, all ranks read all of them, and each trains on its part of every batch.
"""

import copy
import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from lisatune.console import plural
from lisatune.data.batches import shuffle
from lisatune.data.cache import hash_tokenizer
from lisatune.data.examples import Examples, divide, pack
from lisatune.data.records import Record, count_characters
from lisatune.data.rows import Documents, TokenRow
from lisatune.data.shard_reader import ShardReader, StreamError
from lisatune.data.shards import list_shards
from lisatune.data.tokens import check_wishes, encode, is_chat
from lisatune.distributed import ranks
from lisatune.recipe import DataConfig

__all__ = ["Place", "Stream", "StreamError", "Window"]

WINDOW_CHARACTERS = 2**25
"""Text at which a window ends before it has all its records, so that memory is bounded."""


@dataclass(frozen=True)
class Place:
    """Where a window of a rank's stream begins."""

    window: int = 0
    """Its number."""
    row: int = 0
    """Rows of all windows before it."""
    shard: int = 0
    """Number of its first shard in the rank's endless order of shards."""
    record: int = 0
    """Records of that shard that are in windows before it, or are held out."""
    skipped: int = 0
    """Records before it that could not be used."""
    cut: int = 0
    """Records of all windows before it that were cut at max_length."""
    dropped: int = 0
    """Records of all windows before it that were left out: too long, or no answer left."""
    media: int = 0
    """Records before it without their images, sound or videos."""
    seen: int = 0
    """Records of all windows before it that are held out too."""


@dataclass(frozen=True)
class Window:
    """Some records of a stream as rows, in the order in which they train."""

    place: Place
    examples: Examples
    end: Place
    """Where the next window begins."""
    kind: str
    is_chat: bool
    notes: tuple[str, ...]
    """Warnings about its records."""


class Stream:
    """The rows of a stream for this rank, micro-step by micro-step. All ranks must call the same methods.

    Args:
        data: the section `data` of a recipe.
        tokenizer: the tokenizer of the model to train; the stream works with a copy.
        seed: names the order of shards and of the rows in a window.
        batch_size: rows of a micro-step on each rank.
        cache: the folder of prepared tokens, in which shards from elsewhere are while they are read.

    Attributes:
        shards: the shards in the order of their names.
        vocabulary: set to the rows of the model's embedding, to refuse a token that is not there.

    Raises:
        FileNotFoundError, ValueError, ImportError: as in `list_shards`.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, *, seed: int, batch_size: int, cache: Path) -> None:
        self.shards = [shard for source in data.sources for shard in list_shards(source.path, data.split)]
        self.vocabulary: int | None = None
        self._data, self._seed = data, seed
        self._parts = ranks.count() if len(self.shards) >= ranks.count() else 1
        self._batch_size = batch_size * ranks.count() // self._parts
        self._tokenizer = copy.deepcopy(tokenizer)  # a tokenizer may not work in two threads at once
        self._held_out: dict[int, int] = {}
        self._windows: list[Window] = []
        self._next: Future[Window] | None = None
        self._reading: Iterator[tuple[int, int, Record, str]] | None = None
        self._held_out_digests = np.zeros(0, "S16")
        self._has_told_of_seen = False
        self._stop = threading.Event()
        self._reader = ShardReader(self.shards, data, cache, self._stop)
        self._thread = ThreadPoolExecutor(1, "lisatune-stream")

    @property
    def identity(self) -> str:
        """Hash of what the rows depend on besides the recipe: the shards' names and sizes, the tokenizer."""
        digest = hashlib.sha256(hash_tokenizer(self._tokenizer).encode())
        for shard in self.shards:
            size = "" if "://" in shard else Path(shard).stat().st_size
            digest.update(f"\0{shard} {size}".encode())
        return digest.hexdigest()

    def hold_out(self, most: int) -> list[Record]:
        """Take the first records, in the order of the shards' names, out of the stream.

        Args:
            most: how many, >= 1.

        Raises:
            StreamError: a shard cannot be read, or a record is bad.
        """
        held_out: list[Record] = []
        for index in range(len(self.shards)):
            if len(held_out) == most:
                break
            for record, _ in self._reader.read(index):
                held_out.append(record)
                self._held_out[index] = self._held_out.get(index, 0) + 1
                if len(held_out) == most:
                    break
        self._reader.take_counts()  # they are counted where the shards' other records are read
        return held_out

    def watch_for(self, held_out: Documents) -> None:
        """Count and name the records of the stream that are in the held-out data too."""
        self._held_out_digests = held_out.digests

    def seek(self, places: Sequence[Mapping[str, int]]) -> Window:
        """Go to the window that begins at this rank's place, and return it.

        Args:
            places: from `places`; empty: the beginning.

        Raises:
            ValueError: they are of another number of ranks.
            StreamError: the window cannot be read.
        """
        if places and len(places) != self._parts:
            raise ValueError(
                f"the run began with its shards divided among {len(places)} ranks and would continue with "
                f"{self._parts}; resume it on as many ranks as it began with"
            )
        own = places[ranks.rank() % self._parts] if places else {}
        wanted = Place(**{each.name: int(own.get(each.name, 0)) for each in fields(Place)})
        if self._windows and self._windows[0].place == wanted:
            return self._windows[0]
        if self._next is not None:
            self._next.exception()  # wait until the thread has done what it was asked for
        self._windows, self._next, self._reading = [], None, None
        self._reader.take_counts()
        self._fill(wanted.row + 1, wanted)
        return self._windows[0]

    def places(self, micro_step: int) -> list[dict[str, int]]:
        """Return where the windows begin that hold the first row of a micro-step, for a checkpoint.

        There is one for each rank, or one for all if each reads all shards.
        """
        row = micro_step * self._batch_size
        windows = (window for window in self._windows if window.place.row <= row < window.end.row)
        found = next(windows, None)
        return self._gather(self._windows[-1].end if found is None else found.place)

    def _gather(self, own: Place) -> list[dict[str, int]]:
        """Return a place of each rank, or this one if each rank reads all shards."""
        names, numbers = zip(*asdict(own).items(), strict=True)
        if self._parts == 1:
            return [asdict(own)]
        every = [0.0] * (len(names) * self._parts)
        every[ranks.rank() * len(names) : (ranks.rank() + 1) * len(names)] = numbers
        every = ranks.sum_over_ranks(*every)
        starts = range(0, len(every), len(names))
        return [dict(zip(names, map(int, every[start:]), strict=False)) for start in starts]

    def describe(self, micro_step: int) -> str:
        """Say for a reader how much was read for the micro-steps before one, and what was left out of it."""
        row = micro_step * self._batch_size - 1
        ends = (window.end for window in self._windows if window.place.row <= row < window.end.row)
        places = [Place(**each) for each in self._gather(next(ends, self._windows[0].place))]
        ended, skipped, cut, dropped, media, seen = (
            sum(getattr(place, name) for place in places)
            for name in ("shard", "skipped", "cut", "dropped", "media", "seen")
        )
        of_all = f"{ended / len(self.shards):.2f} × all {len(self.shards):,}"
        parts = [f"{plural(ended, 'shard')} read to the end ({of_all})"]
        parts += [f"{plural(skipped, 'record')} skipped: not usable"] if skipped else []
        parts += [f"{plural(cut, 'record')} cut at max_length"] if cut else []
        parts += [f"{plural(dropped, 'record')} dropped: too long, or no answer left"] * bool(dropped)
        parts += [f"{plural(media, 'record')} without images, sound or videos"] if media else []
        parts += [f"{plural(seen, 'record')} in the held-out data too"] if seen else []
        return "; ".join(parts)

    def batch(self, micro_step: int) -> list[TokenRow]:
        """Return this rank's rows of a micro-step. Micro-steps come in rising order.

        Raises:
            StreamError: what comes next cannot be read; on all ranks if it cannot on one.
        """
        first = micro_step * self._batch_size
        last = first + self._batch_size
        self._fill(last, self._windows[-1].end)
        self._windows = [window for window in self._windows if window.end.row > first]
        if self._next is None:
            self._next = self._thread.submit(self._make_window, self._windows[-1].end)
        mine = slice(ranks.rank(), None, ranks.count()) if self._parts == 1 else slice(None)
        return [self._row(number) for number in range(first, last)[mine]]

    def close(self) -> None:
        """Stop reading ahead, and delete what was downloaded."""
        self._stop.set()
        self._thread.shutdown()
        self._reader.close()

    def _row(self, number: int) -> TokenRow:
        window = next(each for each in self._windows if each.place.row <= number < each.end.row)
        return window.examples.rows[number - window.place.row]

    def _fill(self, last: int, place: Place) -> None:
        """Wait for the windows from a place on that have rows up to `last`.

        Raises:
            StreamError: on all ranks, if one of them could not read its windows.
        """
        error: Exception | None = None
        try:
            while not self._windows or self._windows[-1].end.row < last:
                self._add_window(self._windows[-1].end if self._windows else place)
        except (OSError, ValueError, RuntimeError, ImportError) as caught:
            error, self._reading = caught, None
        if ranks.max_over_ranks(int(error is not None)):
            what = "another rank could not read its part of the stream, and says why"
            raise StreamError(what if error is None else str(error)) from error

    def _add_window(self, place: Place) -> None:
        """Wait for the window that begins at a place."""
        future = self._next or self._thread.submit(self._make_window, place)
        self._next = None
        window = future.result()
        if self.vocabulary is not None and window.examples.rows.highest >= self.vocabulary:
            raise StreamError(
                f"the tokenizer makes token {window.examples.rows.highest}, and the model has "
                f"{self.vocabulary} (from 0); give the model the tokenizer that it was trained with"
            )
        for note in window.notes:
            warnings.warn(note, stacklevel=4)
        self._windows.append(window)

    def _make_window(self, place: Place) -> Window:
        """Read, tokenise and pack the records of a window; this runs in the thread."""
        self._reading = self._reading or self._read_endlessly(place)
        data = self._data
        kinds: dict[str, str] = {}
        taken: list[tuple[int, int]] = []
        first: Record | None = None

        def take() -> Iterator[Record]:
            nonlocal first
            assert self._reading is not None
            num_characters = 0
            for number, (shard, done, record, kind) in enumerate(self._reading, 1):
                first = first or record
                if kind not in kinds:
                    kinds[kind] = self._shard(shard)
                taken.append((shard, done))
                num_characters += count_characters(record)
                yield record
                if number == data.window or num_characters >= WINDOW_CHARACTERS:
                    return

        source = f"the stream after record {place.record:,} of {self._shard(place.shard)}"
        how: dict[str, Any] = {"loss_on": data.loss_on, "date": data.date}
        documents = Documents.gather(encode(take(), self._tokenizer, source=source, **how))
        notes = self._reader.take_notes()
        is_seen = np.isin(documents.digests, self._held_out_digests)
        if is_seen.any() and not self._has_told_of_seen:
            self._has_told_of_seen = True
            notes.append(self._warn_of_seen(*taken[int(is_seen.argmax())]))
        if len(kinds) > 1:
            both = " and ".join(f"{kind} in {shard}" for kind, shard in kinds.items())
            raise ValueError(f"records of a stream must be of one kind, and there are {both}; set data.kind")
        kind = next(iter(kinds))
        long = check_wishes(source, kind, data.loss_on, data.long)
        every = np.arange(len(documents))
        examples = divide(documents, every, max_length=data.max_length, long=long, source=source)
        if data.packing:
            examples = pack(examples, data.max_length)
        part = f"/{ranks.rank()}" if self._parts > 1 else ""
        order = shuffle(len(examples.rows), f"{self._seed}/window/{place.window}{part}").numpy()
        skipped, media = self._reader.take_counts()
        dropped = examples.num_dropped + examples.num_without_loss
        shard, done = taken[-1]
        end = Place(
            window=place.window + 1,
            row=place.row + len(order),
            shard=shard,
            record=done,
            skipped=place.skipped + skipped,
            cut=place.cut + examples.num_cut,
            dropped=place.dropped + dropped,
            media=place.media + media,
            seen=place.seen + int(is_seen.sum()),
        )
        assert first is not None
        return Window(
            place=place,
            examples=replace(examples, rows=examples.rows.take(order)),
            end=end,
            kind=kind,
            is_chat=is_chat(first),
            notes=tuple(notes),
        )

    def _warn_of_seen(self, shard: int, record: int) -> str:
        return (
            f"record {record:,} of {self._shard(shard)} is in the held-out data too, so held-out loss is "
            "partly loss on training data; take it out. More of them are counted"
        )

    def _shard(self, number: int) -> str:
        return self.shards[self._index(number)]

    def _index(self, number: int) -> int:
        """Return which shard is the n-th of this rank's endless order."""
        of_all = number * self._parts + ranks.rank() % self._parts
        often, index = divmod(of_all, len(self.shards))
        return int(shuffle(len(self.shards), f"{self._seed}/shards/{often}")[index])

    def _read_endlessly(self, place: Place) -> Iterator[tuple[int, int, Record, str]]:
        """Yield records from a place on: number of the shard, records of it so far, record, its kind."""
        num_records = 0
        for number in count(place.shard):
            index = self._index(number)
            counted = place.record if number == place.shard else 0
            before = max(counted, self._held_out.get(index, 0))
            for done, (record, kind) in enumerate(self._reader.read(index, counted), 1):
                if done > before:
                    num_records += 1
                    yield number, done, record, kind
            if not num_records and number >= place.shard + len(self.shards):
                raise ValueError(
                    f"data.validation_limit={self._data.validation_limit} holds out all records of "
                    f"{plural(len(self.shards), 'shard')}, and none is left to train on; lower it, or give "
                    "data.validation"
                )
