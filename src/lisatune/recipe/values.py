"""Checks of single values, which the sections of a recipe share."""

import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

__all__ = ["at_least", "check_choices", "is_number", "unknown"]


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Write the message for an unknown name: the nearest known one, and all known ones."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {str(name)!r}.{hint} Known: {', '.join(known)}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(low: int, name: str, value: int | None) -> None:
    """Refuse a number below `low`; `name` is the key."""
    if value is not None and value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def check_choices(section: str, config: Any, *, separator: str = ".") -> None:
    """Refuse a value that its field's `Literal` does not list. A recipe may be built without cyclopts."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        others = tuple(get_origin(kind) or kind for kind in kinds if get_origin(kind) is not Literal)
        if choices and value not in choices and not isinstance(value, others):
            raise ValueError(f"{section}{separator}{name} must be one of {', '.join(choices)}, got {value!r}")
