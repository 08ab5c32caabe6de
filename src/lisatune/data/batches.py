"""Batches of rows: how they are padded, which rows are in which, and each rank's share.

Shapes: B = rows of a batch, T = tokens of a row, padding included.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lisatune.data.rows import TokenRow
from lisatune.distributed import ranks
from lisatune.losses.causal_lm import IGNORE

__all__ = ["Order", "Share", "collate", "my_share", "shuffle"]

LABELS = ("number", "last", "source")
"""What a row may have beside its tokens, int64 [1]: its number among all, or its end; its source's number."""


def collate(rows: Sequence[TokenRow], *, length: int | None = None) -> dict[str, Tensor]:
    """Make a batch of rows, padded on the right with the first token of each row.

    So a batch holds no id and no position that its rows do not hold; many tokenizers have a padding token
    for which the model has no embedding.

    There is no attention mask. Causal attention never looks to the right, so padding changes no real token.
    Where positions restart, transformers keeps attention inside each document, row by row
    (`masking_utils.find_packed_sequence_indices`). In an unpacked row the positions continue through the
    padding, so that no mask is built and the fast causal kernel runs. In a packed row each padding token is
    a document of its own.

    TRL's collator either gives an attention mask, with which transformers ignores the borders, or puts the
    batch into one row (`padding_free`), whose mask has (B·T)² entries.

    Args:
        rows: rows of `Examples`.
        length: T, at least the length of the longest row, which is the default.

    Returns:
        `input_ids`, `labels` (-100 on padding) and `position_ids`, each int64 of shape [B, T]. Pass
        `use_cache=False` to the model with them: with a cache, transformers ignores the borders. Of rows that
        have them also `number`, `last` and `source`, int64 [B].

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    lengths = [len(row["input_ids"]) for row in rows]
    length = length or max(lengths)
    ids_BT = torch.empty(len(rows), length, dtype=torch.int64)
    labels_BT = torch.full((len(rows), length), IGNORE)
    position_ids_BT = torch.arange(length).repeat(len(rows), 1)
    for index, (row, own) in enumerate(zip(rows, lengths, strict=True)):
        ids = torch.as_tensor(row["input_ids"])
        ids_BT[index, :own] = ids
        ids_BT[index, own:] = ids[0]
        labels_BT[index, :own] = torch.as_tensor(row["labels"])
        if "seq_lengths" in row:
            documents = torch.as_tensor(row["seq_lengths"])
            starts = documents.cumsum(0) - documents
            position_ids_BT[index, :own] -= starts.repeat_interleave(documents)
            position_ids_BT[index, own:] = 0
    batch = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": position_ids_BT}
    return batch | {name: torch.cat([row[name] for row in rows]) for name in LABELS if name in rows[0]}


@dataclass(frozen=True)
class Share:
    """What one source of a mixture has, and what it gives."""

    num_rows: int
    """Rows of the source, or pairs; >= 1."""
    per_epoch: int
    """How many of them an epoch of the mixture takes, >= 1; more than it has if some come twice."""


class Order:
    """The rows of each batch: a new shuffle per epoch, every row once, and the last batch may be short.

    In a mixture, an epoch takes `per_epoch` rows of each source, in an order that is shuffled as a whole.
    Each source has a shuffle of its own, which continues over the borders of epochs and is made anew when all
    its rows were taken. So each row of a source is taken once before any is taken again.

    `batch` is a pure function of (seed, micro_step), so a resumed run needs to know only the micro-step.

    Args:
        num_rows: rows, or pairs, of all sources. They are numbered source after source.
        batch_size: rows of a micro-step on all ranks.
        seed: names the shuffles.
        shares: of each source of a mixture; `num_rows` is the sum of theirs. Default: one source, whole.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, *, shares: Sequence[Share] = ()) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(
                f"order needs rows and a batch size >= 1, got {num_rows} rows, batch {batch_size}"
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shares = tuple(shares) or (Share(num_rows, num_rows),)
        self.batches_per_epoch = -(-sum(share.per_epoch for share in self.shares) // batch_size)
        self._epoch, self._rows = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, micro_step: int) -> list[int]:
        """Return the indices of a micro-step's rows; micro-steps count from 0 through all epochs."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._draw(epoch)
        rows: list[int] = self._rows[index * self.batch_size : (index + 1) * self.batch_size].tolist()
        return rows

    def _draw(self, epoch: int) -> Tensor:
        """Return the rows of an epoch."""
        drawn, first = [], 0
        for number, share in enumerate(self.shares):
            start = epoch * share.per_epoch
            stop = start + share.per_epoch
            own = f"/{number}" if number else ""  # a single source has the shuffles that it always had
            passes = range(start // share.num_rows, -(-stop // share.num_rows))
            rows = torch.cat([shuffle(share.num_rows, f"{self.seed}/{each}{own}") for each in passes])
            before = passes.start * share.num_rows
            drawn.append(first + rows[start - before : stop - before])
            first += share.num_rows
        if len(drawn) == 1:
            return drawn[0]
        source_of = torch.repeat_interleave(torch.tensor([share.per_epoch for share in self.shares]))
        source_of = source_of[shuffle(len(source_of), f"{self.seed}/{epoch}/mixture")]
        taken = torch.empty_like(source_of)
        for number, rows in enumerate(drawn):
            taken[source_of == number] = rows
        return taken


def shuffle(count: int, name: str) -> Tensor:
    """Return a permutation of so many numbers; the same name gives the same one."""
    key = hashlib.blake2b(name.encode(), digest_size=7).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(key, "big")))


def my_share(rows: Sequence[TokenRow], rows_per_record: int = 1) -> Sequence[TokenRow]:
    """Take this rank's records of a batch; if there are none, one without loss: every rank must compute."""
    records = [rows[first : first + rows_per_record] for first in range(0, len(rows), rows_per_record)]
    mine = [row for record in records[ranks.rank() :: ranks.count()] for row in record]
    return mine or [_without_loss(row) for row in records[0]]


def _without_loss(row: TokenRow) -> TokenRow:
    """Make the shortest row that a model can read, without loss and with all that the given row has."""
    ids = row["input_ids"][:2]
    blank = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
    blank |= {name: row[name] for name in LABELS if name in row}
    if "last" in row:
        blank["last"] = torch.tensor([len(ids) - 1])
    return blank | ({"seq_lengths": torch.tensor([len(ids)])} if "seq_lengths" in row else {})
