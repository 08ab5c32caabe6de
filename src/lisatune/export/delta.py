"""A fine-tune as the weights that changed, and back.

    delta.json             the base by the hash of its weights; every weight of the result, and its origin
    delta*.safetensors     the weights that differ from the base's, whole and bit for bit
    the other files        config, tokenizer and all else in the model's folder that holds no weights

The result of `apply_delta` is bit for bit the model of which the delta was made; its hash is checked. A hash
is over names, dtypes, shapes and bytes of all weights, however these are divided into files.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lisatune.export.source import Source, list_weights
from lisatune.files.disk import write_aside
from lisatune.files.tensors import NAMES, as_bytes, have_equal_bits
from lisatune.models.gguf import SMOLLM2
from lisatune.models.stored import INDEX, ONE_FILE, find_weights
from lisatune.runs.card import describe_base
from lisatune.runs.summary import model_of

__all__ = ["DELTA", "Delta", "apply_delta", "is_delta", "write_delta"]

DELTA = "delta.json"
FORMAT = 1
"""Version of the layout; another one is refused."""

DTYPES = {name: dtype for dtype, name in NAMES.items()}
BYTES_IN_FILE = 5 * 10**9
"""Bytes of the largest file of changed weights."""


@dataclass(frozen=True)
class Delta:
    """What a delta holds."""

    changed: int
    """Number of weights (tensors) that are stored."""

    weights: int
    """Number of weights of the model."""

    num_bytes: int
    """Bytes of the stored weights."""

    model_bytes: int
    """Bytes of all weights of the model."""


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta."""
    return (folder / DELTA).is_file()


def write_delta(source: Source, output: Path) -> Delta:
    """Write the weights of a model that differ from its base's.

    A weight that equals the base's in another dtype is not stored, only its dtype is.

    Args:
        source: the model, with its base.
        output: folder to write; an existing one is replaced once the new one is complete.

    Raises:
        ValueError: the model is adapters, its base is not known, or files are damaged.
        OSError: the folder could not be written; an existing one is as it was.
    """
    source.refuse_adapters("they are the difference already; copy the folder")
    base = source.need_base()
    folder = find_weights(base, source.revision)
    tuned, before = _Files(source.model), _Files(folder)
    places: dict[str, dict[str, Any]] = {}
    parts: list[list[str]] = [[]]
    room, num_bytes, model_bytes = BYTES_IN_FILE, 0, 0
    for name in tuned.names:
        weight = tuned.read(name)
        model_bytes += weight.nbytes
        places[name] = {"file": tuned.file_of(name), "dtype": NAMES[weight.dtype]}
        if name in before.names and have_equal_bits(before.read(name).to(weight.dtype), weight):
            places[name]["from"] = "base"
            continue
        places[name]["from"] = "delta"
        if parts[-1] and weight.nbytes > room:
            parts.append([])
            room = BYTES_IN_FILE
        parts[-1].append(name)
        room -= weight.nbytes
        num_bytes += weight.nbytes
    shown = describe_base(base, source.revision)
    about = {
        "format": FORMAT,
        "base": {
            "name": base if base == SMOLLM2 else shown.hub_id or shown.name,
            "revision": shown.commit,
            "sha256": before.sha256(),
        },
        "result": {"sha256": tuned.sha256()},
        "weights": places,
    }
    with write_aside(output) as aside:
        from safetensors.torch import save_file

        for number, names in enumerate(parts):
            file = "delta.safetensors" if number == 0 else f"delta-{number:05d}.safetensors"
            if names:
                save_file({name: tuned.read(name) for name in names}, aside / file, {"format": "pt"})
        _copy_others(source.model, aside)
        source.write_card(aside, "delta", "This folder holds the weights that changed.")
        (aside / DELTA).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Delta(sum(map(len, parts)), len(places), num_bytes, model_bytes)


def apply_delta(folder: Path, output: Path, base: str | None = None) -> str:
    """Put the weights of a delta into its base, and write the model of which the delta was made.

    Args:
        folder: the delta.
        output: folder to write; an existing one is replaced once the new one is complete and has its hash.
        base: folder or name of the base. Default: the name in the delta.

    Returns:
        The base that was used.

    Raises:
        ValueError: the base has other weights than the one of which the delta was made, or the delta is
            damaged.
        FileNotFoundError: the base is not found.
        OSError: the folder could not be written; an existing one is as it was.
    """
    about = _read(folder)
    wanted: str = about["base"]["sha256"]
    name = model_of(base)[0] if base else about["base"]["name"]
    revision = None if base else about["base"]["revision"]
    try:
        place = find_weights(name, revision)
    except FileNotFoundError as error:
        if base:
            raise
        raise FileNotFoundError(
            f"the base of this delta, {name}, is not here ({error}); give its folder as base"
        ) from None
    before, changed = _Files(place), _Files(folder, "delta")
    if (found := before.sha256()) != wanted:
        raise ValueError(
            f"{name} is not the base of this delta: the hash of its weights is {found[:12]}… and that of the "
            f"base, {about['base']['name']}, was {wanted[:12]}…; give that one as base"
        )
    weights: dict[str, dict[str, str]] = about["weights"]
    files: dict[str, list[str]] = {}
    for weight, where in weights.items():
        files.setdefault(where["file"], []).append(weight)
    with write_aside(output) as aside:
        from safetensors.torch import save_file

        for file, names in files.items():
            tensors = {}
            for weight in names:
                origin = changed if weights[weight]["from"] == "delta" else before
                tensors[weight] = origin.read(weight).to(DTYPES[weights[weight]["dtype"]]).contiguous()
            save_file(tensors, aside / file, {"format": "pt"})
        _copy_others(folder, aside)
        if files.keys() != {ONE_FILE}:
            _write_index(aside, {weight: where["file"] for weight, where in weights.items()})
        if _Files(aside).sha256() != about["result"]["sha256"]:
            raise ValueError(f"the delta in {folder} is damaged: the result has another hash; copy it again")
    return str(name)


class _Files:
    """The weights in a folder, read one by one."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        if stem == "model":
            self._places = {name: path for name, (path, _) in list_weights(folder).items()}
        else:
            self._places = {}
            for path in sorted(folder.glob(f"{stem}*.safetensors")):
                try:
                    with safe_open(path, "pt") as file:
                        self._places |= dict.fromkeys(list(file.keys()), path)
                except (OSError, SafetensorError) as error:
                    raise ValueError(f"{path} is damaged ({error}); copy it again") from None
        self._files: dict[Path, Any] = {path: safe_open(path, "pt") for path in set(self._places.values())}
        self.names = sorted(self._places)

    def file_of(self, name: str) -> str:
        """Return the name of the file that a weight is in."""
        return self._places[name].name

    def read(self, name: str) -> Tensor:
        """Read a weight.

        Raises:
            ValueError: it is not there.
        """
        if name not in self._places:
            raise ValueError(f"{self.folder} lacks the weight {name}; copy it again")
        weight: Tensor = self._files[self._places[name]].get_tensor(name)
        return weight

    def sha256(self) -> str:
        """Hash names, dtypes, shapes and bytes of all weights, in the order of their names."""
        hashed = hashlib.sha256()
        for name in self.names:
            weight = self.read(name)
            hashed.update(f"{name}\0{NAMES[weight.dtype]}\0{tuple(weight.shape)}\0".encode())
            hashed.update(as_bytes(weight).numpy().data)
        return hashed.hexdigest()


def _copy_others(folder: Path, to: Path) -> None:
    """Copy the files beside the weights."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (DELTA, INDEX):
            shutil.copyfile(path, to / path.name)


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    total = sum(weight.nbytes for weight in map(_Files(folder, "").read, weight_map))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """Read delta.json, and refuse one that this version cannot use."""
    file = folder / DELTA
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no delta: it has no {DELTA}; give a folder that `lisatune export --delta` wrote"
        )
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"{file} has format {about['format']}, and this lisatune reads {FORMAT}")
        names: Sequence[str] = [where["file"] for where in about["weights"].values()]
        for where in about["weights"].values():
            if where["dtype"] not in DTYPES or where["from"] not in ("base", "delta"):
                raise LookupError(where)
        _ = (
            about["base"]["sha256"],
            about["base"]["name"],
            about["base"]["revision"],
            about["result"]["sha256"],
        )
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); copy it again") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file} names {name!r}; only .safetensors files in its own folder are written")
    return about
