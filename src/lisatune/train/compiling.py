"""Compile a run's blocks before its first step, and decide whether to, under `run.compile: auto`.

Compiling costs about as many seconds for a short run as for a long one, and saves a share of every step. So
it pays from some length on. A run's length is its steps' FLOPs (`lisatune.train.flops`) at a usual speed. The
answer follows from recipe, data and card alone, not from a measured time: compiled blocks round differently,
so a run that is resumed or repeated must get the same answer. The run's folder keeps it.
"""

import dataclasses
import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from lisatune.console import clock_text
from lisatune.data.prepare import RunData
from lisatune.distributed import ranks
from lisatune.lisa.correction import trainable_parameters
from lisatune.methods.build import Built
from lisatune.nn.coded import coded_weights
from lisatune.nn.hidden import max_positions
from lisatune.nn.layers import LayerMap
from lisatune.recipe import Recipe
from lisatune.train.flops import needed_flops, peak_flops

__all__ = ["CompileChoice", "build_graphs", "choose_compile"]

WORTH_SECONDS = 20 * 60
"""Planned seconds of training from which compiling pays.

Assumed, and not measured on a card yet: compiling takes two minutes, compiled blocks save a tenth of a step.
`benchmarks/gpu_all.sh` measures both.
"""

USUAL_SPEED = 0.4
"""Share of a card's peak at which steps are assumed to run."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether the blocks are compiled, and why, for the outline. No reason where nobody would ask for one."""

    compiles: bool
    why: str = ""


def choose_compile(
    recipe: Recipe, device: torch.device, model: nn.Module, layers: LayerMap, data: RunData
) -> CompileChoice:
    """Decide about `run.compile`.

    Args:
        recipe: the recipe.
        device: where the run trains. Under `auto` only CUDA cards compile.
        model: with or without weights, after the method was attached: `requires_grad` as in the first period.
        layers: its blocks and ends.
        data: the run's data.
    """
    asked = recipe.run.compile
    if asked != "auto":
        return CompileChoice(asked, "compiled" if asked else "")
    if device.type != "cuda":
        return CompileChoice(False)
    try:
        dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, compile=True))
    except ValueError:
        return CompileChoice(False, f"not compiled: {recipe.method.name} as it is set cannot run compiled")
    if not _has_triton():
        return CompileChoice(False)
    seconds = _planned_seconds(recipe, device, model, layers, data)
    if seconds is None:
        return CompileChoice(False, "not compiled: the length of the run is not known for this card or model")
    pays = seconds >= WORTH_SECONDS
    about = f"about {clock_text(seconds)} of steps, and compiling pays from {clock_text(WORTH_SECONDS)}"
    return CompileChoice(pays, f"{'compiled' if pays else 'not compiled'}: {about} (run.compile)")


def build_graphs(recipe: Recipe, built: Built, device: torch.device) -> float:
    """Compile all graphs that a run's draws need, on a made-up batch.

    Args:
        recipe: the run's recipe.
        built: its model and step; `built.blocks` must compile.
        device: where it trains.

    Returns:
        Seconds it took.
    """
    assert built.blocks is not None
    longest = min(recipe.data.max_length, max_positions(built.model) or recipe.data.max_length)
    length = max(longest // 2, 8) | 1  # odd: it equals no dimension of a weight
    num_rows = recipe.run.batch_size * recipe.loss.rows_per_record
    ids_BT = torch.zeros(num_rows, length, dtype=torch.long)
    position_ids_BT = torch.arange(length).expand_as(ids_BT)
    if recipe.data.packing:  # two records in each sequence
        position_ids_BT = position_ids_BT % (length // 2 + 1)
    batch = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": position_ids_BT}
    batch = {name: ids.to(device) for name, ids in batch.items()}

    def run() -> None:
        dtype, in_backward = built.step.autocast, built.step.in_backward
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss, _ = built.step.loss(batch)
        if ranks.count() == 1:  # no `backward()`: nothing may reach the parameters' gradients and their hooks
            torch.autograd.grad(loss, trainable_parameters(built.model), allow_unused=True)
            return
        with nullcontext() if in_backward is None else in_backward.paused():
            loss.backward()  # type: ignore[no-untyped-call]  # FSDP2 takes no other way

    ends = list(built.layers.end_parameters(built.model).values())
    # Coded blocks cannot be made active by a flag. The blocks drawn first show every graph.
    draws = built.schedule.active_blocks is not None and not coded_weights(built.model)
    return built.blocks.warm_up(run, embedding=ends, rests=built.schedule.ends_rest, draws=draws)


def _planned_seconds(
    recipe: Recipe, device: torch.device, model: nn.Module, layers: LayerMap, data: RunData
) -> float | None:
    """Estimate the time of all steps, from a step on rows of mean length; on each of several ranks."""
    peak = peak_flops(device)
    num_rows = recipe.run.batch_size * recipe.run.accumulation * data.rows_per_record
    length = round(data.train.num_tokens / len(data.train.rows))
    flops = None if peak is None else needed_flops(model, layers, [length] * num_rows)
    return None if peak is None or flops is None else data.steps * flops / (USUAL_SPEED * peak)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
