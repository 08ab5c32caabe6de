"""Open and save models: a local folder, a hub id, a GGUF file, or the built-in alias `smollm2-135m`.

Weights are read from safetensors only, in float32 unless asked otherwise; one that the files don't hold is
an error, not a random number. `lisatune.models.gguf` converts GGUF files once into a cache folder.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lisatune.files.disk import written_aside
from lisatune.models.gguf import SMOLLM2, SMOLLM2_SHA256, converted, smollm2_file
from lisatune.models.hf import (
    check_attention,
    check_index,
    check_loaded,
    import_auto_model,
    import_transformers,
    one_sentence,
    quiet,
)
from lisatune.nn.nf4 import note_quantized, quantize_as_noted

__all__ = [
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "meta_model",
    "model_from_config",
    "save_model",
    "stored_dtype",
]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


ADAPTER_CONFIG = "adapter_config.json"


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, needs_weights: bool = True
) -> Any:
    """Read a model's config, without its weights.

    Args:
        name: local Hugging Face folder, hub id, path of a .gguf file, or `smollm2-135m`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        needs_weights: refuse a local folder that holds no weights, which could not be trained.

    Raises:
        FileNotFoundError: no such folder, file or hub id, the hub can't be reached, or config.json or
            weights are missing.
        ValueError: the model can't be fine-tuned here: pickled or quantised weights, own Python code that is
            not trusted, an architecture that transformers does not know.
    """
    if _is_adapter(name):
        raise ValueError(
            f"model folder {name} holds adapters, not a model; merge them into theirs first "
            "(peft: PeftModel.merge_and_unload, then save_pretrained)"
        )
    path = locate(name, needs_weights=needs_weights)
    with one_sentence(name):
        config = import_transformers().AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        )
        raise ValueError(
            f"model {name} is stored quantised ({method}), which can't be fine-tuned; use its plain weights"
        )
    return config


def stored_dtype(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> torch.dtype | None:
    """Tell the dtype that a model's config names for its weights; None where it names none."""
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer. One without a pad token pads with its end token: mask by length, not by id.

    Arguments and errors are those of `load_config`.
    """
    path = locate(name)
    with one_sentence(f"the tokenizer of {name}"):
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name} has neither a pad nor an end token; "
                "set eos_token in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a causal language model onto the CPU, in evaluation mode.

    A folder of PEFT adapters gives the model they belong to, with the adapters in it.

    Args:
        name, revision, trust_remote_code: as in `load_config`.
        attention: attention implementation by its transformers name; None is transformers' choice.
        dtype: of the weights, whatever they are stored in.

    Raises:
        FileNotFoundError, ValueError: as in `load_config`.
        RuntimeError: the files lack weights of the model, or hold them in another shape.
    """
    if _is_adapter(name):
        return _load_adapter(name, attention=attention, dtype=dtype, trust_remote_code=trust_remote_code)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    with one_sentence(name):
        model, info = import_auto_model().from_pretrained(
            locate(name),
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    check_loaded(name, info)
    return model


def meta_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    needs_weights: bool = True,
) -> Any:
    """Build the model on the meta device: modules, names and shapes without weights. Else as `load_model`."""
    check_attention(attention)
    config = load_config(
        name, revision=revision, trust_remote_code=trust_remote_code, needs_weights=needs_weights
    )
    with one_sentence(name):
        return model_from_config(
            config, attention=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )


def model_from_config(
    config: Any, *, attention: str | None = None, dtype: torch.dtype, trust_remote_code: bool = False
) -> Any:
    """Build a causal language model on the meta device."""
    check_attention(attention)
    with torch.device("meta"):
        model = import_auto_model().from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def save_model(model: Any, tokenizer: Any, folder: str | Path, *, weights: Any = None) -> None:
    """Write model, tokenizer and chat template as a Hugging Face folder, complete or not at all.

    Of a model with PEFT adapters only these are written, with the name of the model they belong to.
    `weights`, by name, stand for those of a model that is divided among ranks.

    Raises:
        OSError: it could not be written; a folder from before is as it was.
    """
    with quiet(), written_aside(Path(folder)) as aside:
        # Else PEFT asks the hub whether the vocabulary has grown.
        options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        if weights is not None:
            options["state_dict"] = weights
        model.save_pretrained(aside, **options)
        note_quantized(model, aside)
        tokenizer.save_pretrained(aside)


def locate(name: str, *, needs_weights: bool = True) -> str:
    """Local folder to load from, or the hub id."""
    if name == SMOLLM2:
        return str(converted(smollm2_file(), sha256=SMOLLM2_SHA256))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {name}")
        return str(converted(path))
    if path.is_dir():
        _check_folder(path, needs_weights=needs_weights)
        return str(path)
    if path.exists():
        raise FileNotFoundError(f"model {name} is a file; give the folder it is in, or a .gguf file")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/"):
        raise FileNotFoundError(f"there is no model folder {name}")
    return name


def _is_adapter(name: str) -> bool:
    path = Path(name).expanduser()
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()


def _load_adapter(name: str, **options: Any) -> Any:
    """Load the model that a folder's PEFT adapters belong to, and put them in."""
    path = Path(name).expanduser()
    if not (path / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"adapter folder {name} has no adapter_model.safetensors; save it as that")
    base = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path / ADAPTER_CONFIG} does not name the model it belongs to; load it with PEFT")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f'adapters in {name} need PEFT: pip install "lisatune[train]"') from error
    model = load_model(base, **options)
    quantize_as_noted(model, path)
    with quiet(), one_sentence(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name of old
        return PeftModel.from_pretrained(model, str(path)).eval()


def _check_folder(path: Path, *, needs_weights: bool) -> None:
    if _is_adapter(str(path)):
        return
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model folder {path} has no config.json; give a folder that save_pretrained wrote"
        )
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
