"""What kinds of records there are, and how one record becomes one of the three forms that train.

    messages           messages
    sharegpt           conversations
    alpaca             instruction, output; input, system, history
    instruction        instruction, response; context (Dolly), input, system
    prompt-completion  prompt, completion; system, label
    question-answer    question, answer; context, system (GSM8K)
    query-response     query, response; system (MetaMath)
    oasst              prompt with its replies, or rows of one message each (`lisatune.data.oasst`)
    text               text

The first kind whose fields are all there is taken. Fields that change what a record teaches are honoured or
refused by name. A field that is null or empty counts as absent.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lisatune.data.media import MEDIA_FIELDS
from lisatune.data.oasst import follow_tree
from lisatune.data.sources import BadRowError
from lisatune.data.turns import (
    EMPTY,
    Messages,
    ask_and_answer,
    check_messages,
    check_text,
    check_tools,
    describe,
    read_system,
    require_answer,
)
from lisatune.recipe.values import unknown

__all__ = [
    "KINDS",
    "TURN_FIELDS",
    "Kind",
    "Record",
    "check_names",
    "normalise",
    "recognise_kind",
    "rename_fields",
    "rename_rows",
]

Record: TypeAlias = dict[str, Any]
"""A record in one of the three forms that `lisatune.data.records` names."""


@dataclass(frozen=True)
class Kind:
    """The fields of one kind of records."""

    needed: tuple[str, ...]
    """Fields that a record must have."""
    optional: tuple[str, ...] = ("system",)
    """Fields that are read if they are there."""

    def reads(self, field: str) -> bool:
        """Whether anything of a field is used."""
        return field in self.needed or field in self.optional


KINDS: dict[str, Kind] = {
    "messages": Kind(("messages",), ("system", "tools", "functions")),
    "sharegpt": Kind(("conversations",), ("system", "tools", "functions")),
    "oasst": Kind(("message_tree_id", "prompt"), ("tree_state",)),
    "alpaca": Kind(("instruction", "output"), ("input", "system", "history")),
    "instruction": Kind(("instruction", "response"), ("context", "input", "system")),
    "prompt-completion": Kind(("prompt", "completion"), ("system", "label", "tools", "functions")),
    "question-answer": Kind(("question", "answer"), ("context", "system")),
    "query-response": Kind(("query", "response")),
    "text": Kind(("text",)),
}

PREFERENCE = "so this is preference data; set loss.name: dpo, or reward, to train on it"
TURN_FIELDS = ("role", "content")
"""Fields of a message that `data.fields` may name too."""

REFUSED = {
    "chosen": f"a preferred answer, {PREFERENCE}",
    "rejected": f"a rejected answer, {PREFERENCE}",
    "rejected_response": f"a rejected answer, {PREFERENCE}",
} | MEDIA_FIELDS
"""Fields that would change what a record teaches, and what they hold."""

QUESTIONS = {
    "alpaca": ("instruction", "output"),
    "instruction": ("instruction", "response"),
    "question-answer": ("question", "answer"),
    "query-response": ("query", "response"),
}
"""Kinds of one question and one answer."""

BELOW = ("input", "context")
"""Fields whose text stands below the question, after an empty line."""


def recognise_kind(row: Any) -> str:
    """Tell the kind of a record from its fields.

    Raises:
        BadRowError: it is no object, or its fields are of no known kind.
    """
    fields = _check_fields(row)
    holding = {field for field, value in fields.items() if value is not None}
    for found in (holding, fields):
        for kind, has in KINDS.items():
            if all(field in found for field in has.needed):
                return kind
    forms = "; ".join(" and ".join(has.needed) for has in KINDS.values())
    raise BadRowError(
        f"cannot tell the kind of the record from its fields {', '.join(fields)}; known: {forms}; "
        "data.fields gives fields of other names one of these"
    )


def check_names(names: Mapping[str, str] | None, needed: Iterable[str]) -> dict[str, str]:
    """Refuse names in `data.fields` that nothing needs, and return them.

    Raises:
        ValueError: one is unknown.
    """
    known = sorted({*needed, *TURN_FIELDS})
    for name in names or {}:
        if name not in known:
            raise ValueError(f"data.fields: {unknown('field', name, known)}")
    return dict(names or {})


def rename_rows(rows: Iterable[tuple[str, Any]], names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Rename the fields of rows with their places; in place of a row that lacks one comes the problem."""
    for place, row in rows:
        try:
            yield place, rename_fields(row, names)
        except BadRowError as problem:
            yield place, problem


def rename_fields(row: Any, names: Mapping[str, str]) -> Any:
    """Give fields the names that `data.fields` asks for.

    Args:
        row: the record as it was read.
        names: by the name that a kind needs, the record's own; `a.b` is field b of field a. Those of
            `TURN_FIELDS` are names in the record's messages.

    Raises:
        BadRowError: the record has no such field.
    """
    if not names or not isinstance(row, dict):
        return row
    of_turns = {ours: theirs for ours, theirs in names.items() if ours in TURN_FIELDS}
    names = {ours: theirs for ours, theirs in names.items() if ours not in TURN_FIELDS}
    taken = {theirs if theirs in row else theirs.partition(".")[0] for theirs in names.values()}
    renamed = {field: value for field, value in row.items() if field not in taken}
    for ours, theirs in names.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if not isinstance(value, dict) or part not in value:
                fields = ", ".join(row) or "none"
                raise BadRowError(
                    f"data.fields names the field {theirs!r}, which is missing; there are: {fields}"
                )
            value = value[part]
        renamed[ours] = value
    return {field: _rename_turns(value, of_turns) for field, value in renamed.items()}


def _rename_turns(value: Any, names: Mapping[str, str]) -> Any:
    """Give the fields of messages the names that they need; what is no list of messages stays."""
    if not names or not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [
        {field: each for field, each in turn.items() if field not in names.values()}
        | {ours: turn[theirs] for ours, theirs in names.items() if theirs in turn}
        for turn in value
    ]


def normalise(row: Any, kind: str, *, needs_answer: bool = True) -> Record:
    """Bring a record of a kind into its form.

    Args:
        row: the record as it was read.
        kind: one of `KINDS`.
        needs_answer: whether to refuse a conversation without an answer to learn from.

    Raises:
        BadRowError: a field is missing, holds the wrong thing, or cannot be trained on.
    """
    fields = _check_fields(row)
    for field in KINDS[kind].needed:
        if field not in fields:
            raise BadRowError(
                f"the field {field!r} is missing; the fields are: {', '.join(fields) or 'none'}"
            )
    before = read_system(fields)
    if kind in QUESTIONS:
        question, answer = QUESTIONS[kind]
        parts = [check_text(fields[question], question)]
        below = [name for name in BELOW if name in KINDS[kind].optional and fields.get(name) not in EMPTY]
        parts += [check_text(fields[name], name) for name in below]
        before += _read_history(fields.get("history") if kind == "alpaca" else None)
        return ask_and_answer(before, "\n\n".join(parts), check_text(fields[answer], answer))
    if before and (kind == "text" or isinstance(fields.get("prompt"), str)):
        raise BadRowError("'system' cannot stand before plain text; write it into the text, or use messages")
    if kind == "text":
        text = check_text(fields["text"], "text")
        if not text.strip():
            raise BadRowError("'text' is empty")
        return {"text": text}
    if kind == "prompt-completion":
        return _read_completion(fields, before, needs_answer)
    field = "prompt" if kind == "oasst" else KINDS[kind].needed[0]
    messages = check_messages(follow_tree(fields[field]) if kind == "oasst" else fields[field], field)
    if needs_answer:
        require_answer(messages[1:])  # the first turn cannot be an answer: nothing was asked
    if before and messages[0]["role"] == "system":
        raise BadRowError(f"'system' and the first message of {field!r} are both a system message; keep one")
    return {"messages": before + messages} | _read_tools(fields)


def _read_completion(fields: Record, before: Messages, needs_answer: bool) -> Record:
    label = fields.get("label")
    if label is False or (isinstance(label, str) and label.casefold() == "false"):  # KTO's data, also as CSV
        raise BadRowError("'label' is false: this is an example of a bad answer; leave it out")
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        completion = check_messages(fields["completion"], "completion")
        completion = require_answer(completion) if needs_answer else completion
        prompt = before + check_messages(fields["prompt"], "prompt")
        return {"prompt": prompt, "completion": completion} | _read_tools(fields)
    if _read_tools(fields):
        raise BadRowError("'tools' cannot stand before plain text; use messages")
    return {field: check_text(fields[field], field) for field in ("prompt", "completion")}


def _read_tools(fields: Record) -> Record:
    found = [check_tools(fields[key], key) for key in ("tools", "functions") if fields.get(key) not in EMPTY]
    if len(found) > 1:
        raise BadRowError("'tools' and 'functions' both describe functions; keep one")
    return {"tools": found[0]} if found else {}


def _read_history(history: Any) -> Messages:
    """Turn alpaca's earlier turns, pairs of question and answer, into messages."""
    messages: Messages = []
    if history in EMPTY:
        return messages
    if not isinstance(history, list | tuple):
        raise BadRowError(f"'history' must be a list of pairs [question, answer], got {describe(history)}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError(f"'history', pair {number} must be [question, answer], got {describe(pair)}")
        texts = [check_text(text, f"'history', pair {number}") for text in pair]
        messages += [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
        ]
    return messages


def _check_fields(row: Any) -> Record:
    if not isinstance(row, dict):
        raise BadRowError(f"a record must be an object with named fields, got {describe(row)}")
    for field, holds in REFUSED.items():
        if row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds {holds}")
    return row
