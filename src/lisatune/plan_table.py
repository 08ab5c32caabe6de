"""Prints a memory plan: a table with bars, or one JSON object."""

import json
import sys

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lisatune.fit import Fit
from lisatune.plan import MemoryPlan
from lisatune.progress import byte_text, count_text, grid, terminal
from lisatune.recipe import Recipe
from lisatune.room import Room

__all__ = ["advice", "print_plan"]

BAR = 40


def print_plan(
    recipe: Recipe,
    plan: MemoryPlan,
    fit: Fit | None = None,
    room: Room | None = None,
    *,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print what a run takes, and how to make it fit.

    Args:
        recipe: what was asked for.
        plan: its plan.
        fit: what the search for a fitting device found.
        room: what the search for more to train there found.
        as_json: print one JSON object and nothing else.
        console: where to. Default: standard output.
    """
    if as_json:
        values = plan.as_dict()
        if fit is not None:
            values["fit"] = fit.as_dict() | {"room": room and room.as_dict()}
        sys.stdout.write(json.dumps(values) + "\n")
        return
    console = console or terminal()
    run = recipe.run
    batch = f"{run.batch_size} × {plan.length:,} tokens, {run.precision}"
    checkpointing = run.activation_checkpointing
    batch += f", activation checkpointing {str(checkpointing).lower()}" if checkpointing else ""
    trains = f"{count_text(plan.trainable)} parameters at a time"
    rows: list[tuple[str, str | Text]] = [
        ("model", recipe.model.name),
        ("method", f"{recipe.method.name}, {trains}"),
        ("batch", batch),
    ]
    if plan.ranks > 1:
        rows.append(("ranks", f"{plan.ranks}, the figures are for each"))
    for name, size in plan.at_peak.items():
        rows.append((name, _bar(size, plan.peak_bytes)))
    rows.append(("peak", Text(f"{byte_text(plan.peak_bytes)} in {plan.phase}", style="bold")))
    rows.append(("between steps", byte_text(plan.static_bytes)))
    if plan.host_bytes:
        rows.append(("host memory", f"{byte_text(plan.host_bytes)} of optimizer state"))
    rows.append(("device needs", f"{byte_text(plan.needed_bytes)} with context, fragmentation and kernels"))
    rows.append(("plan", f"{plan.kind} in {plan.seconds:.1f} s"))
    if plan.note:
        rows.append(("note", plan.note))
    if fit is not None:
        rows.append(("device", Text(advice(fit), style="green" if fit.fits else "bold red")))
        rows += [("because", f"{key}: {why}") for key, why in zip(fit.changes, fit.reasons, strict=True)]
    if room is not None:
        active, needed = len(room.plan.active_blocks or ()), byte_text(room.plan.needed_bytes)
        blocks = f"{active} of {room.plan.num_blocks} blocks, which learn more"
        rows.append(("room", f"for {blocks}: {room.overrides} needs {needed}"))
    console.print(Panel(grid(rows), title="memory", title_align="left", border_style="cyan", box=box.ROUNDED))


def advice(fit: Fit) -> str:
    """Say in a sentence whether it fits, or what to change."""
    size, needed = byte_text(fit.size_bytes), byte_text(fit.plan.needed_bytes)
    if not fit.fits:
        return (
            f"nothing fits {size}: {fit.overrides or 'as it is it'} still needs {needed}; use run.precision: "
            "bf16, a smaller model, a larger device, or more of them (--ranks)"
        )
    if not fit.changes:
        return f"fits {size}: needs {needed}"
    return f"fits {size} with {fit.overrides}: needs {needed}"


def _bar(size: int, whole: int) -> str:
    return f"{byte_text(size):>10}  {'█' * round(BAR * size / whole)}"
