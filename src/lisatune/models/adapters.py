"""Folders of adapters: which model they belong to, and how they get into it.

Folders of PEFT are PEFT's. A folder of bottleneck adapters has `bottleneck.json` and `bottleneck.safetensors`
beside a tokenizer. The JSON has the model that they belong to, its commit, the bottleneck size and the layers
that have adapters. The tensors are the adapters and the layer norms that were trained with them, under their
names in the model.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisatune.models.hf import explain_load_errors
from lisatune.models.locate import ADAPTER_CONFIG, BOTTLENECKS, is_adapter
from lisatune.nn.bottleneck import add_bottlenecks, find_bottlenecks
from lisatune.nn.nf4 import quantize_as_noted

__all__ = ["adapter_base", "check_adapters", "put_adapters", "write_bottlenecks"]

WEIGHTS = "bottleneck.safetensors"


def adapter_base(name: str) -> tuple[str, str | None] | None:
    """Return the model that a folder of adapters belongs to, and its revision; None for a model.

    Raises:
        ValueError: the adapters do not name their model.
    """
    if not is_adapter(name):
        return None
    folder = Path(name).expanduser()
    file = next(path for path in (folder / ADAPTER_CONFIG, folder / BOTTLENECKS) if path.is_file())
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name the model that the adapters belong to; load it with PEFT")
    return base, config.get("revision")


def check_adapters(name: str, *, scores: bool = False) -> None:
    """Look for what `put_adapters` needs, before the model of a folder of adapters loads.

    Args:
        name: the folder.
        scores: whether its model is opened as a reward model.

    Raises:
        ValueError: they belong to a reward model and `scores` is False, or the reverse.
        FileNotFoundError: the folder has no adapters in safetensors.
        ImportError: they need PEFT, and it is not installed.
    """
    path = Path(name).expanduser()
    is_bottleneck = (path / BOTTLENECKS).is_file()
    weights = WEIGHTS if is_bottleneck else "adapter_model.safetensors"
    if not (path / weights).is_file():
        raise FileNotFoundError(f"adapter folder {name} has no {weights}; save the adapters under that name")
    if not is_bottleneck:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if (config.get("task_type") == "SEQ_CLS") != scores:
            what = "write text and give no scores" if scores else "give scores and write no text (SEQ_CLS)"
            raise ValueError(f"the adapters in {name} {what}; give a folder of the other kind")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ImportError(f'adapters in {name} need PEFT: pip install "lisatune[train]"') from error


def put_adapters(model: Any, name: str) -> Any:
    """Put a folder's adapters into the model that they belong to.

    Returns:
        The model, or PEFT's around it.

    Raises:
        ValueError, RuntimeError: they are damaged, or belong to another model.
    """
    path = Path(name).expanduser()
    if (path / BOTTLENECKS).is_file():
        _read_bottlenecks(model, path)
        return model
    from peft import PeftModel

    quantize_as_noted(model, path)
    with explain_load_errors(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still uses an old name in transformers
        return PeftModel.from_pretrained(model, str(path)).eval()


def write_bottlenecks(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapters, and whatever else trains in it, into a folder.

    Args:
        model: the model.
        folder: an existing folder.
        weights: what trains, by name, where the model itself is divided among ranks.
    """
    from safetensors.torch import save_file

    adapters = find_bottlenecks(model)
    settings = {
        "base_model_name_or_path": model.name_or_path,
        "revision": getattr(model.config, "_commit_hash", None),
        "size": next(iter(adapters.values())).down.shape[0],
        "layers": list(adapters),
    }
    trained = weights or {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
    save_file(trained, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / BOTTLENECKS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_bottlenecks(model: Any, folder: Path) -> None:
    """Put a folder's adapters and norms into the model that they belong to. All else is frozen.

    Raises:
        ValueError: a file is damaged, or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / BOTTLENECKS).read_text(encoding="utf-8"))
        size, layers = int(settings["size"]), list(settings["layers"])
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapters in {folder} are damaged ({error})") from None
    modules = dict(model.named_modules())
    if missing := [path for path in layers if path not in modules]:
        raise ValueError(
            f"the adapters in {folder} do not fit: the model has no layer {missing[0]}; give the model that "
            "they were trained on"
        )
    add_bottlenecks(model, size, layers)
    model.requires_grad_(False)
    own = dict(model.named_parameters())
    wanted = {name for name, _ in own.items() if ".bottleneck." in name}
    misfits = sorted(wanted - tensors.keys()) + sorted(
        name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape
    )
    if misfits:
        raise ValueError(
            f"the adapters in {folder} do not fit: {misfits[0]} is not as in the model; give the model that "
            "they were trained on"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
            own[name].requires_grad_(True)
