"""From documents to rows that train: long ones are split, cut or dropped, and short ones packed together."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from lisatune.data.rows import Documents, Ints, Rows

__all__ = ["Examples", "divide", "pack"]


@dataclass(frozen=True)
class Examples:
    """Sequences of tokens, ready for training."""

    rows: Rows
    num_cut: int = 0
    """Number of records that were longer than `max_length` and were cut at the end."""
    num_without_loss: int = 0
    """Number of records that were left out because no token with loss was left after the cut."""
    num_split: int = 0
    """Number of records that were longer than `max_length` and were divided into several rows."""
    num_dropped: int = 0
    """Number of records that were longer than `max_length` and were left out."""
    num_lost_tokens: int = 0
    """Tokens of records that are in no row, because a record was cut or left out."""

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return int(self.rows.lengths.sum())

    @cached_property
    def num_loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.rows.loss_counts.sum())

    @property
    def lost_share(self) -> float:
        """Share of the records' tokens that is in no row, 0 to 1."""
        return self.num_lost_tokens / (self.num_lost_tokens + self.num_tokens)

    @cached_property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return int(self.rows.lengths.max())

    @property
    def sha256(self) -> str:
        """Hash of the rows in their order: tokens, labels and documents' lengths."""
        return self.rows.sha256


def divide(
    documents: Documents,
    chosen: Ints,
    *,
    max_length: int,
    long: Literal["split", "cut", "drop"],
    source: str,
) -> Examples:
    """Make rows of at most `max_length` tokens out of documents, and leave out rows without loss.

    Args:
        documents: tokens of records of their whole length.
        chosen: indices of the documents to use, in the order of the rows.
        max_length: length of the longest row in tokens.
        long: what happens to a longer document; see `lisatune.data.tokens.tokenize`.
        source: name of the data for error messages.

    Raises:
        ValueError: no row is left.
    """
    starts, lengths = _span(documents, chosen)
    num_tokens, is_long = int(lengths.sum()), lengths > max_length
    num_long, num_dropped = int(is_long.sum()), 0
    if long == "drop" and num_long:
        chosen, starts, lengths = chosen[~is_long], starts[~is_long], lengths[~is_long]
        num_dropped = num_long
    of_document = np.arange(len(chosen))
    if long == "split" and num_long:
        pieces = -(-lengths // max_length)
        of_document = np.repeat(of_document, pieces)
        before = max_length * (np.arange(len(of_document)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        starts, lengths = starts[of_document] + before, lengths[of_document] - before
    lengths = np.minimum(lengths, max_length)
    has_loss = documents.count_loss(starts, lengths) > 0
    is_used = np.zeros(len(chosen), bool)
    is_used[of_document[has_loss]] = True
    rows = Rows(documents, starts[has_loss], lengths[has_loss].astype(np.int32))
    if not len(rows) and num_dropped:
        raise ValueError(
            f"all {num_dropped} records of {source} are longer than max_length={max_length} tokens "
            "and are dropped; set max_length well above that, or long to split or cut"
        )
    if not len(rows) and not documents.count_loss(*_span(documents, chosen)).any():
        raise ValueError(
            f"nothing in {source} carries loss: no record has a message that data.loss_on names, or all of "
            "these are marked not to be learned from (weight: 0 or train: false); name other messages"
        )
    if not len(rows):
        shortest = min(documents.first_loss(chosen).tolist(), default=0)
        raise ValueError(
            f"all answers are cut off by max_length={max_length}: the shortest prompt of {source} "
            f"has {shortest} tokens; set max_length well above that"
        )
    return Examples(
        rows,
        num_cut=num_long if long == "cut" else 0,
        num_without_loss=int((~is_used).sum()),
        num_split=num_long if long == "split" else 0,
        num_dropped=num_dropped,
        num_lost_tokens=num_tokens - int(rows.lengths.sum()),
    )


def _span(documents: Documents, chosen: Ints) -> tuple[Ints, Ints]:
    """Return where documents begin, and their lengths."""
    starts = documents.offsets[chosen]
    return starts, documents.offsets[chosen + 1] - starts


def pack(examples: Examples, max_length: int, advance: Callable[[int], None] = lambda done: None) -> Examples:
    """Put several sequences into one row of at most `max_length` tokens, best fit first.

    The longest sequence comes first, and each goes into the row with the least room that is enough: of equal
    ones into the one that has had this room for longest. These are the rows of TRL's `bfd`, in the same
    order; TRL's function needs all tokens in memory, this one only their number.

    The rows keep the lengths of their documents. From these `collate` makes positions, and from the positions
    transformers makes a mask that keeps attention inside each document.

    Args:
        examples: sequences that are not packed.
        max_length: tokens of a row.
        advance: is told the number of sequences done.

    Raises:
        ValueError: a sequence is longer than `max_length`.

    Reference: "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), §3.
    """
    if examples.longest > max_length:
        raise ValueError(
            f"cannot pack {examples.longest} tokens into max_length={max_length}; tokenize with that length"
        )
    lengths = examples.rows.piece_lengths
    falling = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    with_room: defaultdict[int, deque[int]] = defaultdict(deque)
    rooms, num_rows = 0, 0  # bit n of `rooms`: some row has room for n tokens
    for done, (index, length) in enumerate(zip(falling.tolist(), lengths[falling].tolist(), strict=True)):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].popleft()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = max_length, num_rows, num_rows + 1
        row_of[index] = row
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
        if done % 10_000 == 0:
            advance(done)
    order = falling[np.argsort(row_of[falling], kind="stable")]
    borders = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    packed = Rows(examples.rows.documents, examples.rows.starts[order], lengths[order], borders)
    return replace(examples, rows=packed)
