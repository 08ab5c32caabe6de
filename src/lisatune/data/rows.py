"""Where tokens are kept, and the rows of training that are cut out of them.

`Documents` holds the tokens of all records one after the other, in memory or in a file. What carries loss is
kept as spans of positions: a label is the token id at the same position, or -100. `Rows` are slices of it,
two numbers each. A row becomes a tensor when somebody asks for it. So memory depends on the number of rows
and records, about 12 and 40 bytes each, and not on their tokens.

Shapes: D = documents, N = tokens of all, S = spans of loss, P = pieces of documents, R = rows, T = tokens of
a row.
"""

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lisatune.console import follow
from lisatune.losses.causal_lm import IGNORE

__all__ = ["Documents", "Encoded", "Rows", "TokenFile", "TokenRow"]

TokenRow = dict[str, Tensor]
"""`input_ids` and `labels`, int64 [T]; a packed row also has `seq_lengths`, its documents' lengths."""

Ints = NDArray[np.int64]


class Tokens(Protocol):
    """Token ids by position: a numpy array, or a file that is read like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> NDArray[Any]: ...


class TokenFile:
    """A file of token ids, of which slices are read.

    It is read and not mapped: pages of a memory map that were touched count as memory of the process, so an
    epoch would make it grow by the size of the file. The open file stays readable when its name is deleted.

    Args:
        path: the file.
        dtype: of its numbers, such as "uint16".
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._length = os.fstat(self._file).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        start, stop, _ = part.indices(self._length)
        size = self.dtype.itemsize
        data = os.pread(self._file, (stop - start) * size, start * size)
        return np.frombuffer(data, self.dtype)


@dataclass(frozen=True)
class _Joined:
    """The tokens of several sources, one after the other."""

    parts: tuple[Tokens, ...]

    @cached_property
    def borders(self) -> Ints:
        """Where each part begins, and the end: [parts + 1]."""
        return np.array([0, *accumulate(map(len, self.parts))])

    def __len__(self) -> int:
        return int(self.borders[-1])

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        """Read a slice, which may lie in several parts."""
        start, stop, _ = part.indices(len(self))
        first, last = (int(index) for index in np.searchsorted(self.borders, (start, stop - 1), "right") - 1)
        at = self.borders
        pieces = [
            self.parts[index][max(start - at[index], 0) : stop - at[index]]
            for index in range(first, min(last, len(self.parts) - 1) + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, np.uint32)])


@dataclass(frozen=True)
class Encoded:
    """Tokens of some records, of their whole length, one record after the other."""

    ids: NDArray[np.uint32]
    """[n]."""
    lengths: Ints
    """Tokens of each record."""
    spans: Ints
    """[s, 2]: begin and end of what carries loss, in positions of `ids`; increasing, without overlaps."""

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """A hash of each record's tokens and of its spans, 16 bytes."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        of_spans = np.searchsorted(self.spans[:, 0], np.append(starts, ends[-1:]))
        ids = memoryview(self.ids.tobytes())
        found = []
        for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            spans = self.spans[of_spans[index] : of_spans[index + 1]] - start
            digest = hashlib.blake2b(ids[4 * start : 4 * end], digest_size=16)
            digest.update(spans.tobytes())
            found.append(digest.digest())
        return np.array(found, dtype="S16")


@dataclass(frozen=True)
class Documents:
    """The tokens of records, each of its whole length, and what of them carries loss."""

    tokens: Tokens
    """[N], in memory or in a file."""
    offsets: Ints
    """Where each document begins, and the end of the last: [D + 1]."""
    spans: Ints
    """[S, 2]: begin and end of what carries loss, in positions of `tokens`; increasing, without overlaps."""
    digests: NDArray[np.bytes_]
    """Hash of each document, 16 bytes: [D]. Equal documents have equal hashes."""

    @classmethod
    def gather(cls, parts: Iterable[Encoded]) -> Self:
        """Keep encoded records in memory."""
        found = list(parts) or [Encoded(np.zeros(0, np.uint32), np.zeros(0, np.int64), no_spans())]
        starts = accumulate((len(part.ids) for part in found[:-1]), initial=0)
        return cls(
            np.concatenate([part.ids for part in found]),
            np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in found]))]),
            np.concatenate([part.spans + start for part, start in zip(found, starts, strict=True)]),
            np.concatenate([part.digests for part in found]),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def _loss_before_span(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])

    def count_loss(self, starts: Ints, lengths: Ints) -> Ints:
        """Count the loss-carrying tokens of slices; the first token of a slice carries none."""
        found: Ints = np.maximum(self._loss_before(starts + lengths) - self._loss_before(starts + 1), 0)
        return found

    def _loss_before(self, positions: Ints) -> Ints:
        """Count the loss-carrying tokens before each position."""
        spans = np.searchsorted(self.spans[:, 0], positions)
        ends = np.concatenate([[0], self.spans[:, 1]])[spans]
        before: Ints = self._loss_before_span[spans] - np.maximum(ends - positions, 0)
        return before

    def first_loss(self, documents: Ints) -> Ints:
        """Return where the loss of each document begins, in tokens from its start; 0 if it has none."""
        starts, ends = self.offsets[documents], self.offsets[documents + 1]
        firsts = np.append(self.spans[:, 0], len(self.tokens))[np.searchsorted(self.spans[:, 0], starts)]
        return np.where(firsts < ends, firsts - starts, 0)

    def read(self, start: int, length: int) -> tuple[Ints, Ints]:
        """Read token ids and labels of a slice, int64 [length] each; the first label is -100."""
        ids = self.tokens[start : start + length].astype(np.int64)
        labels = np.full(length, IGNORE)
        index = int(np.searchsorted(self.spans[:, 1], start, "right"))
        while index < len(self.spans) and self.spans[index, 0] < start + length:
            begin, end = (max(int(position) - start, 0) for position in self.spans[index])
            labels[begin:end] = ids[begin:end]
            index += 1
        labels[:1] = IGNORE
        return ids, labels


def no_spans() -> Ints:
    """Return spans of loss where there are none."""
    return np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Rows(Sequence[TokenRow]):
    """Rows of tokens with labels: each a piece of a document, or several pieces if it is packed."""

    documents: Documents
    starts: Ints
    """Where each piece begins, in positions of `documents.tokens`: [P]."""
    piece_lengths: NDArray[np.int32]
    """Tokens of each piece: [P]."""
    borders: Ints | None = None
    """Packed rows: row r has the pieces borders[r] to borders[r + 1], so [R + 1]. None: a piece a row."""

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> Self:
        """Keep made-up rows of `input_ids` and `labels` in memory; the first label of a row never counts.

        Raises:
            ValueError: a label is neither -100 nor the token at its position.
        """
        parts = []
        for number, row in enumerate(rows, 1):
            ids, labels = (np.asarray(row[name], np.int64) for name in ("input_ids", "labels"))
            learned = labels != IGNORE
            if not np.array_equal(ids[learned], labels[learned]):
                raise ValueError(f"row {number} has a label that is neither {IGNORE} nor the token there")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(np.int8), [0]])))
            parts.append(Encoded(ids.astype(np.uint32), np.array([len(ids)]), edges.reshape(-1, 2)))
        return cls.whole(Documents.gather(parts))

    @classmethod
    def whole(cls, documents: Documents) -> Self:
        """Make a row of each document."""
        return cls(documents, documents.offsets[:-1], np.diff(documents.offsets).astype(np.int32))

    @classmethod
    def join(cls, parts: "Sequence[Rows]") -> "Rows":
        """Put the rows of several sources one after the other: all of them packed, or none."""
        if len(parts) == 1:
            return parts[0]
        each = [part.documents for part in parts]
        at = list(accumulate((len(documents.tokens) for documents in each), initial=0))
        documents = Documents(
            _Joined(tuple(documents.tokens for documents in each)),
            np.concatenate([[0], *(one.offsets[1:] + start for one, start in zip(each, at, strict=False))]),
            np.concatenate([one.spans + start for one, start in zip(each, at, strict=False)]),
            np.concatenate([one.digests for one in each]),
        )
        borders = None
        if all(part.borders is not None for part in parts):
            sizes = [np.diff(part.borders) for part in parts if part.borders is not None]
            borders = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        starts = np.concatenate([part.starts + start for part, start in zip(parts, at, strict=False)])
        return cls(documents, starts, np.concatenate([part.piece_lengths for part in parts]), borders)

    def __len__(self) -> int:
        return len(self.starts) if self.borders is None else len(self.borders) - 1

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "TokenRow | Rows":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]
        if self.borders is None:
            ids, labels = self.documents.read(int(self.starts[index]), int(self.piece_lengths[index]))
            return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        lengths = self.piece_lengths[self.borders[index] : self.borders[index + 1]]
        starts = self.starts[self.borders[index] : self.borders[index + 1]]
        pieces = [
            self.documents.read(*piece) for piece in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        ids, labels = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "seq_lengths": torch.from_numpy(lengths.astype(np.int64)),
        }

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    def take(self, rows: Ints) -> "Rows":
        """Return some rows, by their indices."""
        if self.borders is None:
            return replace(self, starts=self.starts[rows], piece_lengths=self.piece_lengths[rows])
        sizes = np.diff(self.borders)[rows]
        ends = np.cumsum(sizes)
        pieces = np.arange(sizes.sum()) - np.repeat(ends - sizes - self.borders[rows], sizes)
        borders = np.concatenate([[0], ends])
        return Rows(self.documents, self.starts[pieces], self.piece_lengths[pieces], borders)

    def _per_row(self, of_pieces: NDArray[Any]) -> Ints:
        if self.borders is None or not len(of_pieces):
            return of_pieces.astype(np.int64)
        return np.add.reduceat(of_pieces.astype(np.int64), self.borders[:-1])

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row: [R]."""
        return self._per_row(self.piece_lengths)

    @cached_property
    def loss_counts(self) -> Ints:
        """Loss-carrying tokens of each row: [R]."""
        return self._per_row(self.documents.count_loss(self.starts, self.piece_lengths.astype(np.int64)))

    @cached_property
    def highest(self) -> int:
        """The highest token id of all documents; 0 if there are none."""
        num_tokens, size = len(self.documents.tokens), 2**22
        parts = (self.documents.tokens[start : start + size] for start in range(0, num_tokens, size))
        return max((int(part.max()) for part in parts), default=0)

    @cached_property
    def sha256(self) -> str:
        """Hash of the rows in their order: tokens, labels and documents' lengths."""
        digest = hashlib.sha256()
        with follow("hashing rows", len(self)) as advance:
            for done, row in enumerate(self, 1):
                for name in sorted(row):
                    digest.update(f"{name} {len(row[name])} ".encode())
                    digest.update(row[name].numpy().astype("<i8", copy=False).tobytes())
                advance(done)
        return digest.hexdigest()
