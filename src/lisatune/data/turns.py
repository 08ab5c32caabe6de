"""Conversations as records hold them: who speaks, calls of functions, and which answers are learned.

Turns come in OpenAI's form (`role`, `content`, `tool_calls`), ShareGPT's (`from`, `value`) or under any of
the names in `ROLE_FIELDS`, `TEXT_FIELDS` and `ROLES`. They leave as

    {"role": "system" | "user" | "assistant" | "tool", "content": str}

with `tool_calls` where an assistant calls functions, `name` and `tool_call_id` where a tool answers, and
`train: False` on an answer that must not be learned. A function's arguments become an object, because chat
templates write them as JSON themselves.
"""

import json
from typing import Any, TypeAlias

from lisatune.data.media import MEDIA_FIELDS, MEDIA_PARTS, TAKE_TEXT, TEXT_FIELDS, part_type
from lisatune.data.sources import BadRowError

__all__ = [
    "EMPTY",
    "Messages",
    "answer_text",
    "ask_and_answer",
    "check_messages",
    "check_text",
    "check_tools",
    "describe",
    "find_answer",
    "read_system",
    "require_answer",
]

Messages: TypeAlias = list[dict[str, Any]]
"""A conversation: messages with `role` and `content`; an answer not to learn from has `train` False too."""

EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")
"""Values of a field that is there and says nothing, also as JSON in text."""

ROLE_FIELDS = ("role", "from", "speaker")

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "bing"),
    "tool": ("tool", "ipython", "observation", "function_response", "function"),
}
"""Our roles, and the names that data has for them."""

CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT's turns whose text is the call of a function, as JSON."""

REFUSED = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that would change what it says."""


def check_messages(turns: Any, field: str) -> Messages:
    """Check a list of turns and bring them into one form.

    Args:
        turns: what the record holds.
        field: name of the record's field, for messages.

    Raises:
        BadRowError: it is no list of turns, or a turn has no role, no text, or something that cannot be used.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"{field!r} must be a list of messages, got {describe(turns)}")
    return [_check_turn(turn, f"{field!r}, message {number}") for number, turn in enumerate(turns, 1)]


def require_answer(messages: Messages) -> Messages:
    """Refuse messages without an answer to learn from."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no assistant turn to learn from")
    if all(message.get("train") is False for message in answers):
        raise BadRowError("every assistant turn is marked not to be learned from (weight: 0 or train: false)")
    return messages


def read_system(fields: dict[str, Any]) -> Messages:
    """Read the field `system` of a record as a message; none if it says nothing."""
    system = fields.get("system")
    return [] if system in EMPTY else [{"role": "system", "content": check_text(system, "system")}]


def find_answer(messages: Messages) -> int | None:
    """Return the index of the first answer; None if there is none. The first message answers nothing."""
    answers = (index for index, message in enumerate(messages) if index and message["role"] == "assistant")
    return next(answers, None)


def ask_and_answer(before: Messages, question: str, answer: str) -> dict[str, Any]:
    """Make a record of one question and one answer, after earlier messages."""
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def answer_text(message: dict[str, Any]) -> str:
    """Return what an answer says: its text, or else the functions that it calls, as JSON."""
    text: str = message["content"]
    return text or (json.dumps(message["tool_calls"]) if "tool_calls" in message else "")


def check_tools(tools: Any, field: str) -> list[dict[str, Any]]:
    """Bring descriptions of functions, as a list or as JSON in text, into the form that templates read.

    Functions may be wrapped as `{"type": "function", "function": {…}}` or stand bare, as in OpenAI's older
    `functions`; they leave wrapped.

    Raises:
        BadRowError: it is no list of functions with names.
    """
    tools = _parse(tools, repr(field)) if isinstance(tools, str) else tools
    if not isinstance(tools, list):
        raise BadRowError(f"{field!r} must be a list of functions, got {describe(tools)}")
    found = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(
                f"{field!r}, entry {number} must be a function with a name, got {describe(tool)}"
            )
        found.append({"type": "function", "function": _without_nulls(function)})
    return found


def check_text(value: Any, name: str) -> str:
    """Refuse what is no text, or no UTF-8; `name` is the place, in quotes if it is a sentence."""
    name = name if name.startswith("'") else repr(name)
    if not isinstance(value, str):
        raise BadRowError(f"{name} must be text, got {describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: an undecodable byte, or an escape in JSON
        raise BadRowError(f"{name} is not UTF-8 text; save it as UTF-8") from None
    return value


def describe(value: Any) -> str:
    """Name a value for a reader, shortly."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"the {'truth value' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    names = {"str": "text", "list": "a list" if value else "an empty list", "dict": "an object"}
    name = type(value).__name__
    return names.get(name, f"a value of type {name}")


def _check_turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRowError(f"{place} must be an object with a role and text, got {describe(turn)}")
    for key in REFUSED:
        if turn.get(key) not in EMPTY:
            raise BadRowError(f"{place} has {key!r}, which cannot be trained on; write it into its text")
    for field, holds in MEDIA_FIELDS.items():
        if turn.get(field) not in EMPTY:
            raise BadRowError(f"{place}: {field!r} holds {holds}")
    role_field = next((name for name in ROLE_FIELDS if name in turn), None)
    text_field = next((name for name in TEXT_FIELDS if name in turn), None)
    calls = _read_calls(turn, place)
    if role_field is None or (text_field is None and not calls):
        missing, names = ("role", ROLE_FIELDS) if role_field is None else ("text", TEXT_FIELDS)
        raise BadRowError(f"{place} has no {missing} ({', '.join(names)}); it has {', '.join(turn)}")
    named = str(turn[role_field])
    text = None if text_field is None else turn[text_field]
    role = next((role for role, names in ROLES.items() if named in names), None)
    if named in CALLS:
        role, calls, text = "assistant", [_check_call(_parse(text, place), place)], ""
    if role is None:
        known = ", ".join((*(name for names in ROLES.values() for name in names), *CALLS))
        raise BadRowError(f"{place} has the unknown role {named!r}; known: {known}")
    message: dict[str, Any] = {"role": role, "content": _join_parts(text, place, text_field, bool(calls))}
    if calls:
        if role != "assistant":
            raise BadRowError(f"{place} calls a function, which only an assistant can; its role is {named!r}")
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return message if _is_learned(turn, place) else message | {"train": False}


def _join_parts(content: Any, place: str, field: str | None, may_be_empty: bool) -> str:
    """Read a text, or a list of parts that are all text."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            kind = part_type(part)
            if kind != "text":
                instead = TAKE_TEXT if kind in MEDIA_PARTS else "leave it out"
                raise BadRowError(
                    f"{place} has a part of type {kind!r}, and only text can be trained on; {instead}"
                )
            texts.append(check_text(part.get("text") if isinstance(part, dict) else part, f"{place}, part"))
        return "".join(texts)
    return check_text(content, f"{place}, {field}")


def _read_calls(turn: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Read OpenAI's `tool_calls`, and the single `function_call` of its older form."""
    calls, older = turn.get("tool_calls"), turn.get("function_call")
    calls = [] if calls in EMPTY else _parse(calls, place) if isinstance(calls, str) else calls
    if not isinstance(calls, list):
        raise BadRowError(f"{place}, tool_calls must be a list, got {describe(calls)}")
    return [_check_call(call, place) for call in [*calls, *([] if older in EMPTY else [older])]]


def _check_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{place} calls a function without a name: {describe(call)}")
    arguments = function.get("arguments", {})
    arguments = _parse(arguments or "{}", place) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise BadRowError(
            f"{place}, arguments of {function['name']} must be an object, got {describe(arguments)}"
        )
    checked: dict[str, Any] = {"type": "function"} | (
        {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    )
    return checked | {"function": {"name": function["name"], "arguments": _without_nulls(arguments)}}


def _parse(text: Any, place: str) -> Any:
    try:
        return json.loads(check_text(text, f"{place}, call" if "message" in place else place))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRowError(f"{place} holds JSON that cannot be read ({error})") from None


def _without_nulls(value: Any) -> Any:
    """Leave out null fields: Parquet gives every function the arguments of all the others, as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _is_learned(turn: dict[str, Any], place: str) -> bool:
    """Whether an answer may carry loss: not with OpenAI's `weight: 0` or axolotl's `train: false`."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRowError(f"{place} has the weight {weight!r}; only 0 and 1 can be trained with")
    train = turn.get("train")
    if train not in (None, False, True):
        raise BadRowError(f"{place} has train: {train!r}; it must be true or false")
    if turn.get("train_detail") not in EMPTY:
        raise BadRowError(
            f"{place} has 'train_detail', and a message is learned as a whole or not; leave it out"
        )
    return weight != 0 and (train is None or bool(train))
