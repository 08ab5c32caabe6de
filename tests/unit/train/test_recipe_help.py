"""The help of a recipe's keys is complete."""

import dataclasses
import io

from rich.console import Console

from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from lisatune.train.recipe_help import print_keys


def test_help_names_every_key_of_every_section_and_method() -> None:
    out = io.StringIO()
    print_keys(Console(file=out, width=100))
    shown = out.getvalue().replace("\n│   ", "").replace(" ", "")
    for section in (ModelConfig, DataConfig, OptimizerConfig, RunConfig, *METHODS.values()):
        for field in dataclasses.fields(section):
            assert f".{field.name}" in shown, field.name
    assert "Peaklearningrate." in shown
