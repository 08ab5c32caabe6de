"""Runs of several methods over one model and data, on one rank or as jobs of several, and what they wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tiny_run
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe


class RankRuns:
    """A folder with a recipe of each method.

    Args:
        folder: where everything is written.
        model, data: a model's folder and a file of records.
        methods: the recipe's section `method` by name.
        plain: overrides of every run.
    """

    def __init__(
        self, folder: Path, model: Path, data: Path, methods: Mapping[str, str], plain: Sequence[str]
    ) -> None:
        self.folder, self._plain = folder, plain
        for name, method in methods.items():
            (folder / name).mkdir()
            tiny_run.write_recipe(folder / name, model, data, f"method: {method}\n")

    def job(self, name: str, output: str, *overrides: str, **flags: bool) -> dict[str, Any]:
        """Return a job for `rank_launcher.launch` that writes the run folder `output`."""
        keys = [*self._plain, f"run.output={self.folder / output}", *overrides]
        return {"recipe": str(self.folder / name / "recipe.yaml"), "overrides": keys, "flags": flags}

    def alone(self, name: str, output: str, *overrides: str, **flags: bool) -> Any:
        """Train the same on one rank, in this process."""
        job = self.job(name, output, *overrides)
        return train(load_recipe(Path(job["recipe"]), job["overrides"]), **flags)

    def written(self, output: str) -> dict[str, torch.Tensor]:
        """Read the weights of a run's model."""
        (file,) = (self.folder / output / "model").glob("*.safetensors")
        return load_file(file)

    def compare(self, output: str, with_output: str, *, atol: float = 1e-5, rtol: float = 1e-4) -> None:
        """Compare names, shapes, dtypes and numbers of the files that two runs wrote."""
        got, expected = self.written(output), self.written(with_output)
        assert got.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(
                got[key], weight, atol=atol, rtol=rtol, msg=lambda text, k=key: f"{k}: {text}"
            )
