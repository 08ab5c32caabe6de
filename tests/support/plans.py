"""Plans of memory that are made once for each recipe: a search asks for the same ones in many tests."""

from dataclasses import replace
from typing import Any

from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig


class PlansOnce:
    """`plan_memory` that remembers what it returned, by everything that it was asked."""

    def __init__(self) -> None:
        self._made: dict[str, MemoryPlan] = {}

    def forget(self) -> None:
        """Forget all plans, before a test in which they would be others."""
        self._made.clear()

    def __call__(self, recipe: Recipe, **options: Any) -> MemoryPlan:
        """Plan, or return the plan that was made before."""
        # A search names the defaults. Rows and run folder are not read.
        named = {"ranks": 1, "length": recipe.data.max_length} | options
        data, run = replace(recipe.data, train=""), replace(recipe.run, output=None)
        key = repr((replace(recipe, data=data, run=run), sorted(named.items())))
        if key not in self._made:
            self._made[key] = plan_memory(recipe, **options)
        return self._made[key]


def peak_of(method: str, config: Any, precision: Any) -> int:
    """Return the planned peak, in bytes, of a method with its defaults on a model of this config."""
    recipe = Recipe(
        model=ModelConfig(name="x"),
        data=DataConfig(train="x", max_length=64),
        method=METHODS[method](),
        run=RunConfig(precision=precision, batch_size=2, device="cpu", steps=40),
    )
    return plan_memory(recipe, config=config).peak_bytes
