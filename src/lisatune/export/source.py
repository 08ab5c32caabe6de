"""What is exported: a written model, the model that it began with, and the run behind both."""

from dataclasses import dataclass
from pathlib import Path

from lisatune.files import yaml
from lisatune.models.load import load_config
from lisatune.models.locate import BOTTLENECKS, is_adapter, locate
from lisatune.models.reward import find_classifier
from lisatune.models.stored import Stored, list_stored
from lisatune.recipe import Recipe
from lisatune.runs.card import rewrite_card
from lisatune.runs.summary import model_of

__all__ = ["Source", "list_weights", "open_source"]


@dataclass(frozen=True)
class Source:
    """A model to export."""

    model: Path
    """Folder of the written model."""

    run: Path | None
    """Run folder; None if the model is not a run's."""

    base: str | None
    """The model that it began with, by a name that `load_model` knows; None if that is not known."""

    revision: str | None = None
    """Revision of the base."""

    trusts_remote_code: bool = False
    """Whether the run trusted Python code that comes with its model."""

    def need_base(self) -> str:
        """Return the base.

        Raises:
            ValueError: it is not known.
        """
        if self.base is None:
            raise ValueError(f"{self.model} does not say which model it began with; give it as base")
        return self.base

    def refuse_adapters(self, why: str) -> None:
        """Refuse a folder of adapters.

        Raises:
            ValueError: it is one; the message ends with `why`, if its adapters are PEFT's.
        """
        if is_adapter(str(self.model)) and (self.model / BOTTLENECKS).is_file():
            raise ValueError(
                f"{self.model} holds bottleneck adapters, which are no change of weights and cannot be "
                "merged into them; copy the folder"
            )
        if is_adapter(str(self.model)):
            raise ValueError(f"{self.model} holds adapters, not a model: {why}")

    def refuse_scores(self, why: str) -> None:
        """Refuse a reward model.

        Raises:
            ValueError: it is one, or another classifier; the message ends with `why`.
        """
        config = load_config(str(self.model), trust_remote_code=self.trusts_remote_code)
        if find_classifier(config) is not None:
            raise ValueError(f"{self.model} is a reward model, which gives scores and writes no text: {why}")

    def recipe(self) -> Recipe:
        """Read the recipe of the run.

        Raises:
            ValueError: there is no run, or its recipe cannot be read.
        """
        from lisatune.train.recipe_file import load_recipe

        if self.run is None:
            raise ValueError(f"{self.model} is not in a run folder, so there is no recipe")
        return load_recipe(self.run / "recipe.yaml")

    def write_card(self, folder: Path, kind: str, note: str) -> None:
        """Write a model card into a folder that was made from the model, if it is a run's."""
        if self.run is not None:
            rewrite_card(folder, self.run, kind=kind, note=note)


def open_source(name: str, base: str | None = None) -> Source:
    """Find the model of a run, or take a model folder as it is.

    Args:
        name: run folder or model folder.
        base: the model that it began with. Default: that of the run's recipe.

    Raises:
        FileNotFoundError: the run has no model, or there is no such folder.
        ValueError: the folder cannot be used, or the run's recipe is damaged.
    """
    model, run = model_of(name)
    base = base and model_of(base)[0]
    path = Path(locate(model))
    if not path.is_dir() or not Path(model).is_dir():
        raise FileNotFoundError(f"there is no folder {name}; give the run folder, or the folder of a model")
    if run is None:
        return Source(path, None, base)
    try:
        source = yaml.load((run / "recipe.yaml").read_text(encoding="utf-8"))["model"]
        began = str(source["name"])
        trusts = source.get("trust_remote_code") is True
        revision = source.get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{run / 'recipe.yaml'} is damaged ({error}); give the folder {path}") from None
    return Source(path, run, base or began, None if base else revision, trusts)


def list_weights(folder: Path) -> Stored:
    """List the weights in a folder's safetensors files.

    Raises:
        ValueError: a file is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        return list_stored(folder)
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be read ({error})") from error
