"""One training run, from a recipe to a fine-tuned model: the loop behind `lisatune train`.

Order of set-up, always: data, model, layers, optimizer over all parameters, LISA, checkpoint, loop.
"""

import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lisatune import memory, models, progress
from lisatune.assemble import Parts, assemble
from lisatune.checkpoint import load_checkpoint, newest_checkpoint, prune, save_checkpoint
from lisatune.evaluate import generate_answers, held_out_loss
from lisatune.lisa import LISA
from lisatune.memory_check import MemoryCheck
from lisatune.outline import make_outline, print_outline
from lisatune.recipe import Recipe
from lisatune.runs import RunFolder, check_output
from lisatune.stopping import interruptible, way_back
from lisatune.trackers import Log, check_trackers, trackers

__all__ = ["TrainingError", "train"]


class TrainingError(RuntimeError):
    """Training can't go on: loss or gradients are not finite."""


@dataclass
class Progress:
    """How far a run has come: goes into checkpoints, so only JSON values."""

    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    peak_state_bytes: int = 0
    peak_state_elements: int = 0
    peak_trainable: int = 0
    held_out_before: float = math.nan
    answers_before: list[str] = field(default_factory=list)


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> progress.Summary:
    """Run a recipe.

    Args:
        recipe: what to do; `run.output` must be set.
        resume: go on from the newest complete checkpoint in the run folder.
        overwrite: delete the run in the folder first.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError, FileNotFoundError, ImportError: the recipe can't be used; nothing was written.
        TrainingError: loss or gradients were not finite and `run.on_nonfinite` is `stop`.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved; the message says how to resume.
    """
    assert recipe.run.output is not None
    output = Path(recipe.run.output)
    check_output(output, recipe.as_dict(), resume=resume, overwrite=overwrite)
    check_trackers(recipe.run.report_to)
    checkpoint = newest_checkpoint(output / "checkpoints") if resume else None
    if resume and checkpoint is None:
        raise ValueError(f"there is no complete checkpoint in {output}; start again with --overwrite")
    check = MemoryCheck(recipe)
    parts = assemble(recipe, before_load=check.before_load)
    done = Progress() if checkpoint is None else _restore(parts, checkpoint)
    with (
        RunFolder.open(output, recipe.as_dict(), resume=resume, overwrite=overwrite) as folder,
        trackers(recipe.run.report_to, output, recipe.as_dict()) as log,
        way_back(folder),
    ):
        if checkpoint is not None:
            folder.drop_metrics_after(done.step)
        device, start = str(parts.device), done.step
        print_outline(
            make_outline(
                recipe, parts.model, parts.layers, parts.lisa, parts.data, device=device, start_step=start
            )
        )
        if checkpoint is None:
            done.held_out_before = _held_out(parts)
            done.answers_before = _answers(parts)
            folder.log({"step": 0, "held_out_loss": done.held_out_before})
        _loop(parts, done, folder, log, check)
        summary = _finish(parts, done, folder, log, check)
    progress.print_summary(summary)
    return summary


def _restore(parts: Parts, checkpoint: Path) -> Progress:
    done = Progress(
        **load_checkpoint(checkpoint, model=parts.model, optimizer=parts.optimizer, scheduler=parts.scheduler)
    )
    if done.step > parts.data.steps:
        raise ValueError(
            f"the run has done {done.step} steps and the recipe asks for {parts.data.steps}; give more "
            "run.steps (or run.epochs) to go on"
        )
    parts.set_learning_rates()
    return done


def _loop(parts: Parts, done: Progress, folder: RunFolder, log: Log, check: MemoryCheck) -> None:
    run, last = parts.recipe.run, parts.data.steps
    with interruptible() as interrupted, progress.Bar(last, done.step) as bar:
        while done.step < last:
            check.before_step(parts.device)
            record = _step(parts, done, folder)
            check.after_step(parts.device)
            if record:
                folder.log(record)
                log(
                    {key: value for key, value in record.items() if isinstance(value, int | float)}, done.step
                )
                bar.update(**record)
            if run.eval_every and done.step % run.eval_every == 0 and done.step < last:
                held_out = _held_out(parts)
                folder.log({"step": done.step, "held_out_loss": held_out})
                log({"held_out_loss": held_out}, done.step)
                bar.print(f"step {done.step}: held-out loss {held_out:.3f}")
            if interrupted() or (run.save_every and done.step % run.save_every == 0):
                save_checkpoint(
                    folder.checkpoints,
                    step=done.step,
                    model=parts.model,
                    optimizer=parts.optimizer,
                    scheduler=parts.scheduler,
                    extra=asdict(done),
                )
                prune(folder.checkpoints, run.keep_checkpoints)
            if interrupted():
                raise KeyboardInterrupt(
                    f"stopped after step {done.step} of {last}, which is saved; "
                    f"go on with the same command and --resume"
                )


def _step(parts: Parts, done: Progress, folder: RunFolder) -> dict[str, Any]:
    """Make one optimizer step; where it is to be logged, return its line of metrics.jsonl."""
    run, data = parts.recipe.run, parts.data
    started = time.perf_counter()
    first = done.step * run.accumulation
    rows = [[data.train.rows[i] for i in data.order.batch(first + j)] for j in range(run.accumulation)]
    loss = parts.step.backward([parts.collate(micro_rows) for micro_rows in rows])
    grad_norm = parts.step.clip()
    # Noted before the step, which may draw the next blocks.
    record: dict[str, Any] = {"lr": parts.optimizer.param_groups[0]["lr"]}
    if parts.lisa is not None:
        record |= {"period": parts.lisa.period_index, "active_blocks": parts.lisa.active_blocks}
    done.peak_trainable = max(done.peak_trainable, sum(p.numel() for p in parts.trainable()))
    # The only wait for the device in a step: what is not finite must not reach the weights.
    if is_finite := bool(torch.isfinite(loss + grad_norm)):
        parts.step.update()
    elif run.on_nonfinite == "stop" or (parts.recipe.optimizer.in_backward and torch.isfinite(loss)):
        raise _not_finite(parts, done.step + 1, loss, grad_norm, folder)
    else:
        parts.step.skip()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Detected call of `lr_scheduler", UserWarning
        )  # a skipped first step
        parts.scheduler.step()

    seconds = time.perf_counter() - started
    num_tokens = sum(len(row["input_ids"]) for micro_rows in rows for row in micro_rows)
    done.step += 1
    done.num_tokens += num_tokens
    done.skipped_steps += not is_finite
    done.train_seconds += seconds
    done.peak_state_bytes = max(done.peak_state_bytes, parts.state.bytes)
    done.peak_state_elements = max(done.peak_state_elements, parts.state.elements)
    if done.step % run.log_every and done.step != data.steps:
        return {}
    return record | {
        "step": done.step,
        "loss": float(loss),
        "grad_norm": float(grad_norm),
        "tokens": done.num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "state_bytes": parts.state.bytes,
        "resident_bytes": memory.resident_bytes(),
        "skipped_steps": done.skipped_steps,
        "seconds": done.train_seconds,
    }


def _held_out(parts: Parts) -> float:
    """Loss per token of the held-out rows, taken in order of length to waste little on padding."""
    rows = sorted(parts.data.validation.rows, key=lambda row: len(row["input_ids"]))
    size = parts.recipe.run.batch_size
    batches = (parts.collate(rows[i : i + size]) for i in range(0, len(rows), size))
    return held_out_loss(parts.step.loss, batches, device=parts.device, autocast=parts.step.autocast).loss


def _answers(parts: Parts) -> list[str]:
    prompts = [question.prompt for question in parts.data.questions]
    return generate_answers(
        parts.model, parts.tokenizer, prompts, max_new_tokens=parts.recipe.run.sample_tokens
    )


def _finish(
    parts: Parts, done: Progress, folder: RunFolder, log: Log, check: MemoryCheck
) -> progress.Summary:
    """Prove the last period, write the model, evaluate, write the summary."""
    if done.skipped_steps == done.step:
        raise TrainingError(
            f"nothing was trained: all {done.step} steps were left out, since loss or gradients were not "
            f"finite; held-out loss before was {done.held_out_before:g}: where that is not finite either, "
            "look for NaN in the model's weights, else lower optimizer.lr"
        )
    if parts.lisa is not None:
        parts.lisa.check()
    models.save_model(parts.model, parts.tokenizer, folder.model)  # first, for Ctrl-C may end the rest
    after = _held_out(parts)
    folder.log({"step": done.step, "held_out_loss": after})
    log({"held_out_loss": after}, done.step)
    # Not strict: a resumed run may ask for more samples than were answered before.
    questions = zip(parts.data.questions, done.answers_before, _answers(parts), strict=False)
    summary = progress.Summary(
        steps=done.step,
        skipped_steps=done.skipped_steps,
        tokens=done.num_tokens,
        train_seconds=done.train_seconds,
        tokens_per_second=done.num_tokens / done.train_seconds,
        held_out_loss_before=done.held_out_before,
        held_out_loss_after=after,
        peak_bytes=check.device_peak(parts.device) or memory.peak_resident_bytes(),
        peak_state_bytes=done.peak_state_bytes,
        peak_state_elements=done.peak_state_elements,
        peak_trainable=done.peak_trainable,
        samples=[
            {"prompt": question.text, "reference": question.answer, "before": before, "after": answer}
            for question, before, answer in questions
        ],
        model=str(folder.model),
    )
    summary.update(check.outcome(parts.device))
    if parts.compile_seconds is not None:
        summary["compile_seconds"] = parts.compile_seconds
    if parts.lisa is not None:
        summary["visits"] = parts.lisa.visits
        summary["proof"] = _proof(parts.lisa)
    folder.write_summary(summary)
    return summary


def _proof(lisa: LISA) -> str:
    if lisa.verify == "off":
        return "none taken: method.verify is off"
    resting = lisa.layers.num_blocks - len(lisa.active_blocks)
    rest = lisa.steps_done % lisa.period
    tail = f" and {progress.plural(rest, 'step')}" if rest else ""
    periods = progress.plural(lisa.periods_proven, "period")
    return f"{periods}{tail}: drawn blocks moved, {resting} others bit-identical"


def _not_finite(
    parts: Parts, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, folder: RunFolder
) -> TrainingError:
    last = newest_checkpoint(folder.checkpoints)
    way_back = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
    has_hit = parts.recipe.optimizer.in_backward and torch.isfinite(loss)
    weights = (
        "optimizer.in_backward has put it into the weights" if has_hit else "weights are as before this step"
    )
    return TrainingError(
        f"step {step}: loss {float(loss):g}, gradient norm {float(grad_norm):g}; {weights} and {way_back}; "
        f"lower optimizer.lr, or set run.on_nonfinite: skip to leave such steps out"
    )
