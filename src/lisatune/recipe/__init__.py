"""Every key of a recipe: one frozen dataclass per section.

A recipe is a YAML file with the sections `model`, `data`, `method`, `loss`, `optimizer` and `run`. Each key
of a section is a field of its class, and its default is the field's default. The docstring under a field is
its help text. The keys of `method` are the fields of the class that `method.name` picks
(`lisatune.methods.METHODS`). `lisatune.train.load_recipe` builds a `Recipe` from a file and overrides.
"""

from lisatune.recipe.data import DataConfig as DataConfig
from lisatune.recipe.data import SourceConfig as SourceConfig
from lisatune.recipe.loss import LossConfig as LossConfig
from lisatune.recipe.model import ModelConfig as ModelConfig
from lisatune.recipe.optimizer import OptimizerConfig as OptimizerConfig
from lisatune.recipe.recipe import Recipe as Recipe
from lisatune.recipe.run import RunConfig as RunConfig
