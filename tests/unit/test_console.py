"""Texts for people: the first line of an error."""

import pytest

from lisatune.console import first_line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("one"), "one"),
        (ValueError("one \ntwo"), "one"),
        (ValueError("\n  one\r\ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: BaseException, says: str) -> None:
    assert first_line(error) == says
