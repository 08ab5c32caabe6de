"""The command `lisatune plan`: the memory that a run needs, as a table with bars or as one JSON object."""

import json
from typing import TYPE_CHECKING

from lisatune.console import byte_text, count_text, grid, is_override, plural, print_line, terminal

if TYPE_CHECKING:
    from lisatune.memory.fit import Fit, Room
    from lisatune.memory.plan import MemoryPlan
    from lisatune.recipe import Recipe

__all__ = ["plan"]

BAR = 40
"""Characters of the longest bar."""


def plan(
    recipe: str = "",
    /,
    *overrides: str,
    model: str | None = None,
    method: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    precision: str | None = None,
    gpu: str | None = None,
    ranks: int = 1,
    json: bool = False,
) -> int:
    """Plan how much memory a run needs, without its weights or data.

    With --gpu, also find how to make the run fit, and how many blocks could train on that device:

        lisatune plan recipe.yaml --gpu 24GB
        lisatune plan --model llama-3.1-8b --length 2048 --precision bf16 method.active=4

    Args:
        recipe: YAML file; not needed with --model.
        overrides: `section.key=value`; wins over the file.
        model: Hugging Face folder, hub id, .gguf file, or a shape such as llama-2-7b.
        method: `method.name`.
        batch: `run.batch_size`; 1 without a recipe.
        length: `data.max_length`.
        precision: `run.precision`.
        gpu: Memory of the device: 24GB or 24 (a card's name), 22.1GiB or 23034MiB (what its driver says).
        ranks: Number of devices that share weights, gradients and optimizer state.
        json: Print one JSON object.
    """
    from lisatune.memory.fit import assume_accelerator, find_fit, find_room, parse_memory_size
    from lisatune.memory.plan import plan_memory
    from lisatune.train.recipe_file import load_recipe, recipe_without_file

    overrides, recipe = ((recipe, *overrides), "") if is_override(recipe) else (overrides, recipe)
    batch = 1 if model and not recipe and batch is None else batch
    options = {"model.name": model, "method.name": method, "run.batch_size": batch}
    options |= {"data.max_length": length, "run.precision": precision}
    given = [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    if not recipe and not model:
        raise ValueError("give a recipe file, or --model")
    size = parse_memory_size(gpu) if gpu is not None else None
    asked = load_recipe(recipe, given) if recipe else recipe_without_file(given)
    asked = asked if size is None else assume_accelerator(asked)
    planned = plan_memory(asked, ranks=ranks)
    fit = None if size is None else find_fit(asked, size, ranks=ranks, first=planned)
    room = None if fit is None else find_room(asked, fit, ranks=ranks)
    if json:
        _print_json(planned, fit, room)
    else:
        _print_table(asked, planned, fit, room)
    return 0


def _print_json(plan: "MemoryPlan", fit: "Fit | None", room: "Room | None") -> None:
    values = plan.as_dict()
    if fit is not None:
        values["fit"] = fit.as_dict() | {"room": room and room.as_dict()}
    print_line(json.dumps(values))


def _print_table(recipe: "Recipe", plan: "MemoryPlan", fit: "Fit | None", room: "Room | None") -> None:
    from rich import box
    from rich.panel import Panel
    from rich.text import Text

    from lisatune.memory.fit import describe_fit

    run = recipe.run
    pairs = f" ({plural(run.batch_size, 'pair')})" if recipe.loss.rows_per_record == 2 else ""
    batch = f"{plan.batch_size} × {plan.length:,} tokens{pairs}, {run.precision}"
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
        rows.append((name, _draw_bar(size, plan.peak_bytes)))
    rows.append(("peak", Text(f"{byte_text(plan.peak_bytes)} in {plan.phase}", style="bold")))
    rows.append(("between steps", byte_text(plan.static_bytes)))
    if plan.host_bytes:
        in_ram = recipe.method.masters in ("auto", "ram")
        kept = "exact weights and optimizer state" if in_ram else "optimizer state"
        disk = ", or disk for the weights" if recipe.method.masters == "auto" else ""
        copy = f"{byte_text(plan.copy_bytes)} for the copy of a checkpoint" if plan.copy_bytes else ""
        text = f"{byte_text(plan.host_bytes)} of {kept}{disk}" + (f", with {copy}" if copy else "")
        rows.append(("host memory", copy if plan.copy_bytes == plan.host_bytes else text))
    if plan.disk_bytes:
        rows.append(("disk", f"up to {byte_text(plan.disk_bytes)} of exact weights, on the disk of the run"))
    if plan.switch_bytes:
        moved = f"moves {byte_text(plan.switch_bytes)} onto the device and as much back, between two steps"
        rows.append(("a draw", moved))
    rows.append(("device needs", f"{byte_text(plan.needed_bytes)} with context, fragmentation and kernels"))
    rows.append(("plan", f"{plan.kind} in {plan.seconds:.1f} s"))
    if plan.note:
        rows.append(("note", plan.note))
    if fit is not None:
        rows.append(("device", Text(describe_fit(fit), style="green" if fit.fits else "bold red")))
        if fit.missing is not None:
            rows.append(("not tried", fit.missing))
        rows += [("because", f"{key}: {why}") for key, why in zip(fit.changes, fit.reasons, strict=True)]
    if room is not None:
        active, needed = len(room.plan.active_blocks or ()), byte_text(room.plan.needed_bytes)
        blocks = f"{active} of {room.plan.num_blocks} {room.plan.word}s"
        rows.append(("room", f"for {blocks}: {room.overrides} needs {needed}"))
    panel = Panel(grid(rows), title="memory", title_align="left", border_style="cyan", box=box.ROUNDED)
    terminal().print(panel)


def _draw_bar(size: int, longest: int) -> str:
    return f"{byte_text(size):>10}  {'█' * round(BAR * size / longest)}"
