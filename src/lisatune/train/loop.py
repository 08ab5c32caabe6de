"""One training run, from a recipe to a fine-tuned model: the loop behind `lisatune train`.

Order of set-up, always: data, model, layers, optimizer over all parameters, LISA, checkpoint, loop.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lisatune import console
from lisatune.data.tokens import my_share
from lisatune.distributed import ranks
from lisatune.evaluate.held_out import generate_answers, held_out_loss
from lisatune.memory import process
from lisatune.memory.check import MemoryCheck, say_what_fits
from lisatune.models.load import save_model
from lisatune.models.sharded import save_from_ranks
from lisatune.recipe import Recipe
from lisatune.runs.folder import RunFolder, check_output, open_folder
from lisatune.runs.manifest import newest_checkpoint, prune, set_aside
from lisatune.runs.summary import Summary
from lisatune.train import progress
from lisatune.train.assemble import Parts, assemble
from lisatune.train.outline import make_outline, print_outline
from lisatune.train.progress import Log, check_trackers, trackers
from lisatune.train.resume import RunState, begin, find_checkpoint, restore, save
from lisatune.train.stopping import agreed_stop, interruptible, way_back

__all__ = ["TrainingError", "train"]


class TrainingError(RuntimeError):
    """Training can't go on: loss or gradients are not finite."""


class _NoTimeError(Exception):
    """An evaluation was broken off, for the run is to stop."""


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Summary:
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
        OSError: the disk is full, or the folder can't be written (see `run.on_save_error`).
        RuntimeError: memory ran out; the message says what would fit. Or another process runs in the folder.
        KeyboardInterrupt: Ctrl-C or (`Terminated`) SIGTERM, after a checkpoint was saved; the message says
            how to resume.
    """
    with say_what_fits(recipe), ranks.process_group(recipe.run.device):
        return _train(recipe, resume, overwrite)


def _train(recipe: Recipe, resume: bool, overwrite: bool) -> Summary:
    assert recipe.run.output is not None
    output = Path(recipe.run.output)
    ranks.on_rank0(lambda: check_output(output, recipe.as_dict(), resume=resume, overwrite=overwrite))
    check_trackers(recipe.run.report_to)
    if resume:
        find_checkpoint(output)
    check = MemoryCheck(recipe)
    parts = assemble(recipe, check.before_load)
    done, damaged = restore(parts, output) if resume else (begin(parts), [])
    with (
        open_folder(output, recipe.as_dict(), resume=resume, overwrite=overwrite) as folder,
        trackers(recipe.run.report_to, output, recipe.as_dict()) as log,
        way_back(folder),
    ):
        for path in damaged if ranks.is_rank0() else ():
            set_aside(path)
        if resume and ranks.is_rank0():
            prune(folder.checkpoints, recipe.run.keep_checkpoints)  # what a kill left behind
            folder.drop_metrics_after(done.step, evaluated=done.evaluated_step == done.step)
        at: dict[str, Any] = {"device": str(parts.device), "start_step": done.step}
        built = parts.built
        print_outline(make_outline(recipe, built.model, built.layers, built.schedule, parts.data, **at))
        if not resume:
            done.held_out_before = _held_out(parts)
            done.answers_before = _answers(parts)
            folder.log({"step": 0, "held_out_loss": done.held_out_before})
        _loop(parts, done, folder, log, check)
        summary = _finish(parts, done, folder, log, check)
    progress.print_summary(summary)
    return summary


def _loop(parts: Parts, done: RunState, folder: RunFolder, log: Log, check: MemoryCheck) -> None:
    run, last = parts.recipe.run, parts.data.steps
    with interruptible() as mine, progress.Bar(last, done.step) as bar:
        interrupted = agreed_stop(mine)

        def note(record: Mapping[str, Any]) -> None:
            try:
                folder.log(record)
            except OSError as error:
                if run.on_save_error == "stop":
                    raise
                bar.print(f"step {done.step}: {error}; going on, as run.on_save_error says")
            log({key: value for key, value in record.items() if isinstance(value, int | float)}, done.step)

        def evaluate() -> None:
            """Take the held-out loss that is due after this step, before or after a break."""
            is_due = run.eval_every and done.step % run.eval_every == 0 and 0 < done.step < last
            if is_due and done.evaluated_step < done.step:
                with suppress(_NoTimeError):
                    held_out = _held_out(parts, interrupted)
                    done.evaluated_step = done.step
                    note({"step": done.step, "held_out_loss": held_out})
                    bar.print(f"step {done.step}: held-out loss {held_out:.3f}")

        evaluate()
        while done.step < last:
            with check.step(parts.device):
                record = _step(parts, done, folder)
            if record:
                note(record)
                bar.update(**record)
            evaluate()
            stop = interrupted()
            saved = True
            if stop or (run.save_every and done.step % run.save_every == 0):
                saved = save(parts, done, folder, bar.print)
            if stop:
                raise stop(_stopped(done.step, last, folder, saved))


def _stopped(step: int, last: int, folder: RunFolder, saved: bool) -> str:
    where = f"stopped after step {step} of {last}, which"
    if saved:
        return f"{where} is saved; go on with the same command and --resume"
    before = newest_checkpoint(folder.checkpoints)
    way_back = f"--resume, from {before}" if before else "--overwrite, for no checkpoint was saved before"
    return f"{where} could not be saved; go on with the same command and {way_back}"


def _step(parts: Parts, done: RunState, folder: RunFolder) -> dict[str, Any]:
    """Make one optimizer step; where it is to be logged, return its line of metrics.jsonl."""
    run, data = parts.recipe.run, parts.data
    started = time.perf_counter()
    first = done.step * run.accumulation
    batches = [[data.train.rows[i] for i in data.order.batch(first + j)] for j in range(run.accumulation)]
    loss = parts.built.step.backward([parts.collate(my_share(batch)) for batch in batches])
    grad_norm = parts.built.step.clip()
    # Noted before the step, which may draw the next blocks.
    record: dict[str, Any] = parts.learning_rates()
    record |= parts.built.schedule.describe()
    done.peak_trainable = max(done.peak_trainable, sum(p.numel() for p in parts.trainable()))
    # The only wait for the device in a step: what is not finite must not reach the weights.
    if is_finite := bool(torch.isfinite(loss + grad_norm)):
        parts.built.step.update()
    elif run.on_nonfinite == "stop" or (parts.recipe.optimizer.in_backward and torch.isfinite(loss)):
        raise _not_finite(parts, done.step + 1, loss, grad_norm, folder)
    elif done.skipped_in_a_row >= run.max_skipped_steps:
        raise TrainingError(
            f"step {done.step + 1}: loss {float(loss):g}, gradient norm {float(grad_norm):g}, after "
            f"{console.plural(done.skipped_in_a_row, 'step')} in a row that were left out "
            f"(run.max_skipped_steps); {_way_back(folder)}; lower optimizer.lr, or look for what the rows of "
            "these steps hold"
        )
    else:
        parts.built.step.skip()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Detected call of `lr_scheduler", UserWarning
        )  # a skipped first step
        parts.scheduler.step()

    seconds = time.perf_counter() - started
    num_tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
    done.step += 1
    done.num_tokens += num_tokens
    done.skipped_steps += not is_finite
    done.skipped_in_a_row = 0 if is_finite else done.skipped_in_a_row + 1
    done.train_seconds += seconds
    done.peak_state_bytes = max(done.peak_state_bytes, parts.built.state.bytes)
    done.peak_state_elements = max(done.peak_state_elements, parts.built.state.elements)
    if done.step % run.log_every and done.step != data.steps:
        return {}
    return record | {
        "step": done.step,
        "loss": float(loss),
        "grad_norm": float(grad_norm),
        "tokens": done.num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "state_bytes": parts.built.state.bytes,
        "resident_bytes": process.resident_bytes(),
        "skipped_steps": done.skipped_steps,
        "seconds": done.train_seconds,
    }


def _held_out(parts: Parts, interrupted: Callable[[], object] = lambda: None) -> float:
    """Loss per token of the held-out rows, taken in order of length to waste little on padding.

    Raises:
        _NoTimeError: `interrupted` told so between two batches.
    """
    rows = sorted(parts.data.validation.rows, key=lambda row: len(row["input_ids"]))
    size = parts.recipe.run.batch_size * ranks.count()

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(0, len(rows), size):
            if interrupted():
                raise _NoTimeError
            yield parts.collate(my_share(rows[i : i + size]))

    step = parts.built.step
    return held_out_loss(step.loss, batches(), device=parts.device, autocast=step.autocast).loss


def _answers(parts: Parts) -> list[str]:
    prompts = [question.prompt for question in parts.data.questions]
    return generate_answers(
        parts.built.model, parts.tokenizer, prompts, max_new_tokens=parts.recipe.run.sample_tokens
    )


def _finish(parts: Parts, done: RunState, folder: RunFolder, log: Log, check: MemoryCheck) -> Summary:
    """Prove the last period, write the model, evaluate, write the summary."""
    if done.skipped_steps == done.step:
        raise TrainingError(
            f"nothing was trained: all {done.step} steps were left out, since loss or gradients were not "
            f"finite; held-out loss before was {done.held_out_before:g}: where that is not finite either, "
            "look for NaN in the model's weights, else lower optimizer.lr"
        )
    parts.built.schedule.check()
    write = save_model if ranks.count() == 1 else save_from_ranks
    write(parts.built.model, parts.tokenizer, folder.model)  # first, for Ctrl-C may end the rest
    after = _held_out(parts)
    folder.log({"step": done.step, "held_out_loss": after})
    log({"held_out_loss": after}, done.step)
    # Not strict: a resumed run may ask for more samples than were answered before.
    questions = zip(parts.data.questions, done.answers_before, _answers(parts), strict=False)
    summary = Summary(
        steps=done.step,
        skipped_steps=done.skipped_steps,
        tokens=done.num_tokens,
        train_seconds=done.train_seconds,
        tokens_per_second=done.num_tokens / done.train_seconds,
        held_out_loss_before=done.held_out_before,
        held_out_loss_after=after,
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
    if done.failed_saves:
        summary["failed_saves"] = done.failed_saves
    if parts.compile_seconds is not None:
        summary["compile_seconds"] = parts.compile_seconds
    summary.update(parts.built.schedule.summarize())  # type: ignore[typeddict-item]
    folder.write_summary(summary)
    return summary


def _not_finite(
    parts: Parts, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, folder: RunFolder
) -> TrainingError:
    has_hit = parts.recipe.optimizer.in_backward and torch.isfinite(loss)
    weights = (
        "optimizer.in_backward has put it into the weights" if has_hit else "weights are as before this step"
    )
    return TrainingError(
        f"step {step}: loss {float(loss):g}, gradient norm {float(grad_norm):g}; {weights} and "
        f"{_way_back(folder)}; lower optimizer.lr, or set run.on_nonfinite: skip to leave such steps out"
    )


def _way_back(folder: RunFolder) -> str:
    last = newest_checkpoint(folder.checkpoints)
    return f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
