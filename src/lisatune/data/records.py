"""Read training records from files, folders or the hub, and bring them into one of three forms.

Records come as alpaca (`instruction`, `input`, `output`), prompt-completion (`prompt`, `completion`: both
text or both lists of messages), messages, ShareGPT (`conversations` of `from`, `value`) or `text`. The keys
of the first record tell which. They leave as

    {"text": str}
    {"prompt": ..., "completion": ...}          both str, or both lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}

Alpaca becomes prompt and completion with one message each. Plain strings stay plain: no chat template is put
around them. Every record is checked while it is read, and an unusable one is reported with file and line.

Fields that carry meaning are honoured or refused by name, never dropped: a column `system` or `history`
becomes messages; an answer with `weight: 0` or `train: false` stays in the conversation and carries no loss;
calls of functions, tools, separate reasoning and labels of bad answers are refused. All other columns are
named once.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

from lisatune.data.sources import BadRowError, read_rows

__all__ = ["Records", "read_records", "split_records"]

Record = dict[str, Any]
"""A record in one of the three forms above."""

Messages = list[dict[str, Any]]
"""A conversation: messages with `role` and `content`; an answer not to learn from has `train` False too."""

FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Fields that each kind must have; the first kind whose fields are all there is taken."""

USED = {
    "messages": ("messages", "system"),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion", "system", "label"),
    "text": ("text", "system"),
}
"""Fields that each kind reads."""

REFUSED = {
    "tools": "tools, which cannot be trained on yet",
    "functions": "functions, which cannot be trained on yet",
    "chosen": "a preferred answer, so this is preference data; train on it with TRL's DPOTrainer",
    "rejected": "a rejected answer, so this is preference data; train on it with TRL's DPOTrainer",
    "rejected_response": "a rejected answer, so this is preference data; train on it with TRL's DPOTrainer",
}
"""Fields that would change what a record teaches, and what they hold."""

EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")
"""Values of a field that is there and says nothing, also as JSON in text."""

REFUSED_IN_TURNS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that would change what it says."""

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Records:
    """Checked records in one of the three forms above."""

    rows: list[Record]
    kind: str
    """Form in which the records came: alpaca, prompt-completion, messages, sharegpt or text."""
    skipped: int
    """Number of records left out under `on_bad_row="skip"`."""
    source: str
    """The file, folder or hub id that they were read from."""
    first_skipped: str = ""
    """Place of the first record that was left out, and what is wrong with it."""
    unused: tuple[str, ...] = ()
    """Fields that hold something and that nothing reads, in the order in which they were met."""


def read_records(
    source: str,
    *,
    kind: str = "auto",
    split: str = "train",
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Records:
    """Read and check records.

    Args:
        source: a .jsonl, .json, .csv or .parquet file (also .gz); a folder of .txt files, one record each; a
            hub id, also as `id:config`; `python-docs` or `python-docs:validation` (made by `python_docs`).
        kind: form of the records: alpaca, prompt-completion, messages, sharegpt or text; `auto` recognises it
            by the fields of the first record.
        split: split of a hub dataset.
        limit: stop after this many usable records.
        on_bad_row: raise at an unusable record (`error`), or leave it out and count it (`skip`).

    Returns:
        The records in one of three forms: `{"text": …}`, `{"prompt": …, "completion": …}` or
        `{"messages": […]}`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is nothing to read, every answer is empty, or a record is unusable; the message
            names file and line.
        ImportError: reading this source needs a package of lisatune[train] that is not installed.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "rows.jsonl"
        >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
        >>> records = read_records(str(file))
        >>> records.kind, records.rows
        ('prompt-completion', [{'prompt': '2 + 2 =', 'completion': ' 4'}])
    """
    if kind != "auto" and kind not in FIELDS:
        raise ValueError(f"unknown kind of records {kind!r}; use auto, {', '.join(FIELDS)}")
    rows: list[Record] = []
    skipped, first_skipped = 0, ""
    unused: dict[str, None] = {}
    for place, row in read_rows(source, split=split):
        try:
            if isinstance(row, BadRowError):
                raise row
            if kind == "auto":
                kind = _recognise_kind(row)
            rows.append(_normalise(row, kind))
            unused |= dict.fromkeys(
                name for name, value in row.items() if name not in USED[kind] and value not in EMPTY
            )
        except BadRowError as problem:
            if on_bad_row == "error":
                raise ValueError(f"{place}: {problem}; fix it, or set data.on_bad_row=skip") from None
            skipped, first_skipped = skipped + 1, first_skipped or f"{place}: {problem}"
        if limit is not None and len(rows) >= limit:
            break
    if not rows and skipped:
        raise ValueError(f"{source} has no usable record, all {skipped} were skipped; first: {first_skipped}")
    if not rows:
        raise ValueError(f"{source} is empty: it has no records")
    _check_answers(rows, source)
    if unused:
        warnings.warn(
            f"{source}: nothing reads the field{'s' if len(unused) > 1 else ''} {', '.join(unused)}",
            stacklevel=2,
        )
    return Records(rows, kind, skipped, source, first_skipped, tuple(unused))


def _check_answers(rows: list[Record], source: str) -> None:
    """Warn of empty answers, from which a model learns to say nothing; refuse records without any other."""
    answers = [answer for row in rows for answer in _take_answers(row)]
    num_empty = sum(not answer.strip() for answer in answers)
    if answers and num_empty == len(answers):
        raise ValueError(f"{source} has no answer to learn from: all {num_empty} answers are empty")
    if num_empty:
        warnings.warn(
            f"{source}: {num_empty:,} of {len(answers):,} answers are empty; the model learns to say nothing",
            stacklevel=3,
        )


def _take_answers(row: Record) -> list[str]:
    """Take the texts that carry loss; none of plain text, which is checked on its own."""
    if "text" in row or isinstance(row.get("completion"), str):
        return [row["completion"]] if "completion" in row else []
    turns = row["messages"][1:] if "messages" in row else row["completion"]
    return [
        turn["content"] for turn in turns if turn["role"] == "assistant" and turn.get("train") is not False
    ]


def split_records(
    records: Records, share: float, seed: int, *, most: int | None = None
) -> tuple[Records, Records]:
    """Hold out a share of the records by their prompts, so that no question is on both sides.

    Records with the same prompt up to case and spacing (for text: the same text) stay together. The different
    prompts are ranked by a hash of (seed, prompt), and the lowest `share` of them is held out. So the split
    does not depend on the order of the records.

    Args:
        records: the records to split.
        share: share of the different prompts to hold out, 0 < share < 1; their number is rounded, but at
            least one is held out and at least one stays.
        seed: names the split; the same seed gives the same split.
        most: hold out at most this many prompts, >= 1; None: no limit.

    Returns:
        The records to train on and the held-out records, each in the order given.

    Raises:
        ValueError: there are fewer than two different prompts.
    """
    keys = [_hash_prompt(row, seed) for row in records.rows]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise ValueError(
            f"{records.source} has 1 different prompt, and holding it out leaves nothing to train on; give "
            "validation data, or set data.validation_share to 0 to evaluate nothing"
        )
    wanted = min(round(share * len(ranked)), len(ranked) if most is None else most)
    num_held_out = min(max(wanted, 1), len(ranked) - 1)
    held_out = set(ranked[:num_held_out])
    train = [row for row, key in zip(records.rows, keys, strict=True) if key not in held_out]
    validation = [row for row, key in zip(records.rows, keys, strict=True) if key in held_out]
    return replace(records, rows=train), replace(records, rows=validation)


def _hash_prompt(row: Record, seed: int) -> bytes:
    prompt = (
        row["text"]
        if "text" in row
        else row["prompt"]
        if "prompt" in row
        else _take_question(row["messages"])
    )
    if not isinstance(prompt, str):
        prompt = "\0".join(f"{message['role']}\0{message['content']}" for message in prompt)
    return hashlib.blake2b(f"{seed}/{' '.join(prompt.split()).casefold()}".encode(), digest_size=16).digest()


def _take_question(messages: Messages) -> Messages:
    """Take the turns before the first answer."""
    return messages[: [message["role"] for message in messages].index("assistant", 1)]


def _recognise_kind(row: Any) -> str:
    fields = _check_fields(row)
    for kind, needed in FIELDS.items():
        if all(field in fields for field in needed):
            return kind
    forms = "; ".join(" and ".join(needed) for needed in FIELDS.values())
    raise BadRowError(
        f"cannot tell the kind of the record from its fields {', '.join(fields)}; known: {forms}"
    )


def _normalise(row: Any, kind: str) -> Record:
    fields = _check_fields(row)
    for field in FIELDS[kind]:
        if field not in fields:
            raise BadRowError(
                f"the field {field!r} is missing; the fields are: {', '.join(fields) or 'none'}"
            )
    system = fields.get("system") or ""
    before = [{"role": "system", "content": _check_text(system, "system")}] if system else []
    if kind == "alpaca":
        extra = "" if fields.get("input") is None else _check_text(fields["input"], "input")
        question = _check_text(fields["instruction"], "instruction") + (f"\n\n{extra}" if extra else "")
        before += _read_history(fields.get("history"))
        return _make_chat(before, question, _check_text(fields["output"], "output"))
    if before and (kind == "text" or isinstance(fields.get("prompt"), str)):
        raise BadRowError("'system' cannot stand before plain text; write it into the text, or use messages")
    if kind == "text":
        text = _check_text(fields["text"], "text")
        if not text.strip():
            raise BadRowError("'text' is empty")
        return {"text": text}
    if kind == "prompt-completion":
        if fields.get("label") is False:  # the form of KTO's data
            raise BadRowError("'label' is false: this is an example of a bad answer; leave it out")
        if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
            prompt = _check_messages(fields["prompt"], "prompt")
            return {
                "prompt": before + prompt,
                "completion": _require_answer(_check_messages(fields["completion"], "completion")),
            }
        return {field: _check_text(fields[field], field) for field in ("prompt", "completion")}
    field = FIELDS[kind][0]
    messages = _check_messages(fields[field], field)
    _require_answer(messages[1:])  # the first turn cannot be an answer: nothing was asked
    if before and messages[0]["role"] == "system":
        raise BadRowError(f"'system' and the first message of {field!r} are both a system message; keep one")
    return {"messages": before + messages}


def _read_history(history: Any) -> Messages:
    """Turn alpaca's earlier turns, pairs of question and answer, into messages."""
    messages: Messages = []
    for number, pair in enumerate(history or [], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError(f"'history', pair {number} must be [question, answer], got {_describe(pair)}")
        texts = [_check_text(text, f"'history', pair {number}") for text in pair]
        messages += [{"role": role, "content": text} for role, text in zip(ROLES[1:], texts, strict=True)]
    return messages


def _make_chat(before: Messages, question: str, answer: str) -> Record:
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _check_messages(turns: Any, field: str) -> Messages:
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{field!r} must be a list of messages, got {_describe(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{field!r}, message {number}"
        if not isinstance(turn, dict):
            raise BadRowError(f"{place} must be an object with a role and text, got {_describe(turn)}")
        role, content = ("from", "value") if "from" in turn else ("role", "content")
        if role not in turn or content not in turn:
            raise BadRowError(
                f"{place} has no {content if role in turn else role!r}; it has {', '.join(turn)}"
            )
        for key in REFUSED_IN_TURNS:
            if turn.get(key) not in EMPTY:
                raise BadRowError(
                    f"{place} has {key!r}, which cannot be trained on; write it into {content!r}"
                )
        name = SHAREGPT_ROLES.get(str(turn[role]), turn[role])
        if name not in ROLES:
            known = (*ROLES, *SHAREGPT_ROLES) if role == "from" else ROLES
            raise BadRowError(f"{place} has the unknown role {turn[role]!r}; known: {', '.join(known)}")
        message = {"role": name, "content": _check_text(turn[content], f"{place}, {content}")}
        messages.append(message if _is_learned(turn, place) else message | {"train": False})
    return messages


def _is_learned(turn: Record, place: str) -> bool:
    """Whether an answer may carry loss: not with OpenAI's `weight: 0` or axolotl's `train: false`."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRowError(f"{place} has the weight {weight!r}; only 0 and 1 can be trained with")
    return weight != 0 and turn.get("train") is not False


def _require_answer(messages: Messages) -> Messages:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn to learn from")
    if all(message.get("train") is False for message in answers):
        raise BadRowError("every assistant turn is marked not to be learned from (weight: 0 or train: false)")
    return messages


def _check_fields(row: Any) -> Record:
    if not isinstance(row, dict):
        raise BadRowError(f"a record must be an object with named fields, got {_describe(row)}")
    for field, holds in REFUSED.items():
        if row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds {holds}")
    return row


def _check_text(value: Any, name: str) -> str:
    name = name if name.startswith("'") else repr(name)
    if not isinstance(value, str):
        raise BadRowError(f"{name} must be text, got {_describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: an undecodable byte, or an escape in JSON
        raise BadRowError(f"{name} is not UTF-8 text; save it as UTF-8") from None
    return value


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    names = {"str": "text", "list": "a list" if value else "an empty list", "dict": "an object"}
    name = type(value).__name__
    return names.get(name, f"a value of type {name}")
