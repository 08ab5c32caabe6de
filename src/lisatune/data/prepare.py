"""A run's data, ready to train on: read, split, tokenised, packed, with the number of steps that it makes.

`train` and `check` both start here, so that `check` reports exactly the data that `train` will use.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lisatune.console import follow, plural
from lisatune.data.batches import Order
from lisatune.data.cache import tokens_folder
from lisatune.data.chat import Chat, encode_prompt
from lisatune.data.examples import Examples, divide, pack
from lisatune.data.pairs import read_pairs, tokenize_pairs
from lisatune.data.records import Record, RecordReader, Records
from lisatune.data.rows import Ints, Rows, TokenRow
from lisatune.data.shown import MarkedText, mark_loss
from lisatune.data.splitting import hash_prompt, hold_out, split_records
from lisatune.data.store import Prepared, prepare_source
from lisatune.data.tokens import check_wishes, is_chat
from lisatune.data.turns import Messages, answer_text
from lisatune.distributed import ranks
from lisatune.recipe import DataConfig, Recipe, check_steps

__all__ = ["Prompt", "RunData", "prepare_data", "read_data"]

NAMED_RECORDS = 3
"""Records that a warning names."""

TEXT_PROMPT_WORDS = 24
"""Words of a plain text that make up its prompt."""


@dataclass(frozen=True)
class Prompt:
    """A held-out record, cut at the place from which the model must continue by itself."""

    prompt: str | Messages
    """Plain text, or chat messages up to the first answer."""

    answer: str
    """The record's own continuation."""

    ids: tuple[int, ...]
    """The prompt's tokens."""

    @property
    def text(self) -> str:
        """The prompt for a reader: plain text, or the last message."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


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

    def batch(self, micro_step: int) -> list[TokenRow]:
        """Return the training rows of a micro-step (0 is the run's first), for all ranks together."""
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
        """Take the rows of records. Rows of pairs get their `number` among all rows of the run."""
        each = self.rows_per_record
        if each == 1:
            return [examples.rows[index] for index in records]
        first = 0 if examples is self.train else len(self.train.rows)
        indices = [each * index + side for index in records for side in range(each)]
        return [examples.rows[index] | {"number": torch.tensor([first + index])} for index in indices]

    def mark(self, index: int) -> MarkedText:
        """Return the text of a training row, in parts with and without loss."""
        return mark_loss(self.train.rows[index], self.tokenizer)

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the rows by the recipe's keys: a resumed run compares them with those it began with."""
        return {"data.train": self.train.sha256, "data.validation": self.validation.sha256}


def prepare_data(recipe: Recipe, tokenizer: Any) -> RunData:
    """Read, tokenise, split and, if asked, pack the recipe's data.

    Tokens of a source that was prepared before come from the cache (`lisatune.data.store`).

    Args:
        recipe: what to read and how; the sections `data` and `run`.
        tokenizer: the tokenizer of the recipe's model.

    Raises:
        ValueError: a record is unusable, nothing is left, every answer is cut off, or the data makes more
            steps than a run may have.
        FileNotFoundError: a file is missing.
        OSError: the cache cannot be written.
    """
    if recipe.loss.rows_per_record == 2:
        return _prepare_pairs(recipe, tokenizer)
    data, run = recipe.data, recipe.run
    reader, held_out_reader = _open_readers(recipe)
    splits = data.holds_out and held_out_reader is None
    how: dict[str, Any] = {"folder": tokens_folder(data.cache), "loss_on": data.loss_on, "date": data.date}
    source = prepare_source(reader, tokenizer, **how, seed=run.seed if splits else None)
    is_held_out = np.zeros(len(source.documents), bool)
    if source.prompts is not None:
        is_held_out = hold_out(
            source.prompts, data.validation_share, reader.source, most=data.validation_limit
        )
    chosen = np.flatnonzero(~is_held_out)
    first_of_each = np.sort(np.unique(source.documents.digests[chosen], return_index=True)[1])
    duplicates = len(chosen) - len(first_of_each)
    if data.deduplicate:
        chosen = chosen[first_of_each]
    rows = _divide(source, chosen, reader.source, data)
    skipped = source.skipped
    held_out, questions = Examples(Rows.of([])), tuple[Prompt, ...]()
    if held_out_reader is not None:
        other = prepare_source(held_out_reader, tokenizer, **how)
        held_out = _divide(other, np.arange(len(other.documents)), held_out_reader.source, data)
        questions = _find_questions(held_out_reader, None, recipe, tokenizer)
        skipped += other.skipped
        if held_out_reader.source != reader.source:  # which is meant
            is_seen = np.isin(source.documents.digests, other.documents.digests)
            _warn_of_seen_records(reader, is_seen, held_out_reader.source)
    elif splits:
        some = np.flatnonzero(is_held_out)[: data.validation_limit]
        held_out = _divide(source, some, reader.source, data)
        questions = _find_questions(reader, is_held_out, recipe, tokenizer)
    held_out = _take_evenly(held_out, data.validation_limit)
    if data.packing:
        with follow("packing", len(rows.rows)) as advance:
            rows = pack(rows, data.max_length, advance)
    order, steps = _plan_steps(recipe, len(rows.rows))
    learns_all = data.loss_on == "all" or source.kind == "text"
    where = "all tokens" if learns_all else "the last answer" if data.loss_on == "last" else "the answers"
    template = f"written by {Chat(tokenizer).name}" if source.is_chat else "without a template"
    return RunData(
        train=rows,
        validation=held_out,
        questions=questions,
        order=order,
        steps=steps,
        skipped=skipped,
        duplicates=duplicates,
        is_chat=source.is_chat,
        records=f"{source.kind}, {template}; loss on {where}",
        tokenizer=tokenizer,
    )


def _prepare_pairs(recipe: Recipe, tokenizer: Any) -> RunData:
    """Read, split and tokenise pairs of answers; they are held in memory, and not in the cache."""
    data, run = recipe.data, recipe.run
    how: dict[str, Any] = {"split": data.split, "on_bad_row": data.on_bad_row}
    train = read_pairs(data.train, limit=data.limit, **how)
    validation = replace(train, rows=[], skipped=0)
    if data.validation is not None:
        validation = read_pairs(data.validation, limit=data.validation_limit, **how)
    elif data.holds_out:
        most = data.validation_limit
        train, validation = split_records(train, data.validation_share, run.seed, most=most)
        validation = replace(validation, rows=validation.rows[:most], skipped=0)
    lengths: dict[str, Any] = {"max_length": data.max_length, "long": data.long, "date": data.date}
    rows = tokenize_pairs(train, tokenizer, **lengths)
    order, steps = _plan_steps(recipe, len(rows.rows) // 2)
    uses_template = is_chat(train.rows[0])
    template = f"written by {Chat(tokenizer).name}" if uses_template else "without a template"
    return RunData(
        train=rows,
        validation=tokenize_pairs(validation, tokenizer, **lengths)
        if validation.rows
        else Examples(Rows.of([])),
        questions=_choose_questions(validation.rows, recipe, tokenizer),
        order=order,
        steps=steps,
        skipped=train.skipped + validation.skipped,
        duplicates=0,
        is_chat=uses_template,
        records=f"pairs, {template}; {recipe.loss.name} with β {recipe.loss.beta:g}",
        tokenizer=tokenizer,
        rows_per_record=2,
    )


def _plan_steps(recipe: Recipe, num_records: int) -> tuple[Order, int]:
    """Return the order of the records, and the number of steps."""
    run = recipe.run
    order = Order(num_records, run.batch_size * ranks.count(), run.seed)
    wanted = run.steps or run.epochs * order.batches_per_epoch / run.accumulation
    check_steps(wanted, f"run.epochs={run.epochs:g}")
    return order, max(1, math.ceil(wanted))


def read_data(recipe: Recipe) -> tuple[Iterator[Record], Records]:
    """Read the records to train on, one by one, and the held-out ones. Errors as in `prepare_data`."""
    data = recipe.data
    reader, held_out_reader = _open_readers(recipe)
    none = Records([], reader.kind, 0, reader.source)
    if not data.holds_out:
        return _read_all(reader), none
    if held_out_reader is not None:
        held_out = list(_read_all(held_out_reader))
        return _read_all(reader), replace(none, rows=held_out, source=held_out_reader.source)
    keys = np.array([hash_prompt(record, recipe.run.seed) for record in _read_all(reader)], dtype="S16")
    is_held_out = hold_out(keys, data.validation_share, reader.source, most=data.validation_limit)
    held_out = list(islice(_read_marked(reader, is_held_out), data.validation_limit))
    return _read_marked(reader, ~is_held_out), replace(none, rows=held_out)


def _open_readers(recipe: Recipe) -> tuple[RecordReader, RecordReader | None]:
    """Return the records to train on, and those of `data.validation`; the latter None if they are a share."""
    data = recipe.data
    keys = ("kind", "split", "on_bad_row", "fields")
    how: dict[str, Any] = {key: getattr(data, key) for key in keys}
    held_out = data.validation
    if held_out is None and data.train == "python-docs" and data.holds_out:
        held_out = "python-docs:validation"
    train = RecordReader(data.train, limit=data.limit, **how)
    if held_out is None:
        return train, None
    return train, RecordReader(held_out, limit=data.validation_limit, **how)


def _read_all(reader: RecordReader) -> Iterator[Record]:
    """Read all records, then give the reader's warnings."""
    for _, record in reader:
        yield record
    reader.warn()


def _read_marked(reader: RecordReader, is_wanted: NDArray[np.bool_]) -> Iterator[Record]:
    """Read the records that are marked, in their order."""
    return (record for (_, record), wanted in zip(reader, is_wanted.tolist(), strict=True) if wanted)


def _warn_of_seen_records(reader: RecordReader, is_seen: NDArray[np.bool_], held_out: str) -> None:
    """Warn of training records that are in the held-out data too, and name the first ones."""
    count = int(is_seen.sum())
    if not count:
        return
    marked = zip(reader, is_seen.tolist(), strict=True)
    places = islice((place for (place, _), is_one in marked if is_one), NAMED_RECORDS)
    more = ", …" if count > NAMED_RECORDS else ""
    warnings.warn(
        f"{plural(count, 'training record')} {'is' if count == 1 else 'are'} in the held-out data {held_out} "
        f"too, so held-out loss is partly loss on training data: {', '.join(places)}{more}; take them out",
        stacklevel=3,
    )


def _divide(source: Prepared, chosen: Ints, name: str, data: DataConfig) -> Examples:
    long = check_wishes(name, source.kind, data.loss_on, data.long)
    return divide(source.documents, chosen, max_length=data.max_length, long=long, source=name)


def _find_questions(
    reader: RecordReader, is_held_out: NDArray[np.bool_] | None, recipe: Recipe, tokenizer: Any
) -> tuple[Prompt, ...]:
    """Read held-out records until enough of them have a prompt that fits. None marks all as held out."""
    records = (record for _, record in reader) if is_held_out is None else _read_marked(reader, is_held_out)
    return _choose_questions(records, recipe, tokenizer)


def _choose_questions(records: Iterable[Record], recipe: Recipe, tokenizer: Any) -> tuple[Prompt, ...]:
    """Take the prompts that fit of the first records, as many as `run.samples`."""
    data, wanted = recipe.data, recipe.run.samples
    if not wanted:
        return ()
    prompts = (_cut_prompt(record, tokenizer, data.date) for record in islice(records, data.validation_limit))
    return tuple(islice((prompt for prompt in prompts if 0 < len(prompt.ids) < data.max_length), wanted))


def _take_evenly(examples: Examples, most: int | None) -> Examples:
    """Take at most so many rows from all over the examples: the pieces of a few long texts are many rows."""
    num_rows = len(examples.rows)
    if most is None or num_rows <= most:
        return examples
    return replace(examples, rows=examples.rows.take(np.arange(most) * num_rows // most))


def _cut_prompt(row: Record, tokenizer: Any, date: str | None) -> Prompt:
    """Cut a record where its first answer begins, or a text after its first words."""
    prompt: str | Messages
    answer: str | Messages
    if "text" in row:
        words = row["text"].split(" ")
        prompt, answer = " ".join(words[:TEXT_PROMPT_WORDS]), " ".join(words[TEXT_PROMPT_WORDS:])
    elif "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompt, answer = row["messages"][:first], row["messages"][first:]
    else:
        prompt, answer = row["prompt"], row["completion"]
    answer = answer if isinstance(answer, str) else answer_text(answer[0])
    ids = encode_prompt(tokenizer, prompt, date=date, tools=row.get("tools"))
    return Prompt(prompt, answer, tuple(ids))
