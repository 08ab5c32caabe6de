"""Shipped shapes: as many parameters as the models they are named after."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lisatune.models.shapes import SHAPES, shape_config
from lisatune.nn.layers import find_layers

PUBLISHED = {
    "gpt2": (124_439_808, 12),
    "smollm2-135m": (134_515_008, 30),
    "tinyllama-1.1b": (1_100_048_384, 22),
    "llama-2-7b": (6_738_415_616, 32),
    "llama-2-70b": (68_976_648_192, 80),
    "mistral-7b": (7_241_732_096, 32),
    "llama-3.1-8b": (8_030_261_248, 32),
    "llama-3.2-1b": (1_235_814_400, 16),
    "qwen2.5-7b": (7_615_616_512, 28),
    "mixtral-8x7b": (46_702_792_704, 32),
    "qwen3-30b-a3b": (30_532_122_624, 48),
    "gemma-3-270m": (268_098_176, 18),
}
"""Parameters, a tied one counted once, and blocks."""


def test_every_shape_has_a_published_count() -> None:
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_parameters_of_its_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    layers = find_layers(model)
    assert (sum(p.numel() for p in model.parameters()), layers.num_blocks) == PUBLISHED[name]


def test_another_name_is_no_shape() -> None:
    assert shape_config("llama-9") is None
