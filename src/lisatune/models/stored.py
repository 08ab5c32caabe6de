"""Where a model's safetensors files are, what they hold, and whether ends are tied. No weights are loaded."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lisatune.models.hf import explain_load_errors
from lisatune.models.locate import locate

__all__ = [
    "INDEX",
    "ONE_FILE",
    "Stored",
    "find_untied",
    "find_weights",
    "is_tied",
    "list_stored",
    "says_tied",
    "untie",
]

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"

ROWS_AT_ONCE = 4096
"""Rows of two matrices that are compared at once."""

Stored = dict[str, tuple[Path, tuple[int, ...]]]
"""The file and the shape of each stored weight, by name."""


def find_weights(name: str, revision: str | None = None) -> Path:
    """Find the local folder with a model's safetensors files; what is missing of a hub id's is downloaded.

    Raises:
        FileNotFoundError, ValueError: as in `lisatune.models.locate.locate`.
        OSError: the hub cannot be reached, or refuses.
    """
    place = locate(name, revision=revision)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    patterns = ["model*.safetensors", "*.json"]
    with explain_load_errors(name):
        return Path(snapshot_download(place, revision=revision, allow_patterns=patterns))


def list_stored(folder: Path) -> Stored:
    """List the weights in a folder's files, one file or several with an index.

    Raises:
        OSError, ValueError, LookupError, SafetensorError: a file is missing or damaged.
    """
    from safetensors import safe_open

    names = [ONE_FILE]
    if not (folder / ONE_FILE).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    stored: Stored = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        stored |= {key: (folder / name, shape) for key, shape in shapes.items()}
    return stored


def find_untied(folder: Path, tied: Mapping[str, str]) -> tuple[str, str] | None:
    """Find two weights that should be one by the model's config, but are stored with different numbers.

    Args:
        folder: the model's files; None is returned if they cannot be read.
        tied: pairs of names that are one parameter by the model's config.
    """
    from safetensors import SafetensorError, safe_open

    try:
        stored = list_stored(folder)
        for one, other in tied.items():
            if one not in stored or other not in stored:
                continue
            (path, shape), (other_path, other_shape) = stored[one], stored[other]
            if shape != other_shape:
                continue  # loading refuses it by name
            with safe_open(path, "pt") as file, safe_open(other_path, "pt") as other_file:
                a, b = file.get_slice(one), other_file.get_slice(other)
                for row in range(0, shape[0], ROWS_AT_ONCE):
                    if not torch.equal(a[row : row + ROWS_AT_ONCE], b[row : row + ROWS_AT_ONCE]):
                        return one, other
    except (OSError, ValueError, LookupError, SafetensorError):
        return None  # loading says what is wrong
    return None


def says_tied(config: Any) -> bool:
    """Tell whether a config ties embedding and head."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def is_tied(model: Any) -> bool:
    """Tell whether a model's embedding and head are one parameter; a model without a head counts as tied."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def untie(name: str, config: Any) -> None:
    """Correct a config that says tied beside two different matrices, and warn."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    warnings.warn(
        f"model {name}: its config.json ties embedding and head, but its files hold two different matrices; "
        "both are kept, and the result's config.json says that they are not tied",
        stacklevel=2,
    )
