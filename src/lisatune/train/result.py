"""The end of a run: its model is written and evaluated, and its figures become the summary."""

from lisatune.distributed import ranks
from lisatune.memory.check import MemoryCheck
from lisatune.models.load import save_model
from lisatune.models.sharded import save_from_ranks
from lisatune.runs.card import write_card
from lisatune.runs.folder import RunFolder
from lisatune.runs.summary import Summary
from lisatune.train import evaluation
from lisatune.train.assemble import Parts
from lisatune.train.benchmarks import evaluate_run
from lisatune.train.nonfinite import check_trained
from lisatune.train.progress import Bar
from lisatune.train.resume import RunState, restore_best
from lisatune.train.trackers import Log

__all__ = ["finish"]


def finish(
    parts: Parts, state: RunState, folder: RunFolder, log: Log, check: MemoryCheck, bar: Bar
) -> Summary:
    """Prove the last period, write the model, evaluate, write the summary."""
    check_trained(state)
    parts.built.schedule.check()
    parts.built.schedule.settle()
    # First, because Ctrl-C may end the rest; it also rounds the weights that are evaluated to those written.
    _write_model(parts, folder)
    losses = _last_losses(parts, state, folder, log, bar)
    summary = _summarize(parts, state, folder)
    summary.update(losses)
    summary.update(check.outcome(parts.device))
    ranks.on_rank0(lambda: write_card(folder.model, parts.recipe.as_dict(), summary))
    folder.write_summary(summary)
    if parts.recipe.run.evaluate is not None:
        bar.print(f"asking {parts.recipe.run.evaluate}")
        summary["scores"] = evaluate_run(parts, folder.path / "evaluation", folder.model)
        folder.write_summary(summary)
    return summary


def _write_model(parts: Parts, folder: RunFolder) -> None:
    write = save_model if ranks.count() == 1 else save_from_ranks
    write(parts.built.model, parts.tokenizer, folder.model, dtype=parts.save_dtype)


def _last_losses(parts: Parts, state: RunState, folder: RunFolder, log: Log, bar: Bar) -> Summary:
    """Evaluate the last step; with `run.keep_best` write the best step's model, if that is another one.

    Returns:
        The held-out losses of a summary, and the further figures of `evaluation.held_out`.
    """
    losses: Summary = {}
    is_rounded = parts.save_dtype is not None  # the written weights are not those that the loop evaluated
    if parts.recipe.data.holds_out:
        if state.evaluated_step < state.step:
            state.held_out, state.more = evaluation.held_out(parts, bar)
            folder.log({"step": state.step, "held_out_loss": state.held_out} | state.more)
            log({"held_out_loss": state.held_out} | state.more, state.step)
        elif is_rounded:
            state.held_out, state.more = evaluation.held_out(parts, bar)
        losses = {"held_out_loss_before": state.held_out_before, "held_out_loss_after": state.held_out}
    if parts.recipe.run.keep_best:
        best = restore_best(parts, state, folder)
        losses |= {"best_step": best, "held_out_loss_last": state.held_out}
        if best != state.step:
            parts.built.schedule.settle()
            _write_model(parts, folder)
            losses["held_out_loss_after"] = state.best[str(best)]
            if is_rounded or state.more:
                losses["held_out_loss_after"], state.more = evaluation.held_out(parts, bar)
    for name, value in state.more.items():
        pair = {f"{name}_before": state.more_before[name], f"{name}_after": value}
        losses.update(pair)  # type: ignore[typeddict-item]
    return losses


def _summarize(parts: Parts, state: RunState, folder: RunFolder) -> Summary:
    """Answer the samples, and collect the figures of a run besides its losses and memory."""
    # Not strict: a resumed run may ask for more samples than were answered before.
    answers = evaluation.answer_samples(parts)
    questions = zip(parts.data.questions, state.answers_before, answers, strict=False)
    summary = Summary(
        steps=state.step,
        skipped_steps=state.skipped_steps,
        tokens=state.num_tokens,
        train_seconds=state.train_seconds,
        tokens_per_second=state.num_tokens / state.train_seconds,
        peak_state_bytes=state.peak_state_bytes,
        peak_state_elements=state.peak_state_elements,
        peak_trainable=state.peak_trainable,
        samples=[
            {"prompt": question.text, "reference": question.answer, "before": before, "after": answer}
            for question, before, answer in questions
        ],
        is_chat=parts.data.is_chat,
        model=str(folder.model),
    )
    if state.step < parts.data.steps:
        summary["planned_steps"] = parts.data.steps
    if parts.data.stream is not None:
        summary["stream"] = parts.data.stream.describe(state.step * parts.recipe.run.accumulation)
    if state.failed_saves:
        summary["failed_saves"] = state.failed_saves
    if parts.save_dtype is not None:
        summary["model_dtype"] = str(parts.save_dtype).removeprefix("torch.")
    if parts.compile_seconds is not None:
        summary["compile_seconds"] = parts.compile_seconds
    summary.update(parts.built.schedule.summarize())  # type: ignore[typeddict-item]
    return summary
