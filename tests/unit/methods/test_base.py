"""What every class in METHODS has, and the numbers that searches try."""

import pytest

from lisatune import methods
from lisatune.methods import METHODS, Lisa, Lora
from lisatune.methods.base import halve


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_exported_and_final(name: str) -> None:
    kind = METHODS[name]
    assert kind.name == name
    assert kind.__name__ in methods.__all__
    assert kind.__final__  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("number", "least", "halves"), [(9, 1, [4, 2, 1]), (1, 1, []), (0, 1, []), (64, 8, [32, 16, 8])]
)
def test_halves_end_at_the_least(number: int, least: int, halves: list[int]) -> None:
    assert list(halve(number, least=least)) == halves


def test_alternatives_come_closest_first() -> None:
    lisa = Lisa(active=4, ends="8bit").alternatives(6)
    assert lisa.cheaper_ends == ({"ends": "factored"}, {"ends": "head+factored"}, {"ends": "frozen"})
    assert lisa.fewer_weights == ({"active": 2}, {"active": 1})
    assert lisa.more_weights == ({"active": 5}, {"active": 6})
    lora = Lora(rank=32).alternatives(6)
    assert lora.fewer_weights == ({"rank": 16}, {"rank": 8})
    assert not lora.cheaper_ends
    assert not lora.more_weights
    free = Lisa(sampler="independent", probabilities=(0.5,) * 6).alternatives(6)
    assert not free.fewer_weights
    assert not free.more_weights
