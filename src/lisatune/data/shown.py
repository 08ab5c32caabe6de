"""Rows of tokens as a reader sees them: which text carries loss."""

from itertools import groupby
from typing import Any, TypeAlias

from rich.text import Text

from lisatune.losses.causal_lm import IGNORE

__all__ = ["MarkedText", "mark_loss", "show_loss"]

MarkedText: TypeAlias = tuple[tuple[str, bool], ...]
"""Texts one after another, each with whether it carries loss."""

OPEN, CLOSE = "⟦", "⟧"


def mark_loss(row: dict[str, Any], tokenizer: Any) -> MarkedText:
    """Turn the first sequence of a row into text, in parts that carry loss and parts that do not.

    Args:
        row: a row of `Examples`; of a packed one the first sequence is taken.
        tokenizer: the tokenizer that made it.

    Returns:
        The parts in their order. A character whose tokens are in two parts is replaced by �.
    """
    length = row["seq_lengths"][0] if "seq_lengths" in row else len(row["input_ids"])
    pairs = zip(row["input_ids"][:length], row["labels"][:length], strict=True)
    parts = groupby(((int(token), int(label) != IGNORE) for token, label in pairs), key=lambda pair: pair[1])
    return tuple((tokenizer.decode([token for token, _ in part]), has_loss) for has_loss, part in parts)


def show_loss(parts: MarkedText, *, most: int | None = None) -> Text:
    """Write marked text for a terminal: what carries loss stands in ⟦ ⟧ and is coloured.

    Args:
        parts: from `mark_loss`.
        most: show it in one line, with at most so many characters of each part: the middle is left out. None:
            show all of it.
    """
    text = Text()
    for part, has_loss in parts:
        part = part if most is None else _shorten(part, most)
        # A record may hold anything, also codes that a terminal would obey.
        part = "".join(char if char.isprintable() or char in "\n\t" else "�" for char in part)
        text.append(f"{OPEN}{part}{CLOSE}" if has_loss else part, style="bold green" if has_loss else "dim")
    return text


def _shorten(text: str, most: int) -> str:
    text, half = text.replace("\n", "↵"), (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
