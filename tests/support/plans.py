"""Plans of memory that are made once for each recipe: a search asks for the same ones in many tests."""

from dataclasses import replace
from typing import Any

from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.recipe import Recipe


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
