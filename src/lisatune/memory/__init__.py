"""The memory of a run: count it, plan it, make it fit, check it."""

from lisatune.memory.fit import find_fit as find_fit
from lisatune.memory.plan import plan_memory as plan_memory
from lisatune.memory.tracker import measure as measure
