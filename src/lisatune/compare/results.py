"""results.json, which `lisatune compare` writes: its keys, and how to read it.

    OUTPUT/compare.json       the settings of the comparison; only the same comparison may continue it
    OUTPUT/results.json       `Results`, below: every run, every seed, every learning rate
    OUTPUT/results.md         the results as tables
    OUTPUT/report.html        the results as one page with charts
    OUTPUT/data/              train.jsonl, validation.jsonl, test.jsonl, general.jsonl, which all runs read
    OUTPUT/runs/RUN/          the run folder of each run, as `lisatune train` makes it; its output is RUN.log

An arm is a method with its keys. A run is an arm with a learning rate and a seed. The validation slice and
the first seed choose an arm's learning rate. The test slice is read by the chosen runs only.

Losses are in nats per token that carries loss, times in seconds, sizes in bytes. A number that is unknown, or
was not finite, is None.
"""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

__all__ = [
    "SCHEMA",
    "ArmResult",
    "BaseResult",
    "EqualTime",
    "MemoryResult",
    "Point",
    "Results",
    "RunResult",
    "Slices",
    "Spread",
    "read_results",
]

SCHEMA = 1
"""Rises when a key changes its meaning or is removed. New keys do not raise it."""


class Spread(TypedDict):
    """A figure's distribution over the seeds of an arm."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1). None for one seed."""
    low: float
    high: float
    count: int
    """Number of seeds. Seeds whose runs failed are left out."""


class Point(TypedDict):
    """A loss at one step of a run."""

    step: int
    tokens: int
    """Tokens trained on up to this step, without padding."""
    seconds: float
    """Time in training steps up to this step, without evaluation, loading and compiling."""
    loss: float | None


class MemoryResult(TypedDict):
    """Live tensors of one training step by category, as `lisatune.memory.measure` counts them."""

    how: str
    """Which step was measured, on which batch, with which blocks, in words."""
    peak_bytes: int
    phase: str
    """Phase of the peak, one of `lisatune.memory.tracker.PHASES`."""
    at_peak: dict[str, int]
    """Bytes at the peak by `lisatune.memory.tracker.CATEGORIES`. Their sum is `peak_bytes`."""
    by_phase: dict[str, int]
    static_bytes: int
    host_bytes: int


class TaskGain(TypedDict):
    """The score of a benchmark task, and how much better it is than the base model's."""

    metric: str
    value: float
    stderr: float | None
    """Standard error over the questions. For an arm the mean of its runs': they ask the same questions."""
    items: int
    gain: float | None
    """Score less the base's; None for the base itself."""
    gain_stderr: float | None
    """Of the differences question by question. For an arm the mean of its runs'."""


class RunResult(TypedDict):
    """One run: an arm, a learning rate, a seed. Figures that do not exist yet are None or empty."""

    arm: str
    """Name of the arm."""
    lr: float
    seed: int
    chosen: bool
    """Whether `lr` is the arm's chosen learning rate."""
    status: Literal["done", "failed", "missing"]
    reason: str | None
    """Why the run failed, one sentence."""
    folder: str
    """Run folder, relative to the folder of results.json."""

    steps: int | None
    skipped_steps: int | None
    tokens: int | None
    """Tokens trained on, without padding."""
    train_seconds: float | None
    tokens_per_second: float | None
    validation_loss_before: float | None
    validation_loss: float | None
    """Loss after training. It chooses the learning rate."""
    test_loss: float | None
    """Loss of the model that was written. None unless `chosen`."""
    general_loss: float | None
    """Loss of the same model on general text. None without such text."""
    scores: dict[str, TaskGain]
    """Of the same model, by benchmark task; empty unless `chosen`."""
    peak_bytes: int | None
    """Peak memory: on a CPU of the process, loading included; else as allocated on the accelerator."""
    peak_state_bytes: int | None
    """Largest optimizer state."""
    trainable: int | None
    """Most parameters that trained at once."""
    touched: int | None
    """Elements of all tensors that differ from the base model after training; of adapters, all elements."""
    export_bytes: int | None
    """Size of the safetensors files in the model folder that the run wrote."""
    delta_bytes: int | None
    """Size of what must be kept beside the base model: the `touched` tensors, or the adapters."""

    held_out: list[Point]
    """Validation loss during training, from step 0 to the end."""
    train: list[Point]
    """Mean training loss of at most 200 stretches of equal length. A point is at its stretch's end."""
    visits: list[int] | None
    """In how many periods each block trained. None if the method draws no blocks."""
    movement: NotRequired[list[float] | None]
    """How far each block's weights moved, relative to their norm. None for adapters and unless `chosen`."""
    samples: list[dict[str, str]]
    """`prompt`, `reference`, `before` and `after`, as in summary.json."""


class ArmResult(TypedDict):
    """One arm over its learning rates and seeds. Each `Spread` is over the chosen learning rate's runs."""

    name: str
    method: str
    overrides: list[str]
    """The arm's changes to the recipe: `section.key=value`."""
    lrs: list[float]
    chosen_lr: float | None
    """None until a run with the first seed is done."""
    lr_at_edge: bool
    """Whether it is the lowest or highest of several learning rates. A better one may lie outside."""
    reason: str | None
    """Why there are no figures: every run failed."""

    test_loss: Spread | None
    validation_loss: Spread | None
    general_loss: Spread | None
    scores: dict[str, TaskGain]
    """Means over seeds, by benchmark task."""
    forgetting: Spread | None
    """General loss after training minus the loss before. Above 0 the model has forgotten."""
    train_seconds: Spread | None
    tokens_per_second: Spread | None
    peak_bytes: Spread | None
    touched: Spread | None
    gain_share: float | None
    """(test loss before training - mean test loss), divided by the same of `Results.reference`."""
    trainable: int | None
    export_bytes: int | None
    delta_bytes: int | None
    memory: MemoryResult | None
    """With the chosen learning rate and first seed. None if it could not be measured."""
    memory_reason: str | None
    """Why memory could not be measured."""


class BaseResult(TypedDict):
    """The model before training, in the recipe's precision."""

    test_loss: float | None
    general_loss: float | None
    scores: dict[str, TaskGain]


class Slices(TypedDict):
    """The records that all runs read: how many each slice has, and the hashes of the files."""

    train: int
    validation: int
    test: int
    general: int | None
    sha256: dict[str, str]
    """Hash of each file in OUTPUT/data, by name."""


class EqualTime(TypedDict):
    """Mean validation losses at one training time: the mean time at which the reference's runs end."""

    reference: str
    """Name of the arm whose runs set the time."""
    seconds: float
    losses: dict[str, float | None]
    """Loss by arm, between the two nearest evaluations. None for an arm that ends more than 1 % earlier."""


class Results(TypedDict):
    """The content of results.json."""

    schema: int
    made: str
    """Time of writing, ISO 8601."""
    name: str
    """Name of the recipe file, without its ending."""
    complete: bool
    """Whether every run is done or failed, and every chosen run is measured."""
    problems: list[str]
    """Warnings to a reader: failed or missing runs, learning rates at the edge. One sentence each."""
    recipe: dict[str, Any]
    """The recipe that all arms start from, `Recipe.as_dict()`."""
    budget: dict[str, int]
    """`tokens` or `steps` if one was given. Empty: the recipe's length."""
    seeds: list[int]
    data: Slices
    base: BaseResult
    reference: str | None
    """Name of the arm that the others are compared to: the one asked for, else the first of method `full`."""
    arms: list[ArmResult]
    runs: list[RunResult]
    """Arm by arm, learning rate by learning rate, seed by seed."""
    equal_time: list[EqualTime]
    """For the fastest arm, and for `reference`."""
    environment: dict[str, Any]
    """`lisatune.runs.summary.describe_environment()`. The environment of each run is in its run folder."""


def read_results(path: str | Path) -> Results:
    """Read results.json.

    Args:
        path: results.json, or the folder of a comparison.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has another schema.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there are no results in {path}; make them with `lisatune compare`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run the same `lisatune compare` again") from None
    found = values.get("schema") if isinstance(values, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found!r}, and this lisatune reads {SCHEMA}; use the version that made it"
        )
    results: Results = values
    return results
