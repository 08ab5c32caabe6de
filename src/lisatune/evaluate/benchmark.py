"""Ask a model the questions of benchmark tasks, with the lm-evaluation-harness.

The harness gets the model that is loaded already, so dtype, device, attention and adapters are whatever the
model has. Seeds and settings are those of the harness's own command line, and so are the results. A task that
is done is on disk: a stopped evaluation continues with the next one.
"""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lisatune import __version__
from lisatune.console import first_line
from lisatune.evaluate.scores import ScoreFolder, TaskScore, average, leaf_score
from lisatune.evaluate.tasks import SEED, OpenTask, no_trace, open_tasks
from lisatune.losses.causal_lm import evaluation_mode

__all__ = ["BatchRule", "Progress", "evaluate_tasks", "score_tasks"]

BatchRule = Callable[[int], int]
"""Gives the number of sequences in a batch for the tokens of the longest one."""

MOST_TOKENS = 2048
"""Length that a rule for batches is asked for where the length is not known yet."""


class Progress:
    """What an evaluation says while it works. This one says nothing; override what you want to hear."""

    def begin(self, task: OpenTask, *, done: int, questions: int) -> None:
        """A task begins. `done` of its `questions` have their scores on disk already."""

    def advance(self, questions: float) -> None:
        """More questions are answered; a question with several choices comes in parts."""

    def end(self, score: TaskScore) -> None:
        """A task has its score."""


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    batch: int | BatchRule = 8,
    chat_template: bool = False,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Evaluate a loaded model on tasks of the lm-evaluation-harness.

    The model stays where it is and is left in the mode that it was in; random generators go on as if nothing
    had been asked.

    Args:
        model: a transformers or PEFT causal language model, on any device.
        tokenizer: its tokenizer.
        tasks: names of `PRESETS`, of tasks of the harness, or `lm:NAME`; in one string separated by commas,
            where a name may have its own limit: `mmlu:limit=5,arc_easy:limit=200`.
        shots: examples before each question. Default: the preset's, or the task's own.
        limit: ask only the first questions of each task (of each subject in a group such as MMLU), >= 1.
        data: folder with local questions. Default: the hub's.
        batch: sequences in a batch, or a function that gives it for a length in tokens.
        chat_template: write each question, and each example, as a turn of a conversation.
        output: folder for the scores, which is read first: tasks that it has with the same settings are not
            asked again. It must be of this model.
        progress: is told how far the evaluation is.

    Returns:
        The scores by the tasks' names as asked for.

    Raises:
        ValueError, FileNotFoundError, ImportError: as in `open_tasks`; or `limit` is below 1, or `output`
            is of another model.

    Example:
        >>> scores = evaluate_tasks(model, tokenizer, "arc_easy,winogrande", limit=200)
        >>> scores["arc_easy"]["metrics"]["acc"]
    """
    with open_tasks(tasks, shots=shots, data=data) as opened:
        folder = None if output is None else ScoreFolder(Path(output), name=str(model.name_or_path))
        return score_tasks(
            model,
            tokenizer,
            opened,
            limit=limit,
            batch=batch,
            chat_template=lambda task: chat_template,
            folder=folder,
            progress=progress,
        )


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[OpenTask],
    *,
    limit: int | None = None,
    batch: int | BatchRule = 8,
    chat_template: Callable[[Any], bool] = lambda task: False,
    folder: ScoreFolder | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Evaluate a loaded model on open tasks; the arguments are those of `evaluate_tasks`.

    Args:
        chat_template: whether a task of the harness is asked through the chat template.
        folder: where scores are kept.

    Raises:
        ValueError: `limit` is below 1, or the tokenizer has no chat template and one is asked for.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    progress = progress or Progress()
    with no_trace(), evaluation_mode(model):
        lm = _make_lm(model, tokenizer, batch)
        return {task.name: _score(lm, task, limit, chat_template, folder, progress) for task in tasks}


def _score(
    lm: Any,
    task: OpenTask,
    limit: int | None,
    chat_template: Callable[[Any], bool],
    folder: ScoreFolder | None,
    progress: Progress,
) -> TaskScore:
    """Score the leaves of a task one after another, except those on disk, and average over a group."""
    limit = limit if task.limit is None else task.limit
    scores: dict[str, TaskScore] = {}
    waiting = []
    for name, leaf in task.leaves.items():
        settings = _settings(lm.model, task, leaf, limit, chat_template(leaf))
        kept = None if folder is None else folder.read(task.name, name, settings)
        if kept is None:
            waiting.append((name, leaf, settings))
        else:
            scores[name] = kept
    sizes = {
        name: min(len(leaf.eval_docs), limit or len(leaf.eval_docs)) for name, leaf in task.leaves.items()
    }
    progress.begin(task, done=sum(sizes[name] for name in scores), questions=sum(sizes.values()))
    for name, leaf, settings in waiting:
        scores[name] = _ask(lm, name, leaf, settings, partial(_advance, progress, sizes[name]))
        if folder is not None:
            folder.write(task.name, name, scores[name])
    in_order = {name: scores[name] for name in task.leaves}
    score = average(task, in_order)
    progress.end(score)
    return score


def _advance(progress: Progress, questions: int, share: float) -> None:
    progress.advance(questions * share)


def _settings(
    model: Any, task: OpenTask, leaf: Any, limit: int | None, chat_template: bool
) -> dict[str, Any]:
    """Return all that the score of a leaf depends on, beside the model's weights."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "task": leaf.config.task,
        "version": leaf.VERSION,
        "harness": version("lm_eval"),
        "shots": leaf.get_config("num_fewshot"),
        "limit": limit,
        "chat_template": chat_template,
        "questions": len(leaf.eval_docs),
        "data": task.data or leaf.DATASET_PATH,
    }


def _ask(
    lm: Any, name: str, leaf: Any, settings: dict[str, Any], advance: Callable[[float], None]
) -> TaskScore:
    """Ask one task of the harness."""
    from lm_eval.evaluator import evaluate

    _seed()
    lm.listen(advance)
    began = time.perf_counter()
    template = settings["chat_template"]
    try:
        result = evaluate(
            lm=lm,
            task_dict={"tasks": {name: leaf}},
            limit=settings["limit"],
            apply_chat_template=template,
            fewshot_as_multiturn=template,
        )
    except (AssertionError, ValueError) as error:  # such as more examples than there are
        shots = settings["shots"]
        raise ValueError(f"task {name} cannot be asked with {shots} examples: {first_line(error)}") from error
    seconds = time.perf_counter() - began
    found = {"batch": lm.batch_size, "cut": lm.cut, "seconds": round(seconds, 3), "lisatune": __version__}
    return leaf_score(result, name, settings | found)


def _seed() -> None:
    """Seed as the harness's command line does, before each task, so that no task depends on those before."""
    import numpy as np

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def _make_lm(model: Any, tokenizer: Any, batch: int | BatchRule) -> Any:
    """Wrap a model for the harness. The class is made here because its base is imported here."""
    from lm_eval.models.huggingface import HFLM

    rule: BatchRule = batch if callable(batch) else lambda length: batch

    class Loaded(HFLM):  # type: ignore[misc, unused-ignore]
        """The harness's transformers model, with our batches and our progress."""

        cut = 0
        """Prompts of the current task that were too long for the model and lost their beginning."""

        def listen(self, advance: Callable[[float], None]) -> None:
            """Report shares of the current task."""
            self.cut, self._advance = 0, advance

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.cache_hook = _Count(len(requests), self._advance)
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            lengths = [len(context or ()) + len(answer) for _, context, answer in requests]
            self.cut += sum(length > self.max_length + 1 for length in lengths)
            self.batch_size_per_gpu = rule(min(max(lengths, default=1), self.max_length))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.cache_hook = _Count(len(requests), self._advance)
            self.batch_size_per_gpu = rule(min(self.max_length, MOST_TOKENS))
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.cache_hook = _Count(len(requests), self._advance)
            lengths = [len(self.tok_encode(request.args[0])) for request in requests]
            new = max(int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests)
            if new >= self.max_length:
                raise ValueError(
                    f"the model may write {new} tokens and reads at most {self.max_length} in all; leave "
                    "this task out"
                )
            self.cut += sum(length > self.max_length - new for length in lengths)
            self.batch_size_per_gpu = rule(min(max(lengths) + new, self.max_length))
            return super().generate_until(requests, disable_tqdm=True)

    return Loaded(pretrained=model, tokenizer=tokenizer, batch_size=1)


class _Count:
    """Stands where the harness keeps its cache of answers, and is told of each one."""

    def __init__(self, requests: int, advance: Callable[[float], None]) -> None:
        self._share, self._advance = 1 / max(requests, 1), advance

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        """Count an answered request."""
        self._advance(self._share)
