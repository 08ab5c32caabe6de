import json
import subprocess
import sys

import pytest

from lisatune.data.python_docs import LONGEST_ANSWER, SHORTEST_ANSWER, _extract_answer, make_pairs


def test_there_are_thousands_of_pairs_and_a_tenth_is_held_out() -> None:
    train, validation = make_pairs("train"), make_pairs("validation")
    assert len(train) > 2000
    assert 0.05 < len(validation) / len(train) < 0.2


def test_no_name_and_no_answer_is_on_both_sides() -> None:
    train, validation = make_pairs("train"), make_pairs("validation")
    for key in ("name", "completion", "prompt"):
        assert {pair[key] for pair in train}.isdisjoint(pair[key] for pair in validation), key
    last_parts = {pair["name"].rpartition(".")[2] for pair in train}
    assert last_parts.isdisjoint(pair["name"].rpartition(".")[2] for pair in validation)


def test_every_answer_is_one_clean_paragraph() -> None:
    for pair in [*make_pairs("train"), *make_pairs("validation")]:
        answer = pair["completion"]
        assert SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER, pair
        assert answer == " ".join(answer.split()), pair
        assert answer.rstrip(")\"'`")[-1] in ".!?", pair
        assert not {">>>", "->", "::"} & set(answer.split()), pair
        assert f"`{pair['name']}" in pair["prompt"], pair


def test_well_known_functions_are_there_with_their_signature() -> None:
    by_name = {pair["name"]: pair for pair in [*make_pairs("train"), *make_pairs("validation")]}
    assert "`textwrap.wrap(text, width=70, **kwargs)`" in by_name["textwrap.wrap"]["prompt"]
    assert by_name["textwrap.dedent"]["completion"].startswith("Remove any common leading whitespace")
    assert "`math.cosh(x)`" in by_name["math.cosh"]["prompt"]
    assert "class `collections.OrderedDict`" in by_name["collections.OrderedDict"]["prompt"]
    assert "`str.isupper()`" in by_name["str.isupper"]["prompt"]  # no self


def test_another_process_gets_the_same_pairs_and_runs_no_module_with_side_effects() -> None:
    code = (
        "import json, sys; from lisatune.data import python_docs;"
        "found = python_docs.make_pairs('validation');"
        "run = {'antigravity', 'this', 'idlelib', 'tkinter', 'turtle', 'test'} & set(sys.modules);"
        "print(json.dumps([found, sorted(run)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [make_pairs("validation"), []]
    assert run.stderr == ""


def test_the_caller_may_change_the_pairs_it_got() -> None:
    make_pairs("train")[0]["prompt"] = "changed"
    assert make_pairs("train")[0]["prompt"] != "changed"


def test_unknown_part_is_an_error() -> None:
    with pytest.raises(ValueError, match="parts train and validation, not 'test'"):
        make_pairs("test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the base name of a path.", "Return the base name of a path."),
        ("Return the base name\n    of a long path", "Return the base name of a long path."),
        (
            "S.find(sub) -> int\n\nReturn the lowest index of sub in S.",
            "Return the lowest index of sub in S.",
        ),
        ("f(x) -> a\nf(x, y) -> b\n\nDo something useful with x and y.", "Do something useful with x and y."),
        (
            "Like :func:`~os.open`, but ``mode`` and *size* differ.",
            "Like `os.open`, but `mode` and size differ.",
        ),
        ("Short.", None),
        (">>> example of four words\n1\nand then some more", None),
        ("The arguments are as follows, one by one:\n\n  - a\n  - b", None),
        ("Do something useful with both.\n\n  x\n    The first argument.", "Do something useful with both."),
        ("Word " * 200, None),
    ],
)
def test_answers_are_the_leading_prose(docstring: str, answer: str | None) -> None:
    assert _extract_answer(docstring) == answer
