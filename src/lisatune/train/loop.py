"""The loop behind `lisatune train`: one run, from a recipe to a fine-tuned model.

Order of set-up, always: data, model, layers, optimizer over all parameters, schedule of blocks, checkpoint,
loop.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from lisatune.data.batches import my_share
from lisatune.data.streaming import StreamError
from lisatune.distributed import ranks
from lisatune.lisa.correction import count_trainable
from lisatune.memory import process
from lisatune.memory.check import MemoryCheck, say_what_fits
from lisatune.recipe import Recipe
from lisatune.runs.folder import RunFolder, check_output, open_folder
from lisatune.runs.manifest import prune, set_aside
from lisatune.runs.summary import Summary
from lisatune.train import evaluation, progress
from lisatune.train.assemble import Parts, assemble, seed_step
from lisatune.train.beginning import (
    choose_start,
    find_checkpoint,
    find_places,
    fix_compile,
    fix_date,
    read_finished,
)
from lisatune.train.benchmarks import check_tasks
from lisatune.train.flops import step_flops, utilization
from lisatune.train.nonfinite import TrainingError, check_skip
from lisatune.train.outline import make_outline, print_outline
from lisatune.train.reference import attach_reference
from lisatune.train.result import finish
from lisatune.train.resume import RunState, begin, restore
from lisatune.train.saving import SaveClock, Saver
from lisatune.train.stopping import agree_to_stop, explain_interruption, interruptible, resume_hint
from lisatune.train.trackers import Log, check_trackers, open_trackers

__all__ = ["TrainingError", "train"]


def train(
    recipe: Recipe,
    *,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    after_step: Callable[[RunState], None] | None = None,
) -> Summary:
    """Run a recipe.

    Args:
        recipe: what to do; `run.output` must be set.
        resume: continue from the newest complete checkpoint in the run folder; a finished run is left as it
            is. `"auto"`: the same, but start the run if the folder has nothing to resume.
        overwrite: delete the run in the folder first.
        after_step: called after each optimizer step with the run's progress, before the step's evaluation
            and checkpoint. An exception that it raises ends the run.

    Returns:
        The contents of `summary.json`.

    Raises:
        ValueError, FileNotFoundError, ImportError: the recipe cannot be used; nothing was written.
        TrainingError: loss or gradients were not finite and `run.on_nonfinite` is `stop`.
        OSError: the disk is full or the folder cannot be written (see `run.on_save_error`).
        RuntimeError: memory ran out, and the message says what would fit; or another process is using the
            folder.
        KeyboardInterrupt: Ctrl-C or (`Terminated`) SIGTERM, after a checkpoint was saved; the message says
            how to resume.

    Example:
        >>> from lisatune.train import load_recipe, train
        >>> summary = train(load_recipe("recipe.yaml", ["run.steps=200"]))  # doctest: +SKIP
    """
    with say_what_fits(recipe), ranks.process_group(recipe.run.device):
        return _train(recipe, resume, overwrite, after_step or (lambda state: None))


def _train(
    recipe: Recipe,
    resume: bool | Literal["auto"],
    overwrite: bool,
    after_step: Callable[[RunState], None],
) -> Summary:
    assert recipe.run.output is not None
    output = Path(recipe.run.output)
    if resume == "auto" and not overwrite:
        resume, overwrite = json.loads(ranks.broadcast_text(json.dumps(choose_start(output))))
    resume = bool(resume)
    recipe = fix_compile(fix_date(recipe, resume=resume), resume=resume)
    finished = read_finished(output, recipe.as_dict()) if resume else None
    writes = finished is None
    ranks.on_rank0(
        lambda: check_output(output, recipe.as_dict(), resume=resume, overwrite=overwrite, writes=writes)
    )
    check_trackers(recipe.run.report_to)
    if recipe.run.evaluate is not None:
        check_tasks(recipe.run.evaluate, recipe.run.evaluate_data)
    if finished is not None:
        progress.print_finished(output, finished)
        return finished
    if resume:
        find_checkpoint(output)
    check = MemoryCheck(recipe)
    parts = assemble(recipe, check.before_load, find_places(output) if resume else ())
    recipe = parts.recipe  # with the answer to run.compile: auto
    state, damaged = restore(parts, output) if resume else (begin(parts), [])
    with (
        open_folder(output, recipe.as_dict(), resume=resume, overwrite=overwrite) as folder,
        open_trackers(recipe.run.report_to, output, recipe.as_dict()) as log,
        explain_interruption(folder),
        progress.Bar(parts.data.steps, state.step) as bar,
        nullcontext() if parts.data.stream is None else closing(parts.data.stream),
    ):
        for path in damaged if ranks.is_rank0() else ():
            set_aside(path)
        if resume and ranks.is_rank0():
            best = state.best_steps()
            prune(folder.checkpoints, recipe.run.keep_checkpoints, best=best)  # left behind by a kill
            folder.drop_metrics_after(state.step, evaluated=state.evaluated_step == state.step)
        built = parts.built
        outline = make_outline(
            recipe,
            built.model,
            built.layers,
            built.schedule,
            parts.data,
            device=str(parts.device),
            start_step=state.step,
            blocks=parts.compiling.why,
        )
        print_outline(outline)
        state.reference = attach_reference(parts, folder.reference, state.reference if resume else None, bar)
        if not resume:
            state.held_out_before, state.more_before = evaluation.held_out(parts, bar)
            state.answers_before = evaluation.answer_samples(parts)
            if recipe.data.holds_out:
                folder.log({"step": 0, "held_out_loss": state.held_out_before} | state.more_before)
        _loop(parts, state, folder, log, check, bar, after_step)
        summary = finish(parts, state, folder, log, check, bar)
    progress.print_summary(summary)
    return summary


def _loop(
    parts: Parts,
    state: RunState,
    folder: RunFolder,
    log: Log,
    check: MemoryCheck,
    bar: progress.Bar,
    after_step: Callable[[RunState], None],
) -> None:
    run, last = parts.recipe.run, parts.data.steps
    bar.start_clock()
    clock = SaveClock(run.save_every)
    with interruptible() as asked_here, Saver(parts, state, folder, bar.print) as saver:
        asked_to_stop = agree_to_stop(asked_here)

        def note(record: dict[str, Any]) -> None:
            try:
                folder.log(record)
            except OSError as error:
                if run.on_save_error == "stop":
                    raise
                bar.print(f"step {state.step}: {error}; continuing, as run.on_save_error says")
            log(record, state.step)

        def evaluate() -> bool:
            """Take this step's held-out loss, if it has one and a run before a break has not taken it.

            Returns whether it is below that of every checkpoint, and its own was saved or begun.
            """
            has_one = run.eval_every and state.step % run.eval_every == 0 and 0 < state.step < last
            if has_one and state.evaluated_step < state.step:
                with suppress(evaluation.StopRequestedError):
                    held_out, state.more = evaluation.held_out(parts, bar, asked_to_stop)
                    state.add_evaluation(held_out)
                    note({"step": state.step, "held_out_loss": held_out} | state.more)
                    bar.print(f"step {state.step}: held-out loss {held_out:.3f}")
                    if run.keep_best:
                        saver.collect(wait=True)  # else one that is going to fail would count
                        if state.is_best():
                            with clock.saving():
                                return saver.save(is_best=True)
            return False

        evaluate()
        while state.step < last and not state.has_stalled(run.stop_after):
            try:
                with check.step(parts.device):
                    record = _step(parts, state, folder)
            except StreamError as error:
                saved = saver.save(must=False, now=True)
                raise StreamError(f"{error}; {_say_stopped(parts, state, folder, saved)}") from error
            if state.step % run.log_every == 0 or state.step == last:
                note(record)
                bar.update(**record)
            saver.collect()
            after_step(state)
            saved = evaluate()
            stop = asked_to_stop()
            if not saved and (clock.is_due(state.step) or stop):
                must = bool(stop) or clock.is_asked_for
                with clock.saving():
                    saved = saver.save(must=must, now=bool(stop))
            if stop:
                saved = saver.collect(wait=True) and saved
                raise stop(_say_stopped(parts, state, folder, saved))


def _say_stopped(parts: Parts, state: RunState, folder: RunFolder, saved: bool) -> str:
    what = "which is saved" if saved else "which could not be saved"
    return f"stopped after step {state.step} of {parts.data.steps}, {what}; {resume_hint(folder)}"


def _step(parts: Parts, state: RunState, folder: RunFolder) -> dict[str, Any]:
    """Make one optimizer step and return its line of metrics.jsonl."""
    run, step, schedule = parts.recipe.run, parts.built.step, parts.built.schedule
    started = time.perf_counter()
    if ranks.count() > 1:
        seed_step(run.seed, state.step)
    batches = [parts.data.batch(state.step * run.accumulation + i) for i in range(run.accumulation)]
    has_own_rows = parts.data.stream is not None  # else all ranks take the same batch, and share it
    shares = batches if has_own_rows else [my_share(b, parts.data.rows_per_record) for b in batches]
    loss = step.backward([parts.collate(share) for share in shares])
    grad_norm = step.clip()

    # Noted before the update, which may draw the next blocks.
    record = parts.learning_rates() | schedule.describe()
    flops = step_flops(parts.built.model, parts.built.layers, batches, parts.device)
    trainable = count_trainable(parts.built.model) - schedule.idle_row_numbers

    # The only wait for the device in a step: a number that is not finite must not reach the weights.
    is_finite = bool(torch.isfinite(loss + grad_norm))
    if is_finite:
        step.update()
    else:
        check_skip(parts, state, loss, grad_norm, folder)
        step.skip()
    parts.advance_learning_rates()

    seconds = time.perf_counter() - started
    by_source = {} if parts.source_losses is None else {"loss_by_source": parts.source_losses.take()}
    rows = [row for batch in batches for row in batch]
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    if has_own_rows:
        num_tokens, flops = (int(ranks.sum_over_ranks(each)[0]) for each in (num_tokens, flops or 0))
    state.add_step(
        is_finite=is_finite,
        num_tokens=num_tokens,
        seconds=seconds,
        trainable=trainable,
        meter=parts.built.state,
    )
    return (
        record
        | {
            "step": state.step,
            "loss": float(loss),
            **by_source,
            "grad_norm": float(grad_norm),
            "tokens": state.num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "state_bytes": parts.built.state.bytes,
            "resident_bytes": process.resident_bytes(),
            "skipped_steps": state.skipped_steps,
            "seconds": state.train_seconds,
        }
        | utilization(flops, seconds, parts.device, ranks=ranks.count())
    )
