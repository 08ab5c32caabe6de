"""The learning-rate schedule of a run, made by transformers from the recipe's section `optimizer`.

Of a run of S steps with W steps of warm-up, step i (from 0) has the learning rate lr·f(i). f rises in a line
from 0 to 1 over the first W steps and then

    constant    stays 1
    linear      falls in a line to `min_lr_share`
    cosine      falls along half a cosine to `min_lr_share`
    wsd         stays 1, and falls in a line to `min_lr_share` over the last D = `decay_share`·S steps

(warm-up, stable, decay: Hu et al., MiniCPM, arXiv 2404.06395). The lowest value belongs to step S; the last
step of the run is the one before.
"""

import math
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lisatune.console import plural
from lisatune.recipe import OptimizerConfig

__all__ = ["count_warmup_steps", "describe_schedule", "lr_factor", "make_scheduler", "warn_of_long_warmup"]

DECAY_SHARE = 0.2
"""Share of the steps over which `wsd` falls. Hägele et al. (arXiv 2405.18392) find 0.1 to 0.2 enough."""


def make_scheduler(config: OptimizerConfig, optimizer: Optimizer, steps: int) -> LambdaLR:
    """Make the scheduler of a run of `steps` optimizer steps; call its `step()` after each of them.

    Args:
        config: the recipe's section.
        optimizer: its default `lr` is `config.lr`; every param group keeps its own ratio to it.
        steps: optimizer steps of the whole run.
    """
    from transformers import get_scheduler  # only now that it is quiet

    name, own = _transformers_schedule(config, steps)
    scheduler: LambdaLR = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=count_warmup_steps(config, steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=own,
    )
    return scheduler


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return f of a step (from 0) in a run of `steps` steps: its learning rate as a share of the peak."""
    nothing = torch.optim.SGD([torch.empty(0)], lr=config.lr)
    return float(make_scheduler(config, nothing, steps).lr_lambdas[0](step))


def count_warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Return the steps of warm-up. A share is rounded up, and leaves one step at the peak."""
    if config.warmup_share:
        return min(math.ceil(config.warmup_share * steps), steps - 1)
    return config.warmup_steps


def warn_of_long_warmup(config: OptimizerConfig, steps: int) -> None:
    """Warn if the learning rate is still rising when the run ends."""
    warmup = count_warmup_steps(config, steps)
    if warmup >= steps:
        warnings.warn(
            f"optimizer.warmup_steps={warmup:,} lasts as long as the whole run of "
            f"{plural(steps, 'step')}, so the learning rate never gets to optimizer.lr={config.lr:g}; lower "
            "the former, or set optimizer.warmup_share",
            stacklevel=2,
        )


def describe_schedule(config: OptimizerConfig, steps: int) -> str:
    """Describe the schedule in a few words, for the outline of a run."""
    text: str = config.schedule
    if config.min_lr_share:
        text += f" down to {config.min_lr_share:.3g} of it"
    if config.schedule == "wsd":
        text += f" over the last {plural(_count_decay_steps(config, steps), 'step')}"
    warmup = count_warmup_steps(config, steps)
    return f"{text} after {plural(warmup, 'warm-up step')}" if warmup else text


def _transformers_schedule(config: OptimizerConfig, steps: int) -> tuple[str, dict[str, Any]]:
    """Return transformers' name of the schedule, and the arguments that only this schedule has."""
    least = config.min_lr_share
    if config.schedule == "constant":
        return "constant_with_warmup", {}
    if config.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": least}
    if config.schedule == "wsd":
        decay = _count_decay_steps(config, steps)
        return "warmup_stable_decay", {
            "num_decay_steps": decay,
            "decay_type": "linear",
            "min_lr_ratio": least,
        }
    return ("polynomial", {"power": 1.0, "lr_end": least * config.lr}) if least else ("linear", {})


def _count_decay_steps(config: OptimizerConfig, steps: int) -> int:
    share = DECAY_SHARE if config.decay_share is None else config.decay_share
    return max(1, min(math.ceil(share * steps), steps - count_warmup_steps(config, steps)))
