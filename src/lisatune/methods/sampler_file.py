"""Files of probabilities, for the samplers `file`, `weight-norm` and `outlier`.

    JSON           a list of numbers, or {"probabilities": [...]}
    safetensors    a tensor "probabilities" [N]
    of a study     JSON of `lisatune study norms` or `outliers`, which also says what it was measured on:

        {"study": "norms", "model": "smollm2-135m", "unit": "block",
         "layers": [["model.layers.0", 3540672], …], "probabilities": [...], …}

A file of a study is refused with another model: paths and sizes of its blocks must be those of the model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["STUDIES", "FromFile", "SamplerFile", "describe_layers", "read_sampler_file"]

FromFile = Literal["file", "weight-norm", "outlier"]
"""Samplers that read a file."""

STUDIES = {"weight-norm": "norms", "outlier": "outliers"}
"""Samplers that read the file of a study, and which one."""

Layers = list[tuple[str, int]]
"""Module path and number of parameters of each block."""


@dataclass(frozen=True)
class SamplerFile:
    """What a file of probabilities says."""

    probabilities: tuple[float, ...]
    """One number >= 0 for each block, not all 0."""

    path: Path
    model: str | None = None
    """Name of the model that was studied."""

    layers: Layers | None = None
    """What was studied."""

    def check_model(self, layers: Layers, unit: str) -> None:
        """Refuse the file of another model.

        Args:
            layers: the model's.
            unit: what they are, "block" or "module".

        Raises:
            ValueError: another number of blocks, or blocks of another size.
        """
        of = "" if self.model is None else f", measured on {self.model}"
        if len(self.probabilities) != len(layers):
            raise ValueError(
                f"method.sampler_file: {self.path} has {len(self.probabilities)} probabilities{of}, and this "
                f"model has {len(layers)} {unit}s; make a file for this model"
                f"{'' if unit == 'block' else ' with --unit module'}"
            )
        for mine, theirs in zip(self.layers or layers, layers, strict=True):
            if tuple(mine) != tuple(theirs):
                raise ValueError(
                    f"method.sampler_file: {self.path} was measured on {self.model}, whose {mine[0]} has "
                    f"{mine[1]:,} parameters; this model's {theirs[0]} has {theirs[1]:,}; make a file for it"
                )


def describe_layers(paths: Sequence[str], sizes: Sequence[int]) -> Layers:
    """Return the description by which a file knows its model."""
    return list(zip(paths, sizes, strict=True))


def read_sampler_file(path: str | Path, sampler: str) -> SamplerFile:
    """Read the probabilities of a sampler.

    Args:
        path: of a JSON or safetensors file.
        sampler: `file`, or one in `STUDIES`, which needs the file of its study.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not one of the sampler; the message says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        study = f"; lisatune study {STUDIES[sampler]} RECIPE writes one" if sampler in STUDIES else ""
        raise FileNotFoundError(f"method.sampler_file: there is no file {path}{study}")
    found = _read(path)
    made_by, wanted = found.get("study"), STUDIES.get(sampler)
    if wanted is not None and made_by != wanted:
        made = "no study" if made_by is None else f"lisatune study {made_by}"
        raise ValueError(
            f"method.sampler_file: {path} was made by {made}, and method.sampler {sampler} reads that of "
            f"lisatune study {wanted}; make it, or use method.sampler: file"
        )
    numbers = found.get("probabilities")
    if not isinstance(numbers, list) or not numbers or not all(map(_is_chance, numbers)) or not any(numbers):
        raise ValueError(
            f"method.sampler_file: {path} must have a list of numbers >= 0, not all 0, one for each block, "
            f"under probabilities; got {str(numbers)[:80]}"
        )
    layers = found.get("layers")
    return SamplerFile(
        probabilities=tuple(map(float, numbers)),
        path=path,
        model=found.get("model"),
        layers=None if layers is None else [(str(name), int(size)) for name, size in layers],
    )


def _is_chance(number: Any) -> bool:
    return type(number) in (int, float) and 0 <= number < math.inf


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"method.sampler_file: {path} is damaged: {error}") from error
        return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"method.sampler_file: {path} is neither JSON nor .safetensors ({error})") from None
    return found if isinstance(found, dict) else {"probabilities": found}
