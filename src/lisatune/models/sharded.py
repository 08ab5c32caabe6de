"""A model on several ranks: each reads the rows that are its own, and none ever holds all weights.

The model is built without weights, divided, and then filled from its safetensors files. That takes files that
hold the model's weights under the model's own names. Where transformers would rename, merge or convert them,
each rank loads the whole model into host memory before it is divided, and a warning says so.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import local_part, reshard
from lisatune.files.disk import written_aside
from lisatune.files.tensors import (
    Divided,
    collect,
    divided_tensors,
    gathered,
    lasting_tensors,
    read_part,
    write_file,
)
from lisatune.models.hf import check_loaded, import_auto_model, import_transformers, one_sentence, quiet
from lisatune.models.load import load_config, load_model, locate, save_model

__all__ = ["load_for_ranks", "save_from_ranks"]

INDEX = "model.safetensors.index.json"


ONE_FILE = "model.safetensors"


LARGEST_FILE = "50GB"
"""As `save_pretrained` divides weights among files."""


Fill = Callable[[], None]


Places = dict[str, tuple[Path, str]]
"""File of each weight, and its name there."""


def load_for_ranks(name: str, **options: Any) -> tuple[Any, Fill | None]:
    """Open a model that is going to be divided among ranks.

    Args:
        name, options: as of `models.load_model`.

    Returns:
        The model, on the meta device but for buffers, which are computed, and what puts the weights into it
        once it is divided and has storage. Or the whole model, and None.

    Raises:
        ValueError, OSError, RuntimeError: as `models.load_model` does.
    """
    model = _hollow_model(name, **options)
    places = _find_weights(_weight_folder(name, options.get("revision")), model)
    if places is None:
        warnings.warn(
            f"{name} does not hold its weights by the model's own names: every rank loads all of them into "
            "host memory before they are divided",
            stacklevel=2,
        )
        return load_model(name, **options), None
    return model, lambda: _fill(name, model, places)


def save_from_ranks(model: Any, tokenizer: Any, folder: Path, largest_file: str | int = LARGEST_FILE) -> None:
    """Write a divided model as a plain Hugging Face folder, tensor by tensor; every rank must call it.

    Raises:
        OSError: it could not be written; a folder from before is as it was.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    reshard(model)
    left_out = model._keys_to_ignore_on_save or ()
    tensors = {name: t for name, t in lasting_tensors(model).items() if name not in left_out}
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=largest_file)
    divided = divided_tensors(tensors)
    files: dict[str, dict[str, Divided]] = {
        file: {name: divided[name] for name in names} for file, names in split.filename_to_tensors.items()
    }

    is_converted = bool(vars(model).get("_weight_conversions"))  # transformers' record of how it was loaded

    def write(wholes: Iterator[Tensor]) -> None:
        if is_converted:  # and has to be converted back
            weights = {name: t.cpu() for part in files.values() for name, t in collect(part, wholes).items()}
            save_model(model, tokenizer, folder, weights=weights)
            return
        with quiet(), written_aside(folder) as aside:
            model.save_pretrained(aside, state_dict={})  # config, generation config and the model's own code
            (aside / ONE_FILE).unlink(missing_ok=True)
            for file, parts in files.items():
                write_file(aside / file, parts, wholes, metadata={"format": "pt"})
            if split.is_sharded:
                total = {"total_parameters": sum(t.numel() for t in shapes.values()), **split.metadata}
                index = {"metadata": total, "weight_map": split.tensor_to_filename}
                (aside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            tokenizer.save_pretrained(aside)

    ranks.consume_on_rank0(gathered(*files.values()), write)


def _hollow_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build the model with parameters on the meta device and buffers on the CPU, where they are computed."""
    from accelerate import init_empty_weights

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    with one_sentence(name), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = import_auto_model().from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    if model.can_generate():
        with suppress(OSError), quiet():
            model.generation_config = import_transformers().GenerationConfig.from_pretrained(
                locate(name), revision=revision
            )
    return model.eval()


def _weight_folder(name: str, revision: str | None = None) -> Path:
    """Find the local folder with a model's safetensors files; those of a hub id are fetched."""
    place = locate(name)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    with one_sentence(name):
        return Path(
            snapshot_download(place, revision=revision, allow_patterns=["model*.safetensors", "*.json"])
        )


def _find_weights(folder: Path, model: Any) -> Places | None:
    """Find where each weight lies; None unless all do, once, by the model's own names and in its shapes."""
    from safetensors import SafetensorError, safe_open

    if model._keep_in_fp32_modules_strict:
        return None
    stored: dict[str, tuple[Path, list[int]]] = {}
    try:
        index = folder / INDEX
        names = [ONE_FILE]
        if not (folder / ONE_FILE).is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for each in names:
            with safe_open(folder / each, framework="pt") as file:
                stored |= {key: (folder / each, file.get_slice(key).get_shape()) for key in list(file.keys())}
    except (OSError, ValueError, LookupError, SafetensorError):
        return None  # transformers says what is wrong
    aliases: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(tensor, []).append(name)
    places: Places = {}
    for tensor, names in aliases.items():
        found = [name for name in names if name in stored]
        if len(found) != 1 or tuple(stored[found[0]][1]) != tuple(tensor.shape):
            return None  # two names of one tensor may hold different numbers
        places[names[0]] = stored[found[0]][0], found[0]
    unused = stored.keys() - {key for _, key in places.values()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    unused = {key for key in unused if not any(re.search(pattern, key) for pattern in ignored)}
    check_loaded(str(folder), {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": unused})
    return places


def _fill(name: str, model: nn.Module, places: Places) -> None:
    from safetensors import safe_open

    with one_sentence(name), torch.no_grad():
        for weight, tensor in lasting_tensors(model).items():
            path, key = places[weight]
            with safe_open(path, framework="pt") as file:
                local_part(tensor).copy_(read_part(file, key, tensor))
