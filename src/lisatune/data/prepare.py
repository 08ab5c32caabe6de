"""A run's data, ready to train on: read, split, tokenised, packed, with the number of steps that it makes.

`train` and `check` both start here, so that `check` reports exactly the data that `train` will use.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from lisatune.data.chat import Chat, encode_prompt
from lisatune.data.records import Record, Records, read_records, split_records
from lisatune.data.shown import MarkedText, mark_loss
from lisatune.data.tokens import Examples, Order, TokenRow, is_chat, pack, tokenize
from lisatune.data.turns import Messages, answer_text
from lisatune.distributed import ranks
from lisatune.recipe import Recipe, check_steps

__all__ = ["Prompt", "RunData", "prepare_data", "read_data"]

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

    is_chat: bool
    """Whether the records are conversations, which the chat template writes; else they are plain text."""

    records: str
    """The kind of the training records, the template that writes them, and what is learned, for a reader."""

    tokenizer: Any = field(repr=False)
    """The tokenizer that made the rows."""

    def batch(self, micro_step: int) -> list[TokenRow]:
        """Return the training rows of a micro-step (0 is the run's first), for all ranks together."""
        return [self.train.rows[i] for i in self.order.batch(micro_step)]

    def mark(self, index: int) -> MarkedText:
        """Return the text of a training row, in parts with and without loss."""
        return mark_loss(self.train.rows[index], self.tokenizer)

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the rows by the recipe's keys: a resumed run compares them with those it began with."""
        return {"data.train": self.train.sha256, "data.validation": self.validation.sha256}


def prepare_data(recipe: Recipe, tokenizer: Any) -> RunData:
    """Read, split, tokenise and, if asked, pack the recipe's data.

    Args:
        recipe: what to read and how; the sections `data` and `run`.
        tokenizer: the tokenizer of the recipe's model.

    Raises:
        ValueError: a record is unusable, nothing is left, every answer is cut off, or the data makes more
            steps than a run may have.
        FileNotFoundError: a file is missing.
    """
    data, run = recipe.data, recipe.run
    train, validation = read_data(recipe)
    keys = ("max_length", "loss_on", "long", "date")
    how: dict[str, Any] = {key: getattr(data, key) for key in keys}
    rows = tokenize(train, tokenizer, **how)
    held_out = tokenize(validation, tokenizer, **how) if validation.rows else Examples([], 0, 0)
    held_out = _take_evenly(held_out, data.validation_limit)
    if data.packing:
        rows = pack(rows, data.max_length)
    order = Order(len(rows.rows), run.batch_size * ranks.count(), run.seed)
    wanted = run.steps or run.epochs * order.batches_per_epoch / run.accumulation
    check_steps(wanted, f"run.epochs={run.epochs:g}")
    steps = max(1, math.ceil(wanted))
    prompts = (_cut_prompt(row, tokenizer, data.date) for row in validation.rows)
    short = (prompt for prompt in prompts if 0 < len(prompt.ids) < data.max_length)
    questions = tuple(islice(short, run.samples))
    skipped = train.skipped + validation.skipped
    chat = Chat(tokenizer) if is_chat(train.rows[0]) else None
    template = "without a template" if chat is None else f"written by {chat.name}"
    learns_all = data.loss_on == "all" or train.kind == "text"
    where = "all tokens" if learns_all else "the last answer" if data.loss_on == "last" else "the answers"
    described = f"{train.kind}, {template}; loss on {where}"
    return RunData(rows, held_out, questions, order, steps, skipped, chat is not None, described, tokenizer)


def read_data(recipe: Recipe) -> tuple[Records, Records]:
    """Read the records to train on and the held-out ones. Errors as in `prepare_data`."""
    data = recipe.data

    def read(source: str, limit: int | None) -> Records:
        return read_records(
            source,
            kind=data.kind,
            split=data.split,
            limit=limit,
            on_bad_row=data.on_bad_row,
            fields=data.fields,
        )

    most, held_out = data.validation_limit, data.validation
    train = read(data.train, data.limit)
    if not data.holds_out:
        return train, replace(train, rows=[], skipped=0)
    if held_out is None and data.train == "python-docs":
        held_out = "python-docs:validation"
    if held_out is not None:
        return train, read(held_out, most)
    train, validation = split_records(train, data.validation_share, recipe.run.seed, most=most)
    return train, replace(validation, rows=validation.rows[:most], skipped=0)


def _take_evenly(examples: Examples, most: int | None) -> Examples:
    """Take at most so many rows from all over the examples: the pieces of a few long texts are many rows."""
    num_rows = len(examples.rows)
    if most is None or num_rows <= most:
        return examples
    return replace(examples, rows=[examples.rows[i * num_rows // most] for i in range(most)])


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
