"""The examples in docstrings run as they stand, with torch alone, on a CPU."""

import doctest
import importlib

import pytest

MODULES = (
    "lisatune.nn.blocks",
    "lisatune.nn.layers",
    "lisatune.optim.adamw",
    "lisatune.optim.galore",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_give_what_they_show(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
