"""Held-out records as prompts that the model answers before and after training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from lisatune.data.chat import encode_prompt
from lisatune.data.records import Record
from lisatune.data.turns import Messages, answer_text, find_answer
from lisatune.recipe import Recipe

__all__ = ["Prompt", "find_questions"]

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


def find_questions(sources: Sequence[Iterable[Record]], recipe: Recipe, tokenizer: Any) -> tuple[Prompt, ...]:
    """Read held-out records, one of each source in turn, until enough of them have a prompt that fits.

    A model that gives scores gets none.

    Args:
        sources: held-out records of each source.
        recipe: `run.samples` says how many are enough, `data.validation_limit` how many records count.
        tokenizer: the tokenizer of the recipe's model.
    """
    data, wanted = recipe.data, recipe.run.samples
    if not wanted or recipe.loss.has_score:
        return ()
    in_turn = (record for some in zip_longest(*sources) for record in some if record is not None)
    some = (record for record in islice(in_turn, data.validation_limit) if _has_answer(record))
    prompts = (_cut_prompt(record, tokenizer, data.date) for record in some)
    return tuple(islice((prompt for prompt in prompts if 0 < len(prompt.ids) < data.max_length), wanted))


def _has_answer(row: Record) -> bool:
    """Whether the model can be asked for something; not where only other roles speak (`data.loss_on`)."""
    return "messages" not in row or find_answer(row["messages"]) is not None


def _cut_prompt(row: Record, tokenizer: Any, date: str | None) -> Prompt:
    """Cut a record where its first answer begins, or a text after its first words."""
    prompt: str | Messages
    answer: str | Messages
    if "text" in row:
        words = row["text"].split(" ")
        prompt, answer = " ".join(words[:TEXT_PROMPT_WORDS]), " ".join(words[TEXT_PROMPT_WORDS:])
    elif "messages" in row:
        first = find_answer(row["messages"])
        prompt, answer = row["messages"][:first], row["messages"][first:]
    else:
        prompt, answer = row["prompt"], row["completion"]
    answer = answer if isinstance(answer, str) else answer_text(answer[0])
    ids = encode_prompt(tokenizer, prompt, date=date, tools=row.get("tools"))
    return Prompt(prompt, answer, tuple(ids))
