"""Tokens with labels: answer masks, packing, batches, their order, and each rank's share of a batch.

A label is the token id at the same position, or -100 where there is no loss; the loss function shifts labels.
The first token of a sequence never carries loss, because nothing predicts it. The end of a sequence is known
from its length. No mask is ever made from `ids == pad`: in many models the padding token is the token that
ends an answer, and the model would never learn to stop.

Shapes: B = rows of a batch, T = tokens of a row, padding included.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lisatune.data.chat import Chat, common_length, drop_second_bos
from lisatune.data.records import Records
from lisatune.distributed import ranks
from lisatune.losses.causal_lm import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE", "Examples", "Order", "collate", "is_chat", "my_share", "pack", "tokenize"]

TokenRow = dict[str, list[int]]
"""`input_ids` and `labels` of equal length; a packed row also has `seq_lengths`, its documents' lengths."""


@dataclass(frozen=True)
class Examples:
    """Sequences of tokens, ready for training."""

    rows: list[TokenRow]
    num_cut: int
    """Number of records that were longer than `max_length` and were cut at the end."""
    num_without_loss: int
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
        return sum(len(row["input_ids"]) for row in self.rows)

    @cached_property
    def num_loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(len(row["labels"]) - row["labels"].count(IGNORE) for row in self.rows)

    @property
    def lost_share(self) -> float:
        """Share of the records' tokens that is in no row, 0 to 1."""
        return self.num_lost_tokens / (self.num_lost_tokens + self.num_tokens)

    @cached_property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return max(len(row["input_ids"]) for row in self.rows)

    @cached_property
    def sha256(self) -> str:
        """Hash of the rows in their order: tokens, labels and documents' lengths."""
        digest = hashlib.sha256()
        for row in self.rows:
            for name in sorted(row):
                digest.update(f"{name} {len(row[name])} ".encode())
                digest.update(array("q", row[name]).tobytes())
        return digest.hexdigest()


def tokenize(
    records: Records,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    loss_on: Literal["auto", "answers", "last", "all"] = "auto",
    long: Literal["auto", "split", "cut", "drop"] = "auto",
    date: str | None = None,
) -> Examples:
    """Turn records into token ids and labels.

    Messages go through the tokenizer's chat template; a tokenizer without one is given a plain template.
    Plain prompts and completions are joined without a template. The end-of-sequence token follows them, and
    plain text too.

    Args:
        records: from `read_records`.
        tokenizer: the tokenizer of the model to train, with its chat template.
        max_length: length of the longest sequence in tokens.
        loss_on: which tokens carry loss. `answers`: every assistant turn from its first token to the token
            that ends the turn, or a plain completion up to and with the end-of-sequence token. `last`: the
            last of these turns alone. `all`: every token but the first. `auto`: `all` for records of text,
            `answers` for all others.
        long: what happens to a record of more tokens. `split`: it becomes several rows of at most
            `max_length` tokens, one after the other, and the first token of each carries no loss. `cut`: its
            end is cut off. `drop`: it is left out. `auto`: `split` for records of text, `cut` for all others.
        date: the day that the chat template sees as today, YYYY-MM-DD. Default: today.

    Returns:
        Rows of `input_ids` and `labels` (-100 where there is no loss) in the order of the records. A row
        without any loss is left out.

    Raises:
        ValueError: the chat template refuses a record or cannot be used for training, `answers` was asked for
            plain text, the tokenizer has no end-of-sequence token, or `max_length` cuts off every answer.
        ImportError: messages need TRL, which is not installed.

    Example:
        >>> examples = tokenize(read_records("rows.jsonl"), tokenizer, max_length=1024)
        >>> examples.rows[0]["labels"], examples.num_cut, examples.num_without_loss
    """
    if loss_on not in ("auto", "answers", "last", "all"):
        raise ValueError(f"loss_on must be auto, answers, last or all, got {loss_on!r}")
    if long not in ("auto", "split", "cut", "drop"):
        raise ValueError(f"long must be auto, split, cut or drop, got {long!r}")
    if long == "auto":
        long = "split" if records.kind == "text" else "cut"
    if loss_on in ("answers", "last") and records.kind == "text":
        raise ValueError(f"{records.source} is plain text, which has no answers; set loss_on to all or auto")
    chat = Chat(tokenizer, date) if any(is_chat(record) for record in records.rows) else None
    rows: list[TokenRow] = []
    num_long = num_dropped = num_lost = 0
    prompt_lengths = []
    for number, record in enumerate(records.rows, 1):
        try:
            row = _tokenize_record(record, tokenizer, chat, loss_on=loss_on)
        except ValueError as error:
            raise ValueError(f"{records.source}, record {number}: {error}") from error
        is_long = len(row["input_ids"]) > max_length
        num_long += is_long
        if is_long and long == "drop":
            num_dropped, num_lost = num_dropped + 1, num_lost + len(row["input_ids"])
            continue
        pieces = [piece for piece in _divide(row, max_length, all_of_it=long == "split") if _has_loss(piece)]
        num_lost += len(row["input_ids"]) - sum(len(piece["input_ids"]) for piece in pieces)
        rows += pieces
        if not pieces:
            prompt_lengths.append(next((i for i, label in enumerate(row["labels"]) if label != IGNORE), 0))
    if not rows and num_dropped:
        raise ValueError(
            f"all {num_dropped} records of {records.source} are longer than max_length={max_length} tokens "
            "and are dropped; set max_length well above that, or long to split or cut"
        )
    if not rows:
        raise ValueError(
            f"all answers are cut off by max_length={max_length}: the shortest prompt of {records.source} "
            f"has {min(prompt_lengths, default=0)} tokens; set max_length well above that"
        )
    return Examples(
        rows,
        num_cut=num_long if long == "cut" else 0,
        num_without_loss=len(prompt_lengths),
        num_split=num_long if long == "split" else 0,
        num_dropped=num_dropped,
        num_lost_tokens=num_lost,
    )


def _divide(row: TokenRow, max_length: int, *, all_of_it: bool) -> Iterator[TokenRow]:
    """Yield the first `max_length` tokens of a row, or all of it in pieces of that length."""
    for start in range(0, len(row["input_ids"]) if all_of_it else 1, max_length):
        piece = {name: values[start : start + max_length] for name, values in row.items()}
        piece["labels"][:1] = [IGNORE]  # nothing predicts the first token of a sequence
        yield piece


def _has_loss(row: TokenRow) -> bool:
    return any(label != IGNORE for label in row["labels"])


def is_chat(record: dict[str, Any]) -> bool:
    """Whether a record is a conversation, which goes through the chat template."""
    return "messages" in record or isinstance(record.get("prompt"), list)


def _tokenize_record(record: dict[str, Any], tokenizer: Any, chat: Chat | None, *, loss_on: str) -> TokenRow:
    """Turn one record into ids and labels of its whole length."""
    everywhere, tools = loss_on == "all", record.get("tools")
    use_chat = chat is not None and is_chat(record)
    if chat is not None and use_chat:
        messages = record["messages"] if "messages" in record else record["prompt"] + record["completion"]
        first_answer = 1 if "messages" in record else len(record["prompt"])
        if everywhere and any(message.get("train") is False for message in messages):
            raise ValueError(
                "a message is marked not to be learned from (weight: 0 or train: false), but loss_on all "
                "would learn from it; use loss_on answers"
            )
        prefixes = (
            [(chat.render(messages, tools=tools), True)]
            if everywhere
            else chat.render_prefixes(messages, first_answer, tools=tools, last=loss_on == "last")
        )
    elif "prompt" in record:
        prefixes = [(record["prompt"], everywhere), (record["prompt"] + record["completion"], True)]
    else:
        prefixes = [(record["text"], True)]
    texts = [text for text, _ in prefixes]
    # A chat template writes all special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not use_chat, verbose=False)["input_ids"]
    if not use_chat:
        encoded = [drop_second_bos(part, tokenizer) for part in encoded]
    ids: list[int] = list(encoded[-1])
    labels: list[int] = []
    for part, (_, has_loss) in zip(encoded, prefixes, strict=True):
        # A token across a border belongs to the text after the border, as in TRL.
        end = common_length(part, ids)
        labels += ids[len(labels) : end] if has_loss else [IGNORE] * (end - len(labels))
    stops = chat.ends_turn(texts[-1]) if chat and use_chat else ids[-1:] == [tokenizer.eos_token_id]
    if prefixes[-1][1] and not stops:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token to learn to stop at; set its eos_token"
            )
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[:1] = [IGNORE]
    return {"input_ids": ids, "labels": labels}


def pack(examples: Examples, max_length: int) -> Examples:
    """Put several sequences into one row of at most `max_length` tokens, best fit first (TRL's `bfd`).

    The rows keep the lengths of their documents. From these `collate` makes positions, and from the positions
    transformers makes a mask that keeps attention inside each document.

    Raises:
        ValueError: a sequence is longer than `max_length`.
        ImportError: datasets or TRL is not installed.
    """
    try:
        from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
        from trl import pack_dataset
    except ImportError as error:
        raise ImportError('packing needs datasets and trl: pip install "lisatune[train]"') from error
    if examples.longest > max_length:
        raise ValueError(
            f"cannot pack {examples.longest} tokens into max_length={max_length}; tokenize with that length"
        )
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        dataset = Dataset.from_list(examples.rows)
        packed = pack_dataset(dataset, max_length, "bfd", {"batch_size": len(dataset)})
    finally:
        if not were_disabled:
            enable_progress_bars()
    return replace(examples, rows=packed.to_list())


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
        `use_cache=False` to the model with them: with a cache, transformers ignores the borders.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    length = length or max(len(row["input_ids"]) for row in rows)
    ids, labels, positions = [], [], []
    for row in rows:
        padding = length - len(row["input_ids"])
        ids.append(row["input_ids"] + row["input_ids"][:1] * padding)
        labels.append(row["labels"] + [IGNORE] * padding)
        lengths = (*row["seq_lengths"], *[1] * padding) if "seq_lengths" in row else (length,)
        positions.append(list(chain.from_iterable(range(part) for part in lengths)))
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }


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
        self._epoch, self._rows = -1, list[int]()

    def batch(self, micro_step: int) -> list[int]:
        """Return the indices of a micro-step's rows; micro-steps count from 0 through all epochs."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        if epoch != self._epoch:
            key = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=7).digest()
            rng = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            self._epoch, self._rows = epoch, torch.randperm(self.num_rows, generator=rng).tolist()
        return self._rows[index * self.batch_size : (index + 1) * self.batch_size]


def my_share(rows: Sequence[TokenRow]) -> Sequence[TokenRow]:
    """Take this rank's rows of a batch; if there are none, a row without loss, as every rank must compute."""
    mine = rows[ranks.rank() :: ranks.count()]
    if mine:
        return mine
    ids = rows[0]["input_ids"][:2]
    blank = {"input_ids": ids, "labels": [IGNORE] * len(ids)}
    return [blank | ({"seq_lengths": [len(ids)]} if "seq_lengths" in rows[0] else {})]
