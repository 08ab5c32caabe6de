"""Refuse options that would do nothing."""

from collections.abc import Mapping

__all__ = ["refuse_unused"]


def refuse_unused(given: Mapping[str, bool], when: str) -> None:
    """Refuse options that are given and would do nothing.

    Args:
        given: whether each option is given, by its name.
        when: ends the sentence `--public does nothing …`, such as `without --push-to`.

    Raises:
        ValueError: one is given.
    """
    unused = [name for name, is_given in given.items() if is_given]
    if len(unused) == 1:
        raise ValueError(f"{unused[0]} does nothing {when}; leave it out")
    if unused:
        raise ValueError(f"{', '.join(unused[:-1])} and {unused[-1]} do nothing {when}; leave them out")
