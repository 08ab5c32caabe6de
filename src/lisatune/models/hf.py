"""Calls into transformers: quiet, with errors in one sentence, never a random weight, never a pickle."""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lisatune.nn import attention
from lisatune.nn.notices import silence_import_notices
from lisatune.recipe import unknown

__all__ = [
    "announce_remote_code",
    "check_attention",
    "check_index",
    "check_loaded",
    "import_auto_model",
    "import_transformers",
    "one_sentence",
    "quiet",
]


def import_transformers() -> Any:
    """Import it; ImportError with the line that installs it."""
    silence_import_notices()  # transformers imports torchao and bitsandbytes, where they are installed
    try:
        import transformers
    except ImportError as error:
        raise ImportError('opening models needs transformers: pip install "lisatune[train]"') from error
    return transformers


def import_auto_model() -> Any:
    """Import the class that opens causal language models, and name our attention on CPUs to it."""
    transformers = import_transformers()
    attention.register()
    return transformers.AutoModelForCausalLM


def check_attention(name: str | None) -> None:
    """Refuse a name of no attention; one with a slash is a kernel's on the hub, which transformers knows.

    Raises:
        ValueError: names the nearest.
    """
    if name is None or "/" in name:
        return
    import_auto_model()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if name not in known:
        raise ValueError(unknown("model.attention", name, known))


def announce_remote_code(name: str, trusted: bool) -> None:
    """Warn, once before any of it runs, where Python code that comes with a model is trusted."""
    if trusted:
        warnings.warn(
            f"model.trust_remote_code is on: Python code that comes with {name} runs with your rights",
            stacklevel=2,
        )


def check_index(index: Path) -> None:
    """Refuse an index of weight files that names anything but safetensors in its own folder."""
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; only .safetensors files beside it are ever opened")


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """Read what `output_loading_info=True` gave: RuntimeError for weights that would be random, by name."""
    if info["missing_keys"]:
        raise RuntimeError(
            f"model {name} lacks weights, which would be random: {_some(info['missing_keys'])}"
        )
    if info["mismatched_keys"]:
        raise RuntimeError(
            f"model {name} has weights in another shape: {_some(k for k, *_ in info['mismatched_keys'])}"
        )
    if info["unexpected_keys"]:
        warnings.warn(
            f"model {name} holds weights that its architecture does not use, and that the result won't have: "
            f"{_some(info['unexpected_keys'])}",
            stacklevel=3,
        )


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Quiet inside; an error of transformers becomes one sentence about `what`."""
    import_transformers()
    try:
        with quiet():
            yield
    except Exception as error:  # a wrong value in config.json can raise anything
        text = str(error)
        if "trust_remote_code" in text:
            raise ValueError(
                f"{what} comes with its own Python code; set trust_remote_code to run it"
            ) from error
        kinds = {ImportError: ImportError, OSError: FileNotFoundError}
        kind = next((kind for known, kind in kinds.items() if isinstance(error, known)), ValueError)
        raise kind(f"could not load {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    from safetensors import SafetensorError

    text = str(error).strip()
    if text.startswith("Couldn't instantiate the backend tokenizer"):
        return "it has no tokenizer files; copy those of its base model, such as tokenizer.json, into it"
    lines = [line.strip() for line in text.splitlines()] or ["no reason given"]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    says_enough = isinstance(error, ImportError | OSError | ValueError | SafetensorError)
    return reason if says_enough else f"{type(error).__name__}: {reason}"


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines and progress bars of transformers inside, except those of a download."""
    messages = import_transformers().utils.logging
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]

    verbosity, has_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    if has_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if has_bars:
            messages.enable_progress_bar()
