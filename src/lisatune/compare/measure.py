"""Measure a finished run: losses of the model it wrote, how far weights moved, the memory of a step.

    python -m lisatune.compare.measure JOB.json

Each measurement is a process of its own, so that memory of one run does not count for another. JOB.json holds
a `Job`. The result, a `Measured`, is written to the job's `output`. Losses are those of the written model,
loaded as anyone would load it.
"""

import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from lisatune.compare.results import MemoryResult
from lisatune.console import first_line, ranges_text
from lisatune.data.batches import collate
from lisatune.data.records import read_records
from lisatune.data.tokens import is_chat as is_conversation
from lisatune.data.tokens import tokenize
from lisatune.distributed.ranks import pick_device
from lisatune.evaluate.held_out import held_out_loss
from lisatune.files.disk import replace_file
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.costly_draws import list_costly_draws
from lisatune.memory.tracker import measure as measure_memory
from lisatune.methods.build import weight_dtype
from lisatune.models.load import load_model, load_tokenizer
from lisatune.models.locate import is_adapter
from lisatune.recipe import Recipe
from lisatune.runs.summary import Score
from lisatune.study.movement import measure_movement
from lisatune.train.assemble import Parts, assemble
from lisatune.train.benchmarks import evaluate_model, main_metric, main_scores
from lisatune.train.recipe_file import load_recipe

__all__ = ["Job", "Measured", "main", "measure_model"]


class Job(TypedDict):
    """What to measure."""

    recipe: str
    """Recipe file: of the run, or of the comparison for the model before training."""
    model: str | None
    """Model folder that the run wrote. None: the model before training."""
    slices: dict[str, str]
    """Files to measure the loss on: `test`, and `general` if there is such text."""
    evaluate: NotRequired[str | None]
    """Benchmark tasks, as `run.evaluate`; None asks none."""
    evaluate_data: NotRequired[str | None]
    with_memory: bool
    """Whether to measure the memory of a step too, which costs loading and two steps."""
    output: str
    """File for the result."""


class Measured(TypedDict, total=False):
    """The result of a job. The keys mean what they mean in `RunResult` and `ArmResult`."""

    test_loss: float
    general_loss: float
    touched: int
    export_bytes: int
    delta_bytes: int
    movement: list[float]
    scores: dict[str, Score]
    """By benchmark task."""
    per_item: dict[str, list[float]]
    """The result of each question by task, from which gains over the base are computed."""
    memory: MemoryResult | None
    memory_reason: str | None


def measure_model(job: Job) -> Measured:
    """Measure the model that a job names. The result is returned and not written.

    Raises:
        ValueError, OSError, RuntimeError: model or data cannot be loaded, or the test loss is not finite.
    """
    recipe = load_recipe(job["recipe"])
    device = pick_device(recipe.run.device)
    model = _load(recipe, job["model"])
    measured = Measured()
    if job["model"] is not None:
        folder = Path(job["model"])
        measured["export_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if is_adapter(str(folder)):
            measured["touched"] = _count_stored(folder)
            measured["delta_bytes"] = measured["export_bytes"]
        else:
            base = _load(recipe, None)
            measured["touched"], measured["delta_bytes"] = _count_changed(base, model)
            measured["movement"] = measure_movement(base, model)
            del base
        gc.collect()
    model.to(device)
    losses = {name: _measure_loss(recipe, model, name, file, device) for name, file in job["slices"].items()}
    measured["test_loss"] = losses["test"]
    if not math.isfinite(losses["test"]):
        raise RuntimeError(f"its loss on the test slice is {losses['test']:g}")
    if math.isfinite(losses.get("general", math.nan)):
        measured["general_loss"] = losses["general"]
    if tasks := job.get("evaluate"):
        tokenizer = load_tokenizer(**recipe.model.tokenizer)
        is_chat = any(map(is_conversation, read_records(job["slices"]["test"], needs_answer=False).rows))
        found = evaluate_model(
            model,
            tokenizer,
            tasks,
            data=job.get("evaluate_data"),
            device=device,
            is_chat=is_chat,
        )
        measured["scores"] = main_scores(found)
        measured["per_item"] = {
            name: score["per_item"].get(main_metric(score), []) for name, score in found.items()
        }
    if job["with_memory"]:
        del model
        gc.collect()
        measured["memory"], measured["memory_reason"] = None, None
        try:
            measured["memory"] = _measure_step(recipe)
        except Exception as error:  # any code may fail under a dispatch mode; keep the other results
            measured["memory_reason"] = first_line(error)
    return measured


def _load(recipe: Recipe, folder: str | None) -> Any:
    """Load the model that the run wrote, or without `folder` the one it started from."""
    written = {} if folder is None else {"name": folder, "revision": None, "new_tokens": ()}
    return load_model(**(recipe.model.source | written), dtype=weight_dtype(recipe))


def _count_stored(folder: Path) -> int:
    """Count the elements of all tensors in a model folder."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


def _count_changed(base: nn.Module, model: nn.Module) -> tuple[int, int]:
    """Count elements and bytes of the parameters that differ from the base model's, tied ones once."""
    before = dict(base.named_parameters())
    changed = [
        p for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])
    ]
    return sum(p.numel() for p in changed), sum(p.numel() * p.element_size() for p in changed)


def _measure_loss(recipe: Recipe, model: nn.Module, name: str, file: str, device: torch.device) -> float:
    """Measure the loss per token of a slice. Rows are sorted by length, so that padding is short."""
    tokenizer = load_tokenizer(**recipe.model.tokenizer)
    data = recipe.data
    records = read_records(file, needs_answer=name == "general" or data.needs_answers)
    loss_on = "all" if records.kind == "text" else data.loss_on
    if name == "general" and isinstance(loss_on, tuple):
        loss_on = "answers"  # it need not have these roles
    examples = tokenize(
        records, tokenizer, max_length=data.max_length, loss_on=loss_on, long=data.long, date=data.date
    )
    rows = examples.rows.take(np.argsort(examples.rows.lengths, kind="stable"))
    size = recipe.run.batch_size
    batches = (collate(list(rows[i : i + size])) for i in range(0, len(rows), size))
    autocast = torch.bfloat16 if recipe.run.precision == "bf16-mixed" else None
    return held_out_loss(CausalLMLoss(model), batches, device=device, autocast=autocast).loss


def _measure_step(recipe: Recipe) -> MemoryResult:
    """Make two steps on the batches of the run's longest step, and count the live tensors of the second.

    A method that draws blocks does so for each draw that may have the highest peak. The largest one counts.
    """
    run = replace(recipe.run, compile=False, samples=0)
    parts = assemble(replace(recipe, run=run, method=recipe.method.without_proof()))
    step, batches = _find_longest_step(parts)
    draws: list[tuple[int, ...] | None] = [None]
    built = parts.built
    if possible := built.schedule.possible_draws(parts.data.steps):
        draws = [*list_costly_draws(possible, built)]
    results = {}
    with measure_memory(parts.built.model, parts.built.step.optimizer) as measured:
        for draw in draws:
            for _ in range(2):  # the optimizer's state exists in the second
                if draw is not None:
                    built.schedule.hold(draw)
                parts.built.step.backward(batches)
                parts.built.step.clip()
                parts.built.step.update()
                results[draw] = measured.end_step()
    draw = max(results, key=lambda draw: results[draw].peak_bytes)
    result = results[draw]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    how = f"live tensors in a separate step on the batches of step {step}, {longest} tokens at the longest"
    if draw is not None:
        how += f", {built.schedule.word}s {ranges_text(draw)} active"
    return MemoryResult(
        how=how + (", not compiled" if recipe.run.compile is True else ""),
        peak_bytes=result.peak_bytes,
        phase=result.phase,
        at_peak=result.at_peak,
        by_phase=result.by_phase,
        static_bytes=result.static_bytes,
        host_bytes=result.host_bytes,
    )


def _find_longest_step(parts: Parts) -> tuple[int, list[dict[str, Tensor]]]:
    """Return number (from 1) and batches of the step with the largest micro-batch, padding included."""
    data, micro_steps = parts.data, parts.recipe.run.accumulation
    lengths, loss_counts = data.train.rows.lengths, data.train.rows.loss_counts

    def micro_steps_of(step: int) -> range:
        return range(step * micro_steps, (step + 1) * micro_steps)

    def size(step: int) -> tuple[int, int]:
        batches = [data.order.batch(index) for index in micro_steps_of(step)]
        padded = [len(rows) * int(lengths[rows].max()) for rows in batches]
        return max(padded), max(int(loss_counts[rows].sum()) for rows in batches)

    longest = max(range(data.steps), key=size)
    return longest + 1, [parts.collate(data.batch(index)) for index in micro_steps_of(longest)]


def main(arguments: list[str]) -> int:
    """Run the job in a file. On an error, write one sentence to stderr and return exit code 2."""
    job: Job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        measured = measure_model(job)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"lisatune: error: {first_line(error)}\n")
        return 2
    replace_file(Path(job["output"]), json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
