"""Benchmark tasks after training: `run.evaluate`, and `lisatune compare --evaluate`."""

from pathlib import Path
from typing import Any

import torch

from lisatune.distributed import ranks
from lisatune.evaluate.benchmark import score_tasks
from lisatune.evaluate.scores import ScoreFolder, TaskScore, identify, write_evaluation
from lisatune.evaluate.tasks import open_tasks
from lisatune.files.disk import delete
from lisatune.memory.estimate import largest_batch
from lisatune.memory.process import available_bytes
from lisatune.runs.summary import Score
from lisatune.train.assemble import Parts

__all__ = ["check_tasks", "evaluate_model", "evaluate_run", "main_metric", "main_scores"]


def check_tasks(text: str, data: str | None) -> None:
    """Open the tasks and read their questions, so that what is missing is said before a run begins.

    Raises:
        ValueError, FileNotFoundError, ImportError: as in `open_tasks`.
    """
    with open_tasks(text, data=data):
        pass


def evaluate_model(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    data: str | None,
    device: torch.device,
    is_chat: bool,
    output: Path | None = None,
    written: Path | None = None,
) -> dict[str, TaskScore]:
    """Evaluate a model on tasks.

    Ranks that divide a model must all call it. Each asks every question, because a forward pass needs the
    parts of all, and rank 0 alone writes scores.

    Args:
        model, tokenizer: the model, on `device`.
        text: as `run.evaluate`.
        data: folder of local questions; None: the hub's.
        device: where the model is.
        is_chat: whether it trained on conversations: then tasks in which it writes go through the template.
        output: folder for the scores; None writes none.
        written: the model's folder, by whose hash its scores are known again.
    """
    output = output if ranks.is_rank0() else None

    def batch(length: int) -> int:
        """Return what fits on every rank."""
        free = available_bytes(device, processes=ranks.on_this_machine())
        return -ranks.max_over_ranks(-largest_batch(model, length, free, device))

    with open_tasks(text, data=data) as tasks:
        scores = score_tasks(
            model,
            tokenizer,
            tasks,
            batch=batch,
            chat_template=lambda task: is_chat and task.OUTPUT_TYPE == "generate_until",
            folder=_score_folder(output, written),
        )
    if output is not None:
        write_evaluation(output, {"tasks": scores})
    return scores


def _score_folder(output: Path | None, written: Path | None) -> ScoreFolder | None:
    if output is None or written is None:
        return None
    name = str(written)
    return ScoreFolder(output, name=name, identity=identify(name))


def evaluate_run(parts: Parts, output: Path, written: Path) -> dict[str, Score]:
    """Ask the tasks of `run.evaluate` of a run's model, which it has written to a folder.

    The whole scores go to `output`. Scores of an earlier model of this run there are deleted.
    """
    for name in ("model.json", "evaluation.json", "tasks") if ranks.is_rank0() else ():
        delete(output / name)
    run = parts.recipe.run
    assert run.evaluate is not None
    scores = evaluate_model(
        parts.built.model,
        parts.tokenizer,
        run.evaluate,
        data=run.evaluate_data,
        device=parts.device,
        is_chat=parts.data.is_chat,
        output=output,
        written=written,
    )
    return main_scores(scores)


def main_metric(score: TaskScore) -> str:
    """Return the metric that stands for a task in a table: accuracy, or the exact match that reads best."""
    known = ("acc", "exact_match,flexible-extract", "exact_match")
    return next((name for name in known if name in score["metrics"]), next(iter(score["metrics"]), ""))


def main_scores(scores: dict[str, TaskScore]) -> dict[str, Score]:
    """Return one figure for each task, for a summary and for tables."""
    found: dict[str, Score] = {}
    for name, score in scores.items():
        metric = main_metric(score)
        if metric:
            figure = score["metrics"][metric]
            found[name] = Score(
                metric=metric, value=figure["value"], stderr=figure["stderr"], items=score["items"]
            )
    return found
