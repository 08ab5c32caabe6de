"""Options that every optimizer of a recipe gets."""

import pytest

import tiny
from lisatune.methods import METHODS
from lisatune.nn.layers import find_layers
from lisatune.recipe import OptimizerConfig


@pytest.mark.parametrize("name", ["sgd", "adafactor", "sophia", "torch.optim.AdamW"])
@pytest.mark.parametrize(("method", "others"), [("lora", set()), ("bottleneck", {0.0})])
def test_adapters_have_the_weight_decay_of_the_recipe(name: str, method: str, others: set[float]) -> None:
    adapts = METHODS[method]()
    model = adapts.prepare(tiny.llama(blocks=2))
    for decay in (0.0, 0.1):
        config = OptimizerConfig(name=name, weight_decay=decay)
        groups = adapts.build_optimizer(model, find_layers(model), config).param_groups
        assert {group["weight_decay"] for group in groups} == {decay, *others}
