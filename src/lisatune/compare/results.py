"""What `lisatune compare` leaves in results.json, key by key, and how to read it.

    OUTPUT/compare.json       what was asked for; a folder is gone on with only by the same comparison
    OUTPUT/results.json       `Results`, below: every run, every seed, every learning rate
    OUTPUT/results.md         the same as tables
    OUTPUT/report.html        the same as one page with charts
    OUTPUT/data/              train.jsonl, validation.jsonl, test.jsonl, general.jsonl: what every run read
    OUTPUT/runs/RUN/          one run folder each, as `lisatune train` makes it; its output is RUN.log

An arm is a method with its keys; a run is an arm with a learning rate and a seed. The learning rate of an arm
is chosen on the validation slice with the first seed; the test slice is read by chosen runs only.

Losses are nats per token that carries loss, times seconds, sizes bytes. A number that is not known, or was
not finite, is None.
"""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

__all__ = [
    "SCHEMA",
    "ArmResult",
    "BaseResult",
    "Data",
    "EqualTime",
    "MemoryResult",
    "Point",
    "Results",
    "RunResult",
    "Spread",
    "read_results",
]

SCHEMA = 1
"""Goes up when a key changes its meaning or goes; new keys may come without."""


class Spread(TypedDict):
    """A figure over the seeds of an arm."""

    mean: float
    std: float | None
    """Standard deviation of a sample (n - 1); None for one seed."""
    low: float
    high: float
    count: int
    """Seeds in it: those whose runs failed are left out."""


class Point(TypedDict):
    """A loss on a run's way."""

    step: int
    tokens: int
    """Trained on up to here, padding left out."""
    seconds: float
    """Spent in training steps up to here; evaluation, loading and compiling are left out."""
    loss: float | None


class MemoryResult(TypedDict):
    """Memory of one training step by category, as `lisatune.memory.measure` counts it: live tensors."""

    how: str
    """In words: which step, of which batch, with which blocks."""
    peak_bytes: int
    phase: str
    """Where the peak was, one of `lisatune.memory.tracker.PHASES`."""
    at_peak: dict[str, int]
    """Bytes at the peak by `lisatune.memory.tracker.CATEGORIES`; their sum is `peak_bytes`."""
    by_phase: dict[str, int]
    static_bytes: int
    host_bytes: int


class RunResult(TypedDict):
    """One run: an arm, a learning rate, a seed. Of what is not done all figures are None or empty."""

    arm: str
    """Name of the arm."""
    lr: float
    seed: int
    chosen: bool
    """Whether `lr` is the arm's chosen one."""
    status: Literal["done", "failed", "missing"]
    reason: str | None
    """Why it failed, one sentence."""
    folder: str
    """Run folder, relative to that of results.json."""

    steps: int | None
    skipped_steps: int | None
    tokens: int | None
    """Trained on, padding left out."""
    train_seconds: float | None
    tokens_per_second: float | None
    validation_loss_before: float | None
    validation_loss: float | None
    """After training; the learning rate is chosen by it."""
    test_loss: float | None
    """Of the model that was written, after training; None unless `chosen`."""
    general_loss: float | None
    """The same on general text; None without such text."""
    peak_bytes: int | None
    """Most memory in use: of the process on a CPU (loading included), else allocated on the accelerator."""
    peak_state_bytes: int | None
    """Largest optimizer state."""
    trainable: int | None
    """Most parameters that trained at once."""
    touched: int | None
    """Parameters of the tensors that differ from the base model after training; of adapters, all."""
    export_bytes: int | None
    """Safetensors in the model folder that the run wrote."""
    delta_bytes: int | None
    """What has to be kept beside the base model: `touched` tensors as they were written, or the adapters."""

    held_out: list[Point]
    """Validation loss during training, from step 0 to the end."""
    train: list[Point]
    """Mean training loss of at most 200 stretches of equal length; the point is the stretch's end."""
    visits: list[int] | None
    """In how many periods each block trained; None where blocks aren't drawn."""
    movement: NotRequired[list[float] | None]
    """How far each block's weights moved, relative to their norm; None for adapters and unless `chosen`."""
    samples: list[dict[str, str]]
    """`prompt`, `reference`, `before`, `after`, as in summary.json."""


class ArmResult(TypedDict):
    """One arm over its learning rates and seeds. `Spread`s are over the chosen learning rate's runs."""

    name: str
    method: str
    overrides: list[str]
    """What it changes in the recipe: `section.key=value`."""
    lrs: list[float]
    chosen_lr: float | None
    """None while no run with the first seed is done."""
    lr_at_edge: bool
    """Whether the chosen one is the lowest or highest of several: a better one may lie outside."""
    reason: str | None
    """Why there is nothing to report: every run failed."""

    test_loss: Spread | None
    validation_loss: Spread | None
    general_loss: Spread | None
    forgetting: Spread | None
    """General loss after training minus before; above 0 the model has forgotten."""
    train_seconds: Spread | None
    tokens_per_second: Spread | None
    peak_bytes: Spread | None
    touched: Spread | None
    gain_share: float | None
    """(loss before - mean test loss) / the same of `Results.reference`."""
    trainable: int | None
    export_bytes: int | None
    delta_bytes: int | None
    memory: MemoryResult | None
    """Of the chosen learning rate and first seed; None where it could not be measured."""
    memory_reason: str | None
    """Why it could not."""


class BaseResult(TypedDict):
    """The model before training, in the recipe's precision."""

    test_loss: float | None
    general_loss: float | None


class Data(TypedDict):
    """What all runs read."""

    train: int
    """Records."""
    validation: int
    test: int
    general: int | None
    sha256: dict[str, str]
    """Of the files in OUTPUT/data, by name."""


class EqualTime(TypedDict):
    """Validation loss at one wall time: the end of the reference's runs, mean over seeds."""

    reference: str
    """Name of the arm whose end it is."""
    seconds: float
    losses: dict[str, float | None]
    """By arm, between the two nearest evaluations; None for an arm that ends more than 1 % earlier."""


class Results(TypedDict):
    """The whole of results.json."""

    schema: int
    made: str
    """ISO 8601, when this was written."""
    name: str
    """Of the recipe's file."""
    complete: bool
    """Whether every run is done or failed, and every chosen one measured."""
    problems: list[str]
    """What a reader must know: failed runs, unequal tokens, learning rates at the edge. One sentence each."""
    recipe: dict[str, Any]
    """The recipe all arms start from, `Recipe.as_dict()`."""
    budget: dict[str, int]
    """`tokens` or `steps` if asked for, else empty: the recipe's length."""
    seeds: list[int]
    data: Data
    base: BaseResult
    reference: str | None
    """Arm to which the others are compared: the one asked for, else the first of method `full`."""
    arms: list[ArmResult]
    runs: list[RunResult]
    """Arm by arm, learning rate by learning rate, seed by seed."""
    equal_time: list[EqualTime]
    """For the fastest arm, and for `reference`."""
    environment: dict[str, Any]
    """`lisatune.runs.summary.describe_environment()`; that of each run is in its folder."""


def read_results(path: str | Path) -> Results:
    """Read results.json.

    Args:
        path: the file, or the folder of a comparison.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a newer schema.
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
            f"{path} has schema {found!r}, this lisatune reads {SCHEMA}; use the one that made it"
        )
    results: Results = values
    return results
