"""The section `run` of a recipe."""

import math
from dataclasses import dataclass
from typing import Literal

from lisatune.recipe.values import at_least, check_choices

__all__ = ["Precision", "RunConfig", "check_steps"]

MAX_STEPS = 1_000_000
"""The most optimizer steps that a run may have."""

Precision = Literal["fp32", "bf16-mixed", "bf16"]


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
    """Stop after this many skipped steps in a row, under `on_nonfinite: skip`."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, as on a full disk: stop, or count it and continue."""

    report_to: tuple[str, ...] = ()
    """Trackers by name: tensorboard, wandb, trackio, mlflow."""

    def __post_init__(self) -> None:
        check_choices("run", self)
        for name in ("steps", "batch_size", "accumulation", "log_every", "eval_every", "stop_after"):
            at_least(1, f"run.{name}", getattr(self, name))
        for name in ("keep_checkpoints", "sample_tokens", "max_skipped_steps"):
            at_least(1, f"run.{name}", getattr(self, name))
        at_least(0, "run.samples", self.samples)
        at_least(1, "run.copies", self.copies)
        if self.copies is not None and self.sharding != "hsdp":
            raise ValueError(
                f"run.copies={self.copies} does nothing with run.sharding={self.sharding}; set that to hsdp, "
                "or run.copies to null"
            )
        at_least(0, "run.save_every", self.save_every)
        if self.on_nonfinite == "stop" and self.max_skipped_steps != RunConfig.max_skipped_steps:
            raise ValueError(
                f"run.max_skipped_steps={self.max_skipped_steps} does nothing with run.on_nonfinite=stop; "
                "set that to skip, or leave it out"
            )
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


def check_steps(steps: float, asked: str) -> None:
    """Refuse a run so long that its draws could not be planned.

    Args:
        steps: optimizer steps.
        asked: the key, and its value if it is not `run.steps`, to name in the message.

    Raises:
        ValueError: more than a million steps.
    """
    if steps > MAX_STEPS:
        raise ValueError(f"{asked} makes a run of {steps:.3g} optimizer steps, and the most is {MAX_STEPS:,}")
