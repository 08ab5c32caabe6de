"""Losses and gradients that are not finite: may the step be left out, or must the run end?

A number that is not finite must never reach a weight, because it stays in all of them from then on.
"""

import torch
from torch import Tensor

from lisatune.console import plural
from lisatune.runs.folder import RunFolder
from lisatune.runs.manifest import newest_checkpoint
from lisatune.train.assemble import Parts
from lisatune.train.resume import RunState

__all__ = ["TrainingError", "check_skip", "check_trained"]


class TrainingError(RuntimeError):
    """Training cannot continue because loss or gradients are not finite."""


def check_skip(parts: Parts, state: RunState, loss: Tensor, grad_norm: Tensor, folder: RunFolder) -> None:
    """Decide whether a step whose loss or gradients are not finite may be left out.

    Raises:
        TrainingError: `run.on_nonfinite` is `stop`, too many steps in a row were left out, or the weights
            have been updated already.
    """
    run = parts.recipe.run
    has_updated = parts.recipe.optimizer.in_backward and bool(torch.isfinite(loss))
    values = f"step {state.step + 1}: loss {float(loss):g}, gradient norm {float(grad_norm):g}"
    newest = newest_checkpoint(folder.checkpoints)
    good = f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"
    if has_updated:
        raise TrainingError(
            f"{values}; optimizer.in_backward has put it into the weights and {good}; lower optimizer.lr, or "
            "set optimizer.in_backward: false, with which run.on_nonfinite: skip leaves such steps out"
        )
    if run.on_nonfinite == "stop":
        raise TrainingError(
            f"{values}; weights are as before this step and {good}; lower optimizer.lr, or set "
            "run.on_nonfinite: skip to leave such steps out"
        )
    if state.skipped_in_a_row >= run.max_skipped_steps:
        raise TrainingError(
            f"{values}, after {plural(state.skipped_in_a_row, 'step')} in a row that were left out "
            f"(run.max_skipped_steps); {good}; lower optimizer.lr, or look at the rows of these steps"
        )


def check_trained(state: RunState) -> None:
    """Refuse the result of a run in which every step was left out.

    Raises:
        TrainingError: no step has changed a weight.
    """
    if state.skipped_steps == state.step:
        raise TrainingError(
            f"nothing was trained: all {state.step} steps were left out because loss or gradients were not "
            f"finite; held-out loss before was {state.held_out_before:g}: if that is not finite either, look "
            "for NaN in the model's weights, else lower optimizer.lr"
        )
