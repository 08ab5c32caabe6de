"""Batches of rows: how they are padded, which rows are in which, and each rank's share.

Shapes: B = rows of a batch, T = tokens of a row, padding included.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lisatune.data.rows import TokenRow
from lisatune.distributed import ranks
from lisatune.losses.causal_lm import IGNORE

__all__ = ["Order", "collate", "my_share"]


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
        `use_cache=False` to the model with them: with a cache, transformers ignores the borders. Of rows with
        a number also `number`, int64 [B].

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
    return batch | ({"number": torch.cat([row["number"] for row in rows])} if "number" in rows[0] else {})


class Order:
    """The rows of each batch: a new shuffle per epoch, every row once, and the last batch may be short.

    `batch` is a pure function of (seed, micro_step), so a resumed run needs to know only the micro-step.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(
                f"order needs rows and a batch size >= 1, got {num_rows} rows, batch {batch_size}"
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = -(-num_rows // batch_size)
        self._epoch, self._rows = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, micro_step: int) -> list[int]:
        """Return the indices of a micro-step's rows; micro-steps count from 0 through all epochs."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        if epoch != self._epoch:
            key = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=7).digest()
            rng = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            self._epoch, self._rows = epoch, torch.randperm(self.num_rows, generator=rng)
        rows: list[int] = self._rows[index * self.batch_size : (index + 1) * self.batch_size].tolist()
        return rows


def my_share(rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
    """Take this rank's rows of a batch; if there are none, a row without loss, as every rank must compute."""
    mine = rows[ranks.rank() :: ranks.count()]
    if mine:
        return mine
    ids = rows[0]["input_ids"][:2]
    blank = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
    return [blank | ({"seq_lengths": torch.tensor([len(ids)])} if "seq_lengths" in rows[0] else {})]
