"""YAML as people read it, and back again unchanged."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lisatune.files import yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)


@example({"\x85": "a\u2028b\u2029"})
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_what_is_dumped_is_loaded_unchanged(value: Any) -> None:
    assert yaml.load(yaml.dump(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10.0),
        ("0x10", "0x10"),
        ("-.inf", float("-inf")),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e4567a", "1e4567a"),
    ],
)
def test_words_are_words_and_numbers_numbers(text: str, value: object) -> None:
    loaded = yaml.load(text)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: key 'a' is given twice"),
        ("a: [", "line 1: not valid YAML"),
        ("a: 1\n? [b, c]\n: 2", "line 2: not valid YAML: a key must be a word, not a list or a mapping"),
        ("{{a: 1}: 2}", "line 1: not valid YAML: a key must be a word, not a list or a mapping"),
    ],
)
def test_a_broken_document_names_its_line(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        yaml.load(text)
    assert line in str(caught.value)


def test_python_objects_are_never_made() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        yaml.load("!!python/object/apply:os.getcwd []")
