"""One run, from a recipe to a model."""

from lisatune.train.loop import train as train
from lisatune.train.recipe_file import load_recipe as load_recipe
