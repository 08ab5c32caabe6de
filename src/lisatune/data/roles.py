"""Messages that carry loss by their role, though they are no answers: of users, tools and the system.

The text of such a message is where the conversation changes if another text takes its place. So nothing needs
to be known of what a chat template writes around it. It carries loss together with the special token that
ends its turn, so that a model learns to stop there too. What ends a turn is what the template writes after
the text if no other message follows.
"""

import json
from collections.abc import Collection
from contextlib import suppress

from lisatune.data.chat import Chat, Marked, Tools, common_length
from lisatune.data.turns import Messages

__all__ = ["mark_roles"]


def mark_roles(
    chat: Chat, messages: Messages, first_answer: int, roles: Collection[str], *, tools: Tools = None
) -> Marked:
    """Write the conversation as `Chat.render_prefixes` does; messages of all `roles` carry loss.

    Args:
        chat: the chat template.
        messages: the conversation.
        first_answer: index of the first message that may be an answer, >= 1.
        roles: of `assistant` the answers are learned, of other roles every message not marked otherwise.
        tools: descriptions of the functions that may be called.

    Raises:
        ValueError: as in `render_prefixes`; or the template changes the text of a message.
    """
    marked: Marked = [(chat.render(messages, tools=tools), False)]
    if "assistant" in roles:
        marked = chat.render_prefixes(messages, first_answer, tools=tools)
    whole = marked[-1][0]
    spans = [
        _find_message(chat, messages, index, whole, tools)
        for index, message in enumerate(messages)
        if message["role"] in roles and message["role"] != "assistant" and message.get("train") is not False
    ]
    before = 0
    for text, is_learned in marked:
        spans += [(before, len(text))] if is_learned else []
        before = len(text)
    found: Marked = []
    for start, end in sorted(spans):
        found += [(whole[:start], False), (whole[:end], True)]
    return found if found and found[-1][0] == whole else [*found, (whole, False)]


def _find_message(chat: Chat, messages: Messages, index: int, whole: str, tools: Tools) -> tuple[int, int]:
    """Return where what a message says begins and ends in the whole conversation."""
    content, role = messages[index]["content"], messages[index]["role"]
    edges = {text[at] for text in (content, content.strip()) if text for at in (0, -1)}
    other = messages[index] | {"content": next(char for char in "XYZQW" if char not in edges)}
    changed = chat.render([*messages[:index], other, *messages[index + 1 :]], tools=tools)
    start = common_length(changed, whole)
    end = len(whole) - common_length(changed[start:][::-1], whole[start:][::-1])
    written = {content, *(json.dumps(content, ensure_ascii=way)[1:-1] for way in (False, True))}
    if whole[start:end].strip() not in {text.strip() for text in written}:
        raise ValueError(
            f"the chat template changes the text of message {index + 1}, so it cannot be told from the rest; "
            f"leave {role} out of loss_on"
        )
    with suppress(ValueError):  # the template may refuse a conversation that ends here
        alone = chat.render(messages[: index + 1], tools=tools)
        stop = chat.first_stop(alone[end:])
        if alone.startswith(whole[: end + len(stop)]):
            end += len(stop)
    return start, end
