"""A run's data, ready to train on: read, split, tokenised, packed, with the number of steps that it makes.

`train` and `check` both start here, so that `check` reports exactly the data that `train` will use.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lisatune.console import follow, plural, terminal
from lisatune.data.batches import Order, Share
from lisatune.data.cache import tokens_folder
from lisatune.data.chat import Chat
from lisatune.data.examples import Examples, divide, pack
from lisatune.data.mixture import (
    MixedSource,
    describe_sources,
    divide_limit,
    find_duplicates,
    hold_out_of_each,
    join,
    plan_shares,
)
from lisatune.data.pairs import divide_pairs
from lisatune.data.prompts import Prompt, find_questions
from lisatune.data.readers import open_readers, read_marked, warn_of_seen_records
from lisatune.data.records import RecordReader, Records
from lisatune.data.rows import Ints, Rows, TokenRow
from lisatune.data.shown import MarkedText, mark_loss
from lisatune.data.store import Prepared, prepare_source
from lisatune.data.streaming import Stream, Window
from lisatune.data.tokens import check_wishes, tokenize
from lisatune.distributed import ranks
from lisatune.recipe import Recipe
from lisatune.recipe.run import check_steps

__all__ = ["RunData", "prepare_data"]


@dataclass(frozen=True)
class RunData:
    """The data that a run trains on and is evaluated on."""

    train: Examples
    """Training rows; with packing a row holds several records."""

    validation: Examples
    """Held-out rows, no more than `data.validation_limit`; none under `validation_share: 0`."""

    questions: tuple[Prompt, ...]
    """The first `run.samples` held-out records whose prompts fit `max_length`, as prompts and answers."""

    order: Order
    """The training rows of each micro-step, for all ranks together."""

    steps: int
    """Optimizer steps of the whole run."""

    skipped: int
    """Number of unusable records, under `on_bad_row: skip`."""

    num_media: int
    """Number of records whose images, sound or videos were left out, under `text_only`."""

    duplicates: int
    """Number of training records with the tokens of an earlier one; `data.deduplicate` leaves them out."""

    is_chat: bool
    """Whether the records are conversations, which the chat template writes; else they are plain text."""

    records: str
    """The kind of the training records, the template that writes them, and what is learned, for a reader."""

    tokenizer: Any = field(repr=False)
    """The tokenizer that made the rows."""

    rows_per_record: int = 1
    """2 if records are pairs, whose rows are chosen, rejected, chosen, …; `order` then orders the pairs."""

    has_score: bool = False
    """Whether the loss scores each answer at its end."""

    sources: tuple[MixedSource, ...] = ()
    """The sources of a mixture; empty if `data.train` is one source."""

    stream: Stream | None = None
    """Reads the rows while the run trains; `train` then is its first window."""

    def batch(self, micro_step: int) -> list[TokenRow]:
        """Return the training rows of a micro-step (0 is the run's first) for all ranks together.

        A stream gives those of this rank.
        """
        if self.stream is not None:
            return self.stream.batch(micro_step)
        return self._take(self.train, self.order.batch(micro_step))

    def by_length(self, examples: Examples, size: int) -> Iterator[list[TokenRow]]:
        """Yield the rows of `size` records at a time, in order of length, to waste little on padding.

        Args:
            examples: `train` or `validation`.
            size: records in a batch.
        """
        lengths = examples.rows.lengths.reshape(-1, self.rows_per_record).max(axis=1)
        records = np.argsort(lengths, kind="stable").tolist()
        for i in range(0, len(records), size):
            yield self._take(examples, records[i : i + size])

    def _take(self, examples: Examples, records: Sequence[int]) -> list[TokenRow]:
        """Take the rows of records.

        Rows of pairs get their `number` among all rows of the run; for a score they get where they end, as
        `last`: at the last token that is not the padding token, as in transformers. Rows of a mixture get the
        number of their `source`.
        """
        each = self.rows_per_record
        is_train = examples is self.train
        if each == 2:
            first = 0 if is_train else len(self.train.rows)
            indices = [each * index + side for index in records for side in range(each)]
            rows = [examples.rows[index] for index in indices]
            if self.has_score:
                return [row | {"last": self._find_last(row)} for row in rows]
            numbers = torch.tensor([[first + index] for index in indices])
            return [row | {"number": number} for row, number in zip(rows, numbers, strict=True)]
        sizes = [source.num_rows if is_train else source.num_held_out for source in self.sources]
        if any(sizes):
            borders = list(accumulate(sizes))
            numbers = torch.tensor([[bisect_right(borders, index)] for index in records])
            return [examples.rows[i] | {"source": number} for i, number in zip(records, numbers, strict=True)]
        return [examples.rows[index] for index in records]

    def _find_last(self, row: TokenRow) -> Tensor:
        """Return the place of a row's last token that is not the padding token, int64 [1]."""
        is_text = torch.as_tensor(row["input_ids"]) != self.tokenizer.pad_token_id
        return is_text.nonzero().flatten()[-1:] if is_text.any() else torch.zeros(1, dtype=torch.int64)

    def mark(self, index: int) -> MarkedText:
        """Return the text of a training row, in parts with and without loss."""
        return mark_loss(self.train.rows[index], self.tokenizer)

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the rows by the recipe's keys: a resumed run compares them with those it began with."""
        train = self.train.sha256 if self.stream is None else self.stream.identity
        return {"data.train": train, "data.validation": self.validation.sha256}


def prepare_data(recipe: Recipe, tokenizer: Any, places: Sequence[Mapping[str, int]] = ()) -> RunData:
    """Read, tokenise, split and, if asked, pack the recipe's data.

    Tokens of a source that was prepared before come from the cache (`lisatune.data.store`).

    Args:
        recipe: what to read and how; the sections `data` and `run`.
        tokenizer: the tokenizer of the recipe's model.
        places: where a stream continues, from `Stream.places`. Default: at its beginning.

    Raises:
        ValueError: a record is unusable, nothing is left, every answer is cut off, or the data makes more
            steps than a run may have.
        FileNotFoundError: a file is missing.
        OSError: the cache cannot be written.
    """
    if recipe.data.streaming:
        return _prepare_stream(recipe, tokenizer, places)
    data, each_record = recipe.data, recipe.loss.rows_per_record
    readers, held_out_reader = open_readers(recipe)
    splits = data.holds_out and held_out_reader is None
    sources = [_prepare(reader, recipe, tokenizer, splits=splits) for reader in readers]
    names = [reader.source for reader in readers]
    limits = divide_limit(data.validation_limit, data.sources, [source.num_records for source in sources])
    is_held_out = [np.zeros(source.num_records, bool) for source in sources]
    if splits:
        prompts = [source.prompts for source in sources if source.prompts is not None]
        is_held_out = hold_out_of_each(prompts, names, data.validation_share, limits)
    chosen, duplicates = _choose_training(sources, is_held_out, deduplicate=data.deduplicate)
    parts = [_divide(*each, recipe) for each in zip(sources, chosen, names, strict=True)]
    read, held_out, questions = [*sources], [Examples(Rows.of([]))], tuple[Prompt, ...]()
    if held_out_reader is not None:
        other, examples, questions = _read_held_out(held_out_reader, recipe, tokenizer)
        _warn_of_seen(readers, sources, held_out_reader.source, other)
        read, held_out = [*sources, other], [examples]
    elif splits:
        some = [np.flatnonzero(is_out)[:most] for is_out, most in zip(is_held_out, limits, strict=True)]
        held_names = [f"what is held out of {name}" for name in names]
        wholes = [_divide(*each, recipe) for each in zip(sources, some, held_names, strict=True)]
        held_out = [_take_evenly(*each, each_record) for each in zip(wholes, limits, strict=True)]
        marked = [read_marked(*each) for each in zip(readers, is_held_out, strict=True)]
        questions = find_questions(marked, recipe, tokenizer)
    if data.packing:
        parts = _pack(parts, data.max_length)
    shares = plan_shares(data.sources, [len(part.rows) // each_record for part in parts])
    order, steps = _plan_steps(recipe, shares)
    kinds = dict.fromkeys(_describe_kind(source, recipe, tokenizer) for source in sources)
    mixed = describe_sources(data.sources, shares, parts, held_out if splits else [])
    return RunData(
        train=join(parts),
        validation=join(held_out),
        questions=questions,
        order=order,
        steps=steps,
        skipped=sum(each.skipped for each in read),
        num_media=sum(each.num_media for each in read),
        duplicates=duplicates,
        is_chat=any(source.is_chat for source in sources),
        records=" + ".join(kinds),
        tokenizer=tokenizer,
        rows_per_record=each_record,
        has_score=recipe.loss.has_score,
        sources=() if isinstance(data.train, str) else mixed,
    )


def _prepare(reader: RecordReader, recipe: Recipe, tokenizer: Any, *, splits: bool) -> Prepared:
    """Tokenise a source, or take its tokens from the cache; `splits` also groups its records by prompt."""
    data = recipe.data
    return prepare_source(
        reader,
        tokenizer,
        folder=tokens_folder(data.cache),
        loss_on=data.loss_on,
        date=data.date,
        seed=recipe.run.seed if splits else None,
    )


def _choose_training(
    sources: Sequence[Prepared], is_held_out: Sequence[NDArray[np.bool_]], *, deduplicate: bool
) -> tuple[list[Ints], int]:
    """Return each source's training records, and how many of all have the tokens of an earlier one."""
    chosen: list[Ints] = [np.flatnonzero(~is_out) for is_out in is_held_out]
    is_again = find_duplicates(sources, chosen)
    if deduplicate:
        chosen = [some[~again] for some, again in zip(chosen, is_again, strict=True)]
    return chosen, sum(int(again.sum()) for again in is_again)


def _warn_of_seen(
    readers: Sequence[RecordReader], sources: Sequence[Prepared], held_out: str, other: Prepared
) -> None:
    """Warn of training records that are held-out ones too, unless a source is evaluated on itself."""
    for reader, source in zip(readers, sources, strict=True):
        if held_out != reader.source:
            warn_of_seen_records(reader, np.isin(source.digests, other.digests), held_out)


def _read_held_out(
    reader: RecordReader, recipe: Recipe, tokenizer: Any
) -> tuple[Prepared, Examples, tuple[Prompt, ...]]:
    """Prepare the records of `data.validation`; return also the rows to evaluate on, and the questions."""
    prepared = _prepare(reader, recipe, tokenizer, splits=False)
    whole = _divide(prepared, np.arange(prepared.num_records), reader.source, recipe)
    examples = _take_evenly(whole, recipe.data.validation_limit, recipe.loss.rows_per_record)
    return prepared, examples, find_questions([(record for _, record in reader)], recipe, tokenizer)


def _pack(parts: Sequence[Examples], max_length: int) -> list[Examples]:
    """Pack each source on its own, so that a row is of one source."""
    packed: list[Examples] = []
    done = 0
    with follow("packing", sum(len(part.rows) for part in parts)) as advance:
        for part in parts:
            before = done
            packed.append(pack(part, max_length, lambda count: advance(before + count)))  # noqa: B023
            done += len(part.rows)
    return packed


def _prepare_stream(recipe: Recipe, tokenizer: Any, places: Sequence[Mapping[str, int]]) -> RunData:
    """Read what a stream holds out, and the window with which training begins."""
    data, run = recipe.data, recipe.run
    cache = tokens_folder(data.cache)
    stream = Stream(data, tokenizer, seed=run.seed, batch_size=run.batch_size, cache=cache)
    validation, questions, skipped = Examples(Rows.of([])), tuple[Prompt, ...](), 0
    num_media = 0
    if data.validation is not None:
        reader = open_readers(recipe)[1]
        assert reader is not None
        other, validation, questions = _read_held_out(reader, recipe, tokenizer)
        stream.watch_for(other.documents)
        skipped, num_media = other.skipped, other.num_media
    elif data.holds_out:
        assert data.validation_limit is not None
        records = stream.hold_out(data.validation_limit)
        kind = "text" if "text" in records[0] else data.kind
        how: dict[str, Any] = {"loss_on": data.loss_on, "date": data.date}
        how |= {"max_length": data.max_length, "long": data.long}
        whole = tokenize(Records(records, kind, 0, data.train_name), tokenizer, **how)
        validation = _take_evenly(whole, data.validation_limit, 1)
        stream.watch_for(whole.rows.documents)
        questions = find_questions([records], recipe, tokenizer)
    terminal().print(f"opening a stream of {plural(len(stream.shards), 'shard')}", soft_wrap=True)
    window = stream.seek(places)
    assert run.steps is not None
    return RunData(
        train=window.examples,
        validation=validation,
        questions=questions,
        order=Order(len(window.examples.rows), run.batch_size * ranks.count(), run.seed),
        steps=run.steps,
        skipped=skipped + window.end.skipped,
        num_media=num_media + window.end.media,
        duplicates=0,
        is_chat=window.is_chat,
        records=_describe_kind(window, recipe, tokenizer),
        tokenizer=tokenizer,
        stream=stream,
    )


def _describe_kind(source: Prepared | Window, recipe: Recipe, tokenizer: Any) -> str:
    """Say what a source's records are, what writes them, and what is learned."""
    loss_on = recipe.data.loss_on
    learns_all = loss_on == "all" or source.kind == "text"
    where = "all tokens" if learns_all else "the last answer" if loss_on == "last" else "the answers"
    if isinstance(loss_on, tuple):
        where = f"messages of {' and '.join(loss_on)}"
    template = f"written by {Chat(tokenizer).name}" if source.is_chat else "without a template"
    what = f"loss on {where}" if recipe.loss.rows_per_record == 1 else recipe.loss.text
    return f"{source.kind}, {template}; {what}"


def _plan_steps(recipe: Recipe, shares: Sequence[Share]) -> tuple[Order, int]:
    """Return the order of the records, and the number of steps."""
    run = recipe.run
    num_records = sum(share.num_rows for share in shares)
    order = Order(num_records, run.batch_size * ranks.count(), run.seed, shares=shares)
    wanted = run.steps or run.epochs * order.batches_per_epoch / run.accumulation
    check_steps(wanted, f"run.epochs={run.epochs:g}")
    return order, max(1, math.ceil(round(wanted, 6)))  # 1.1 × 100 is a little more than 110 for a computer


def _divide(source: Prepared, chosen: Ints, name: str, recipe: Recipe) -> Examples:
    """Make rows of some records of a source."""
    if not len(chosen):
        raise ValueError(
            f"{name} has no record left to train on: other sources hold all of its prompts out, or have all "
            "of its records; leave it out"
        )
    data, scores = recipe.data, recipe.loss.has_score
    long = check_wishes(name, source.kind, data.loss_on, data.long)
    if source.texts_per_record == 1:
        return divide(source.documents, chosen, max_length=data.max_length, long=long, source=name)
    # The score is read at an answer's end. A recipe refuses to split pairs.
    long_pairs: Literal["cut", "drop"] = (
        "drop" if long == "drop" or (scores and data.long == "auto") else "cut"
    )
    return divide_pairs(source.documents, chosen, max_length=data.max_length, long=long_pairs, source=name)


def _take_evenly(examples: Examples, most: int | None, rows_per_record: int) -> Examples:
    """Take at most so many records from all over the examples: the pieces of a few long texts are many."""
    count = len(examples.rows) // rows_per_record
    if most is None or count <= most:
        return examples
    records = np.arange(most) * count // most
    rows = (rows_per_record * records[:, None] + np.arange(rows_per_record)).ravel()
    return replace(examples, rows=examples.rows.take(rows))
