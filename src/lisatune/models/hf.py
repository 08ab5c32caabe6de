"""Calls into transformers: silent, with errors in one sentence, never a random weight, never a pickle."""

import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lisatune.console import first_line
from lisatune.nn import attention
from lisatune.nn.notices import silence_import_notices
from lisatune.recipe.values import unknown

__all__ = [
    "announce_remote_code",
    "check_attention",
    "check_index",
    "check_loaded",
    "explain_load_errors",
    "import_auto_model",
    "import_transformers",
    "silence_transformers",
]


def import_transformers() -> Any:
    """Import transformers.

    Raises:
        ImportError: it is not installed; the message has the line that installs it.
    """
    silence_import_notices()  # transformers imports torchao and bitsandbytes, if they are installed
    try:
        import transformers
    except ImportError as error:
        raise ImportError('opening models needs transformers: pip install "lisatune[train]"') from error
    return transformers


def import_auto_model(*, scores: bool = False) -> Any:
    """Import the class that opens causal language models, with our attention for CPUs registered.

    Args:
        scores: import the one for sequence classification instead, which opens reward models.
    """
    transformers = import_transformers()
    attention.register()
    return transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM


def check_attention(name: str | None) -> None:
    """Refuse an attention implementation that transformers does not know; None is its default.

    A name with a slash is not checked: it is a kernel on the hub, which transformers downloads.

    Raises:
        ValueError: the name is unknown; the message gives the nearest known one.
    """
    if name is None or "/" in name:
        return
    import_auto_model()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if name not in known:
        raise ValueError(unknown("model.attention", name, known))


def announce_remote_code(name: str, trusted: bool) -> None:
    """Warn if Python code that comes with a model is trusted. Call it before any of that code runs."""
    if trusted:
        warnings.warn(
            f"model.trust_remote_code is on: Python code that comes with {name} runs with your rights",
            stacklevel=2,
        )


def check_index(index: Path) -> None:
    """Refuse an index of weight files that names anything but safetensors files in its own folder.

    Raises:
        ValueError: it does, or it is damaged.
    """
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is damaged ({type(error).__name__}: {error}); download it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; only .safetensors files beside it are ever opened")


def check_loaded(
    name: str, info: dict[str, Any], *, drawn: Collection[str] = (), left_out: Collection[str] = ()
) -> None:
    """Check the `output_loading_info` of transformers; warn about stored weights that the model lacks.

    Args:
        name: the model.
        info: what transformers has found.
        drawn: weights that may be missing, because they are meant to be random then.
        left_out: stored weights that the model is meant to lack.

    Raises:
        RuntimeError: weights are missing or have another shape, so that they would be random; names some.
    """
    if missing := set(info["missing_keys"]) - set(drawn):
        raise RuntimeError(f"model {name} lacks weights, which would be random: {_list_some(missing)}")
    if info["mismatched_keys"]:
        raise RuntimeError(
            f"model {name} has weights in another shape: "
            f"{_list_some(key for key, *_ in info['mismatched_keys'])}"
        )
    if unexpected := set(info["unexpected_keys"]) - set(left_out):
        warnings.warn(
            f"model {name} holds weights that its architecture does not use and that the result will lack: "
            f"{_list_some(unexpected)}",
            stacklevel=3,
        )


def _list_some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def explain_load_errors(what: str) -> Iterator[None]:
    """Silence transformers inside, and turn its errors into one sentence.

    Args:
        what: what is loaded, for the sentence.

    Raises:
        FileNotFoundError, ImportError, ValueError: loading failed.
    """
    import_transformers()
    try:
        with silence_transformers():
            yield
    except Exception as error:  # a wrong value in config.json can raise anything
        text = str(error)
        if "trust_remote_code" in text:
            raise ValueError(
                f"{what} comes with its own Python code; set trust_remote_code to run it"
            ) from error
        kinds = {ImportError: ImportError, OSError: FileNotFoundError}
        kind = next((kind for known, kind in kinds.items() if isinstance(error, known)), ValueError)
        raise kind(f"could not load {what}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Say on one line what an error says."""
    from safetensors import SafetensorError

    text = str(error).strip()
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return "it has no tokenizer files; copy those of its base model, such as tokenizer.json, into it"
    reason = first_line(error)
    if reason.endswith(":") and text != reason:
        reason += f" {text.splitlines()[1].strip()}"
    says_enough = isinstance(error, ImportError | OSError | ValueError | SafetensorError) or not text
    return reason if says_enough else f"{type(error).__name__}: {reason}"


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide log lines and progress bars of transformers inside; only a download keeps its bar."""
    messages = import_transformers().utils.logging
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

    verbosity, has_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    is_loud = verbosity != messages.ERROR
    if is_loud:  # a change makes logging look through all loggers
        messages.set_verbosity_error()
    messages.disable_progress_bar()
    if has_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        if is_loud:
            messages.set_verbosity(verbosity)
        if has_bars:
            messages.enable_progress_bar()
