"""From records to tokens: chat templates, and which tokens carry loss.

A label is the token id at the same position, or -100 where there is no loss; the loss function shifts labels.
The first token of a sequence never carries loss, because nothing predicts it. The end of a sequence is known
from its length. No mask is ever made from `ids == pad`: in many models the padding token is the token that
ends an answer, and the model would never learn to stop.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lisatune.data.chat import Chat, common_length, drop_second_bos
from lisatune.data.examples import Examples, divide
from lisatune.data.records import Record, Records
from lisatune.data.roles import mark_roles
from lisatune.data.rows import Documents, Encoded
from lisatune.recipe.data import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_wishes", "encode", "is_chat", "tokenize"]

BATCH_RECORDS, BATCH_CHARACTERS = 512, 2**21
"""The most records, and about the most text, that one call of the tokenizer gets."""

LossOn = Literal["auto", "answers", "last", "all"] | tuple[Role, ...]
Long = Literal["auto", "split", "cut", "drop"]


def tokenize(
    records: Records,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    loss_on: LossOn = "auto",
    long: Long = "auto",
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
            `answers` for all others. Roles: every message of one of them, from the first token of its text to
            the token that ends the turn; of `assistant`, what `answers` means.
        long: what happens to a record of more tokens. `split`: it becomes several rows of at most
            `max_length` tokens, one after the other, and the first token of each carries no loss. `cut`: its
            end is cut off. `drop`: it is left out. `auto`: `split` for records of text, `cut` for all others.
        date: the day that the chat template sees as today, YYYY-MM-DD. Default: today.

    Returns:
        Rows of `input_ids` and `labels` (-100 where there is no loss), int64 [T], in the order of the
        records. A row without any loss is left out.

    Raises:
        ValueError: the chat template refuses a record or cannot be used for training, `answers` was asked for
            plain text, the tokenizer has no end-of-sequence token, or `max_length` cuts off every answer.
        ImportError: messages need TRL, which is not installed.

    Example:
        >>> examples = tokenize(read_records("rows.jsonl"), tokenizer, max_length=1024)
        >>> examples.rows[0]["labels"], examples.num_cut, examples.num_without_loss
    """
    long = check_wishes(records.source, records.kind, loss_on, long)
    encoded = encode(records.rows, tokenizer, source=records.source, loss_on=loss_on, date=date)
    documents = Documents.gather(encoded)
    every = np.arange(len(documents))
    return divide(documents, every, max_length=max_length, long=long, source=records.source)


def check_wishes(source: str, kind: str, loss_on: LossOn, long: Long) -> Literal["split", "cut", "drop"]:
    """Refuse what records of a kind cannot do, and return what happens to long ones.

    Raises:
        ValueError: a value is unknown, or answers or roles are asked for in plain text.
    """
    if loss_on not in ("auto", "answers", "last", "all") and not isinstance(loss_on, tuple):
        raise ValueError(f"loss_on must be auto, answers, last, all or a tuple of roles, got {loss_on!r}")
    if long not in ("auto", "split", "cut", "drop"):
        raise ValueError(f"long must be auto, split, cut or drop, got {long!r}")
    if loss_on not in ("auto", "all") and kind == "text":
        what = "roles" if isinstance(loss_on, tuple) else "answers"
        raise ValueError(f"{source} is plain text, which has no {what}; set loss_on to all or auto")
    if long == "auto":
        return "split" if kind == "text" else "cut"
    return long


def is_chat(record: Record) -> bool:
    """Whether a record is a conversation, which goes through the chat template."""
    return "messages" in record or isinstance(record.get("prompt"), list)


@dataclass(frozen=True)
class _Text:
    """A record as longer and longer texts; the last is the whole."""

    texts: list[str]
    learned: list[bool]
    """Whether what each text adds to the one before carries loss."""
    stops_at: list[str]
    """The special token that each text ends with; empty if it ends with another text."""
    is_chat: bool
    stops: bool
    """Whether the whole ends with a token at which the model learns to stop; else one is added."""


def encode(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    source: str,
    loss_on: LossOn = "auto",
    date: str | None = None,
    texts_per_record: int = 1,
) -> Iterator[Encoded]:
    """Turn records into tokens of their whole length, several hundred records in a call of the tokenizer.

    Args:
        records: in the order in which they come out again.
        tokenizer: the tokenizer of the model to train.
        source: name of the data for error messages.
        loss_on, date: as for `tokenize`.
        texts_per_record: so many of `records` are one record for a reader of messages.

    Raises:
        ValueError, ImportError: as in `tokenize`; the message names the record.
    """
    chat: Chat | None = None
    waiting: list[_Text] = []
    num_characters = 0
    number = 0

    def name(number: int) -> str:
        return f"{source}, record {(number - 1) // texts_per_record + 1}"

    for number, record in enumerate(records, 1):
        if chat is None and is_chat(record):
            chat = Chat(tokenizer, date)
        try:
            text = _write(record, chat, loss_on)
        except ValueError as error:
            raise ValueError(f"{name(number)}: {error}") from error
        waiting.append(text)
        num_characters += len(text.texts[-1])
        if len(waiting) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
            yield _encode_texts(waiting, tokenizer, name, number)
            waiting, num_characters = [], 0
    if waiting:
        yield _encode_texts(waiting, tokenizer, name, number)


def _write(record: Record, chat: Chat | None, loss_on: LossOn) -> _Text:
    """Write one record as texts."""
    everywhere, tools = loss_on == "all", record.get("tools")
    if chat is not None and is_chat(record):
        messages = record["messages"] if "messages" in record else record["prompt"] + record["completion"]
        first_answer = 1 if "messages" in record else len(record["prompt"])
        if everywhere and any(message.get("train") is False for message in messages):
            raise ValueError(
                "a message is marked not to be learned from (weight: 0 or train: false), but loss_on all "
                "would learn from it; use loss_on answers"
            )
        if everywhere:
            parts = [(chat.render(messages, tools=tools), True)]
        elif isinstance(loss_on, tuple):
            parts = mark_roles(chat, messages, first_answer, loss_on, tools=tools)
        else:
            parts = chat.render_prefixes(messages, first_answer, tools=tools, last=loss_on == "last")
        texts, learned = map(list, zip(*parts, strict=True))
        stops_at = [chat.find_stop(text) for text in texts]
        return _Text(texts, learned, stops_at, is_chat=True, stops=chat.ends_turn(texts[-1]))
    if isinstance(loss_on, tuple):
        raise ValueError(
            "a plain prompt and completion have no roles; set loss_on to answers or all, or give messages"
        )
    if "prompt" in record:
        texts = [record["prompt"], record["prompt"] + record["completion"]]
        return _Text(texts, [everywhere, True], ["", ""], is_chat=False, stops=False)
    return _Text([record["text"]], [True], [""], is_chat=False, stops=False)


def _encode_texts(waiting: list[_Text], tokenizer: Any, name: Callable[[int], str], last: int) -> Encoded:
    """Tokenise the texts of several records; the last is number `last`, and `name` names them in messages."""

    def encode_all(texts: list[str], *, of_chat: bool) -> list[list[int]]:
        # A chat template writes all special tokens itself.
        keys = {"add_special_tokens": not of_chat, "return_attention_mask": False, "verbose": False}
        return tokenizer(texts, **keys)["input_ids"] if texts else []

    parts = {
        of_chat: iter(
            encode_all(
                [part for text in waiting if text.is_chat == of_chat for part in _list_parts(text)],
                of_chat=of_chat,
            )
        )
        for of_chat in (False, True)
    }
    stop_ids: dict[str, int] = {}
    ids: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for number, text in enumerate(waiting, last - len(waiting) + 1):
        own_parts = iter([next(parts[text.is_chat]) for _ in _list_parts(text)])
        whole = next(own_parts)
        encoded = []
        for index, stop in enumerate(text.stops_at[:-1]):
            if not stop:
                encoded.append(next(own_parts))
                continue
            if stop not in stop_ids:
                stop_ids[stop] = tokenizer.convert_tokens_to_ids(stop)
            end = _find_end(text, index, whole, stop_ids[stop])
            shorter = text.texts[index : index + 1]
            encoded.append(encode_all(shorter, of_chat=True)[0] if end is None else whole[:end])
        encoded.append(whole)
        try:
            own, own_spans = _mark(encoded, text, tokenizer)
        except ValueError as error:
            raise ValueError(f"{name(number)}: {error}") from error
        ids.append(own)
        spans += [(start + begin, start + end) for begin, end in own_spans]
        start += len(own)
    return Encoded(
        np.fromiter(chain.from_iterable(ids), np.uint32, count=start),
        np.array([len(own) for own in ids], np.int64),
        np.array(spans, np.int64).reshape(-1, 2),
    )


def _list_parts(text: _Text) -> list[str]:
    """List the texts of a record that must be tokenised: the whole, and those that end with no special token.

    A tokenizer cuts text at special tokens before anything else, so a text that ends with one has the tokens
    that the whole has up to there.
    """
    before = zip(text.texts[:-1], text.stops_at[:-1], strict=True)
    return [text.texts[-1], *(part for part, stop in before if not stop)]


def _find_end(text: _Text, index: int, whole: list[int], stop: int) -> int | None:
    """Find the end of a text that ends with the special token `stop` in the tokens of the whole.

    None if that token is not found as often as its text is written, so that the end is not sure.
    """
    written = text.stops_at[index]
    if whole.count(stop) != text.texts[-1].count(written):
        return None
    end = 0
    for _ in range(text.texts[index].count(written)):
        end = whole.index(stop, end) + 1
    return end


def _mark(encoded: list[list[int]], text: _Text, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a record, and begin and end of what of them carries loss."""
    if not text.is_chat:
        encoded = [drop_second_bos(part, tokenizer) for part in encoded]
    ids, eos = encoded[-1], tokenizer.eos_token_id
    spans: list[tuple[int, int]] = []
    done = 0
    for part, has_loss in zip(encoded, text.learned, strict=True):
        # A token across a border belongs to the text after the border, as in TRL.
        end = common_length(part, ids)
        if has_loss and end > done:
            spans.append((done, end))
        done = max(done, end)
    stops = text.stops if text.is_chat else ids[-1:] == [eos]
    if text.learned[-1] and not stops:
        if eos is None:
            raise ValueError(
                "the tokenizer has no end-of-sequence token to learn to stop at; set its eos_token"
            )
        ids = [*ids, eos]
        spans.append((done, done + 1))
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    # Nothing predicts the first token of a sequence.
    return ids, [(max(begin, 1), end) for begin, end in joined if end > 1]
