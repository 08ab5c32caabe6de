"""What is measured of a run after it: losses of the model that was written, what moved, memory of a step.

    python -m lisatune.compare.measure JOB.json

is a process of its own, so that no run's memory is another's. JOB.json holds a `Job`; the result, a
`Measured`, is written to its `output`. Losses are taken of the written model as anyone loads it.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lisatune.compare.results import MemoryResult
from lisatune.console import ranges_text
from lisatune.data.records import read_records
from lisatune.data.tokens import IGNORE, TokenRow, collate, tokenize
from lisatune.distributed.ranks import pick_device
from lisatune.evaluate.held_out import held_out_loss
from lisatune.files.disk import replace_file
from lisatune.lisa.statistics import block_movement
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import costly_draws
from lisatune.memory.tracker import measure as measure_memory
from lisatune.methods.build import weight_dtype
from lisatune.models.load import load_model, load_tokenizer
from lisatune.recipe import Recipe
from lisatune.train.assemble import Parts, assemble
from lisatune.train.recipe_file import load_recipe

__all__ = ["Job", "Measured", "measure"]


class Job(TypedDict):
    """What to measure."""

    recipe: str
    """File: of the run, or of the comparison for the model before training."""
    model: str | None
    """Model folder that the run wrote; None for the model before training."""
    slices: dict[str, str]
    """Files to take the loss on: `test`, and `general` where there is such text."""
    with_memory: bool
    """Whether to measure a step's memory too; costs loading and two steps."""
    output: str


class Measured(TypedDict, total=False):
    """What was measured, in the words of `compare_results.RunResult`."""

    test_loss: float
    general_loss: float
    touched: int
    export_bytes: int
    delta_bytes: int
    movement: list[float]
    memory: MemoryResult | None
    memory_reason: str | None


def measure(job: Job) -> Measured:
    """Do the job.

    Raises:
        ValueError, OSError, RuntimeError: model or data can't be loaded.
    """
    recipe = load_recipe(job["recipe"])
    device = pick_device(recipe.run.device)
    model = _load(recipe, job["model"])
    measured = Measured()
    if job["model"] is not None:
        folder = Path(job["model"])
        measured["export_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if (folder / "adapter_config.json").exists():
            measured["touched"] = _num_stored(folder)
            measured["delta_bytes"] = measured["export_bytes"]
        else:
            base = _load(recipe, None)
            measured["touched"], measured["delta_bytes"] = _moved(base, model)
            measured["movement"] = block_movement(base, model)
            del base
        gc.collect()
    model.to(device)
    losses = {name: _loss(recipe, model, file, device) for name, file in job["slices"].items()}
    measured["test_loss"] = losses["test"]
    if "general" in losses:
        measured["general_loss"] = losses["general"]
    if job["with_memory"]:
        del model
        gc.collect()
        measured["memory"], measured["memory_reason"] = None, None
        try:
            measured["memory"] = _step_memory(recipe)
        except Exception as error:  # a dispatch mode meets any code; the rest has been measured
            measured["memory_reason"] = str(error).strip().partition("\n")[0] or type(error).__name__
    return measured


def _load(recipe: Recipe, folder: str | None) -> Any:
    """Load the run's model, or without `folder` the one it began with, in the run's precision."""
    name = recipe.model
    return load_model(
        name.name if folder is None else folder,
        revision=name.revision if folder is None else None,
        trust_remote_code=name.trust_remote_code,
        attention=name.attention,
        dtype=weight_dtype(recipe),
    )


def _num_stored(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


def _moved(base: nn.Module, model: nn.Module) -> tuple[int, int]:
    """Elements and bytes of the parameters that differ from the base model's; a tied one counts once."""
    before = dict(base.named_parameters())
    changed = [
        p for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])
    ]
    return sum(p.numel() for p in changed), sum(p.numel() * p.element_size() for p in changed)


def _loss(recipe: Recipe, model: nn.Module, file: str, device: torch.device) -> float:
    """Loss per token of a slice, its rows in order of length to waste little on padding."""
    name = recipe.model
    tokenizer = load_tokenizer(name.name, revision=name.revision, trust_remote_code=name.trust_remote_code)
    records = read_records(file)
    loss_on = "all" if records.kind == "text" else recipe.data.loss_on
    examples = tokenize(records, tokenizer, max_length=recipe.data.max_length, loss_on=loss_on)
    rows = sorted(examples.rows, key=lambda row: len(row["input_ids"]))
    size = recipe.run.batch_size
    batches = (collate(rows[i : i + size], tokenizer.pad_token_id) for i in range(0, len(rows), size))
    autocast = torch.bfloat16 if recipe.run.precision == "bf16-mixed" else None
    return held_out_loss(CausalLMLoss(model), batches, device=device, autocast=autocast).loss


def _step_memory(recipe: Recipe) -> MemoryResult:
    """Make two steps as the run does, on its longest step's batches, and count the second's live tensors.

    For a method that draws blocks, of each draw that may need most memory; the largest peak is kept.
    """
    run = replace(recipe.run, compile=False, samples=0)
    parts = assemble(replace(recipe, run=run, method=recipe.method.without_proof()))
    step, batches = _longest_step(parts)
    draws: list[tuple[int, ...] | None] = [None]
    built = parts.built
    if possible := built.schedule.possible_draws(parts.data.steps):
        draws = [*costly_draws(possible, built.block_sizes(), ends_rest=built.schedule.ends_rest)]
    results = {}
    with measure_memory(parts.built.model, parts.built.step.optimizer) as measured:
        for draw in draws:
            for _ in range(2):  # the optimizer's state exists by the second
                if draw is not None:
                    built.schedule.hold(draw)
                parts.built.step.backward(batches)
                parts.built.step.clip()
                parts.built.step.update()
                results[draw] = measured.end_step()
    draw = max(results, key=lambda draw: results[draw].peak_bytes)
    result = results[draw]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    how = f"live tensors in a step of its own on the batches of step {step}, {longest} tokens at the longest"
    if draw is not None:
        how += f", blocks {ranges_text(draw)} active"
    return MemoryResult(
        how=how + (", not compiled" if recipe.run.compile else ""),
        peak_bytes=result.peak_bytes,
        phase=result.phase,
        at_peak=result.at_peak,
        by_phase=result.by_phase,
        static_bytes=result.static_bytes,
        host_bytes=result.host_bytes,
    )


def _longest_step(parts: Parts) -> tuple[int, list[dict[str, Tensor]]]:
    """Number (from 1) and batches of the step with the largest micro-batch, padding included."""
    micro_steps = parts.recipe.run.accumulation

    def micro_batches(step: int) -> list[list[TokenRow]]:
        indices = range(step * micro_steps, (step + 1) * micro_steps)
        return [[parts.data.train.rows[row] for row in parts.data.order.batch(index)] for index in indices]

    def size(step: int) -> tuple[int, int]:
        def padded(rows: list[TokenRow]) -> int:
            return len(rows) * max(len(row["input_ids"]) for row in rows)

        def with_loss(rows: list[TokenRow]) -> int:
            return sum(len(row["labels"]) - row["labels"].count(IGNORE) for row in rows)

        batches = micro_batches(step)
        return max(map(padded, batches)), max(map(with_loss, batches))

    longest = max(range(parts.data.steps), key=size)
    return longest + 1, [parts.collate(rows) for rows in micro_batches(longest)]


def main(arguments: list[str]) -> int:
    """Do the job in the file named; on an error write a sentence to standard error."""
    job: Job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        measured = measure(job)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.stderr.write(f"lisatune: error: {(str(error).splitlines() or [type(error).__name__])[0]}\n")
        return 2
    replace_file(Path(job["output"]), json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
