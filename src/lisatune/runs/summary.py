"""What a run records about itself: the figures it ended with, and the machine and software it ran on.

Nothing secret is recorded: of the environment variables only `VARIABLES` are, and anything in the command
line that looks like a key is masked.
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import torch

__all__ = [
    "Sample",
    "Score",
    "Summary",
    "describe_environment",
    "mask_secrets",
    "model_of",
    "package_versions",
    "trained_on_chat",
]

PACKAGES = (
    *("lisatune", "torch", "transformers", "tokenizers", "trl", "accelerate"),
    *("datasets", "safetensors", "gguf", "numpy"),
)
"""Packages whose versions are recorded."""

VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF")
"""The only environment variables that are recorded."""


class Sample(TypedDict):
    """A held-out question, and the model's answers to it before and after training."""

    prompt: str
    reference: str
    """The answer in the held-out record."""
    before: str
    after: str


class Score(TypedDict):
    """The score of a benchmark task."""

    metric: str
    value: float
    stderr: float | None
    """Standard error over the questions."""
    items: int
    """Questions asked."""


class Summary(TypedDict, total=False):
    """The figures that a run ended with, as in summary.json. An absent figure is not printed."""

    steps: int
    tokens: int
    """Tokens trained on, without padding."""
    skipped_steps: int
    failed_saves: int
    """Checkpoints that could not be written."""
    train_seconds: float
    compile_seconds: float
    """Wall time of compiling the blocks, before the first step; not part of train_seconds."""
    tokens_per_second: float
    held_out_loss_before: float
    held_out_loss_after: float
    """Of the model that was written."""
    held_out_loss_last: float
    """Of the last step, with run.keep_best."""
    held_out_accuracy_before: float
    """Share of held-out pairs whose chosen answer is preferred, 0 to 1; with loss.name dpo or reward."""
    held_out_accuracy_after: float
    held_out_margin_before: float
    """Mean difference of the rewards of chosen and rejected answer, over the held-out pairs."""
    held_out_margin_after: float
    held_out_loss_by_source_before: dict[str, float]
    """Of each source of a mixture, by its name."""
    held_out_loss_by_source_after: dict[str, float]
    stream: str
    """How often the shards of a stream were read, and how many records were left out of it."""
    best_step: int
    """Step that the model is of, with run.keep_best."""
    planned_steps: int
    """Steps that the run would have had, where run.stop_after ended it earlier."""
    peak_bytes: int
    """Most memory in use at once: resident memory on the CPU, else the accelerator's."""
    planned_bytes: int
    """Most bytes of tensors in a training step, according to the plan."""
    planned_at_peak: dict[str, int]
    """The planned bytes by category."""
    plan: str
    """How planned_bytes was found: traced, or arithmetic."""
    measured_bytes: int
    measured: str
    """What measured_bytes counts: tensors in a step, or growth of resident memory."""
    model_dtype: str
    """Dtype of the written weights, if it is not the one that they were trained in."""
    peak_state_bytes: int
    """Most bytes of optimizer state at once."""
    peak_state_elements: int
    peak_trainable: int
    """Most parameters that trained at once."""
    visits: list[int]
    """Number of periods in which each block trained."""
    proof: str
    moved_share: float
    """Mean share of the drawn blocks' numbers that a period changed, 0 to 1; absent before a whole period."""
    samples: list[Sample]
    scores: dict[str, Score]
    """Of the written model, by task, with run.evaluate."""
    is_chat: bool
    """Whether the run trained on conversations; else on plain text or plain prompts, without a template."""
    model: str
    """Folder of the fine-tuned model."""


def model_of(name: str) -> tuple[str, Path | None]:
    """Find the model that a name stands for: a run folder's, or the name itself.

    Returns:
        The model's name, and the run folder; None if the name is not a run's.

    Raises:
        FileNotFoundError: the run has no model yet, or the folder is a checkpoint.
    """
    run = Path(name)
    if all((run / file).is_file() for file in ("manifest.json", "state.json", "other.safetensors")):
        raise FileNotFoundError(
            f"{name} is a checkpoint, from which training resumes, not a model; give the run's folder once "
            "`train --resume` has finished it"
        )
    if not (run / "recipe.yaml").is_file():
        return name, None
    if not (run / "model").is_dir():
        raise FileNotFoundError(f"the run in {name} has no model yet; finish it with `train --resume`")
    return str(run / "model"), run


def trained_on_chat(run: Path) -> bool | None:
    """Return whether a run trained on conversations; None if the folder is not a finished run's."""
    try:
        is_chat = json.loads((run / "summary.json").read_text(encoding="utf-8")).get("is_chat")
    except (OSError, ValueError):
        return None
    return is_chat if isinstance(is_chat, bool) else None


def describe_environment() -> dict[str, Any]:
    """Describe this process and its machine as plain dicts, lists, numbers and strings."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": mask_secrets(sys.argv),
        "commit": _ask_git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_ask_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads(), "devices": devices},
        "packages": dict(package_versions()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


@functools.cache
def package_versions() -> dict[str, str]:
    """Look up the versions of PACKAGES, once for each process: each takes reading a file of metadata."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def mask_secrets(arguments: Sequence[str]) -> list[str]:
    """Mask what looks like a key: known prefixes, user:password@, values of token and similar options."""
    text = "\0".join(arguments)
    text = re.sub(r"\b(hf|sk|gh[oprsu]|github_pat|glpat|xox[abp])([_-])[\w-]{8,}", r"\1\2***", text)
    text = re.sub(r"\b(AKIA|ASIA|AIza|eyJ)[\w.+/=-]{12,}", r"\1***", text)
    text = re.sub(r"(?i)\b(bearer|basic)([ :=\0]+)[^\s\0]{8,}", r"\1\2***", text)
    text = re.sub(r"(://)[^/\s\0@]+@", r"\1***@", text)
    names = r"(?:token|secret|passw(?:or)?d|(?:api|access|private)[_-]?key)"
    text = re.sub(rf"(?i)({names}[=\0 ]+)[^\0]+", r"\1***", text)
    return text.split("\0")


def _ask_git(*arguments: str) -> str | None:
    """Ask git about the working directory. None where there is no git or no repository."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None
