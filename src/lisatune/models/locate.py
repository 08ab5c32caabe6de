"""Find the files that a model's name stands for. The hub is asked once, briefly, for what is not here."""

import difflib
import re
from pathlib import Path

from lisatune.files.disk import refuse_lfs_pointer
from lisatune.files.hub import UNREACHABLE, ask_hub
from lisatune.models.gguf import SMOLLM2, SMOLLM2_SHA256, convert_once, find_smollm2
from lisatune.models.hf import check_index
from lisatune.models.shapes import SHAPES

__all__ = ["ADAPTER_CONFIG", "BOTTLENECKS", "find_snapshot", "is_adapter", "locate", "name_elsewhere"]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER_CONFIG = "adapter_config.json"

BOTTLENECKS = "bottleneck.json"
"""What a folder of bottleneck adapters has in place of PEFT's config."""


def locate(name: str, *, revision: str | None = None, needs_weights: bool = True) -> str:
    """Find the local folder to load a model from, or return its hub id.

    Args:
        name, revision, needs_weights: as in `load.load_config`.

    Raises:
        FileNotFoundError: there is no such folder or file, and the hub does not have it or cannot be reached.
        ValueError: the folder's weights are pickled, or its index names other files.
    """
    if name == SMOLLM2:
        return str(convert_once(find_smollm2(), sha256=SMOLLM2_SHA256))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {name}")
        refuse_lfs_pointer(path)
        return str(convert_once(path))
    if path.is_dir():
        _check_folder(path, needs_weights=needs_weights)
        return str(path)
    if path.exists():
        raise FileNotFoundError(f"model {name} is a file; give the folder that it is in, or a .gguf file")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/"):
        raise FileNotFoundError(f"there is no model folder {name}{_suggest(path)}")
    if name in SHAPES and name != "gpt2":
        raise FileNotFoundError(
            f"there is no model folder {name}; {name} is a shape, from which `lisatune plan` plans. Give a "
            "folder or the model's hub id"
        )
    return _ask_hub(name, path, revision)


def _ask_hub(name: str, path: Path, revision: str | None) -> str:
    """Return a hub id if the hub has it, or the folder of an earlier download if it cannot be reached."""
    problem = ask_hub(name, "model", revision)
    if not problem:
        return name
    earlier = find_snapshot(name, revision) if problem.startswith(UNREACHABLE) else None
    if earlier is None:
        raise FileNotFoundError(f"there is no model folder {name}, and {problem}{_suggest(path)}")
    return str(earlier)


def _suggest(path: Path) -> str:
    """Suggest the folder or the known name that is nearest; empty if none is near."""
    folders = [entry.name for entry in path.parent.glob("*") if entry.is_dir()]
    if near := difflib.get_close_matches(path.name, folders, 1):
        return f"; did you mean {path.parent / near[0]}?"
    if near := difflib.get_close_matches(path.name.lower(), SHAPES, 1):
        what = "" if near[0] == SMOLLM2 else " (a shape, from which `lisatune plan` plans)"
        return f"; did you mean {near[0]}{what}?"
    return ""


def find_snapshot(name: str, revision: str | None) -> Path | None:
    """Find the files of a local folder, or of a hub id that was downloaded before; None if there are none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def name_elsewhere(name: str) -> tuple[str, str | None]:
    """Return the name by which a model is found from other folders and, where it can be, on other machines.

    A folder in the hub's cache becomes its hub id and commit, and any other path an absolute one. The alias
    `smollm2-135m` stays, because only lisatune's cache has it as a folder.

    Returns:
        The name, and the commit if the name does not say which it is.
    """
    path = Path(name).expanduser()
    if name == SMOLLM2 or not path.exists():
        return name, None
    cached = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", path.absolute().as_posix())
    if cached:
        return cached[1].replace("--", "/"), cached[2]
    return str(path.absolute()), None


def is_adapter(name: str) -> bool:
    """Whether a name is a local folder of adapters, PEFT's or bottlenecks."""
    path = Path(name).expanduser()
    has_adapters = (path / ADAPTER_CONFIG).is_file() or (path / BOTTLENECKS).is_file()
    return has_adapters and not (path / "config.json").exists()


def _check_folder(path: Path, *, needs_weights: bool) -> None:
    if is_adapter(str(path)):
        return
    if not (path / "config.json").is_file():
        inner = path / "model"  # of a run folder
        give = f"{inner}, the model of this run" if inner.is_dir() else "a folder that save_pretrained wrote"
        raise FileNotFoundError(f"model folder {path} has no config.json; give {give}")
    for file in (*path.glob("*.json"), *path.glob("*.safetensors")):
        refuse_lfs_pointer(file)
    check_index(path / "model.safetensors.index.json")
    if not needs_weights or any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickled:
        raise ValueError(
            f"model folder {path} has pickled weights only ({pickled[0]}), which can run code when opened; "
            "save it as safetensors first"
        )
    raise FileNotFoundError(f"model folder {path} has no weights (*.safetensors)")
