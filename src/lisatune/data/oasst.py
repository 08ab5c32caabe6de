"""Conversation trees of OpenAssistant (oasst1, oasst2), each flattened to one conversation.

A tree is a prompt with replies, which have replies. It comes whole, as `message_tree_id` and `prompt` with
nested `replies`, or as rows of one message each with `message_id` and `parent_id`. Such rows may stand in any
order, so a source of them is read to its end before the first conversation is made.

The rule: beginning at the prompt, take the reply with the best rank (`rank` 0 is the best; one without a rank
comes after those that have one; among equals the first in the file), leave out what is marked `deleted`, and
stop where there is no reply. What stands after the last answer is left out.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from lisatune.data.sources import BadRowError

__all__ = ["follow_tree", "plant_trees"]

ROW_FIELDS = ("message_id", "parent_id", "role", "text")
"""Fields of a row that is one message of a tree."""

Place = tuple[str, Any]
"""Where a row was read, and the row."""


def plant_trees(rows: Iterable[Place]) -> Iterator[Place]:
    """Put rows of one message each together as trees; rows of any other kind pass as they are.

    Args:
        rows: places and rows in the order of the file. The first readable row tells what they are.

    Yields:
        Places and rows. A tree has the place of its prompt.
    """
    rows = iter(rows)
    unread: list[Place] = []
    for place, row in rows:
        unread.append((place, row))
        if not isinstance(row, BadRowError):
            break
    if not unread or not _is_message(unread[-1][1]):
        yield from chain(unread, rows)
        return
    roots: list[tuple[str, dict[str, Any]]] = []
    nodes: dict[str, dict[str, Any]] = {}
    children: list[tuple[str, dict[str, Any]]] = []
    for place, row in chain(unread, rows):
        if not _is_message(row):
            problem = (
                row
                if isinstance(row, BadRowError)
                else BadRowError(f"not a message with {', '.join(ROW_FIELDS)}")
            )
            yield place, problem
            continue
        nodes[row["message_id"]] = node = row | {"replies": []}
        (roots if row["parent_id"] is None else children).append((place, node))
    for place, node in children:
        if node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
        else:
            yield place, BadRowError(f"its parent {node['parent_id']!r} is not in the data")
    for place, node in roots:
        yield place, {"message_tree_id": node["message_id"], "prompt": node}


def follow_tree(prompt: Any) -> list[Any]:
    """Follow a tree's best replies from its prompt to the last answer; see the top of this file.

    Raises:
        BadRowError: a message has no list of replies, or nobody answered.
    """
    turns: list[Any] = []
    node = prompt
    while node is not None:
        if not isinstance(node, dict) or not isinstance(node.get("replies") or [], list):
            raise BadRowError(
                f"message {len(turns) + 1} of the tree must be an object with a list of replies"
            )
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = [
            reply
            for reply in node.get("replies") or []
            if isinstance(reply, dict) and not reply.get("deleted")
        ]
        node = min(replies, key=_read_rank, default=None)  # the first of equals
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise BadRowError("the tree has no answer")
    return turns


def _read_rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else math.inf


def _is_message(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(field in row for field in ROW_FIELDS)
        and isinstance(row["message_id"], str)
        and isinstance(row["parent_id"], str | None)
    )
