"""The command `lisatune evaluate`: benchmark tasks and MT-Bench, for a model or for a run."""

import gc
import json as json_text
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lisatune.cli.loading import LoadOptions
from lisatune.console import print_line, terminal

if TYPE_CHECKING:
    from lisatune.evaluate.tasks import OpenTask

__all__ = ["evaluate"]


def evaluate(
    model: str,
    /,
    *,
    tasks: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    against: str | None = None,
    data: Path | None = None,
    batch: str = "auto",
    chat_template: Literal["auto", "on", "off"] = "auto",
    output: Path | None = None,
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
    mt_bench: Literal["answers", "judge"] | None = None,
    max_new_tokens: int = 1024,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_price: str | None = None,
    judge_timeout: float = 300.0,
) -> int:
    """Evaluate a model or a run on benchmark tasks, or on MT-Bench.

    Tasks that are done stay in the output folder; the same command continues with the others:

        lisatune evaluate runs/demo --tasks arc_easy,winogrande --limit 200 --against smollm2-135m
        lisatune evaluate runs/demo --tasks mmlu,agieval,gsm8k,pubmedqa --data FOLDER
        lisatune evaluate runs/demo --mt-bench answers
        lisatune evaluate runs/demo --mt-bench judge --judge-url http://127.0.0.1:8080/v1 --judge-model NAME

    Args:
        model: Run folder, or any model that `train` takes, or a folder of adapters.
        tasks: mmlu, agieval, winogrande, gsm8k, pubmedqa, arc_easy with the paper's settings, any other task
            of the harness, or lm:NAME for its own settings; separated by commas. NAME:limit=N limits one.
        shots: Examples before each question. Default: the preset's, or the task's own.
        limit: Ask only the first questions of each task, in mmlu of each subject.
        against: Base model: evaluate it too, with the same settings, and show the differences.
        data: Folder with a folder of questions for each task. Nothing is downloaded then.
        batch: Sequences in a batch; auto: as many as fit into half of the free memory.
        chat_template: Ask through the tokenizer's chat template. auto: only where the model writes an answer,
            and the run trained on conversations.
        output: Folder of the scores. Default: evaluation in the run folder, or runs/NAME-evaluation.
        device: cpu, cuda, …; auto: an accelerator if there is one.
        dtype: Dtype of the weights. auto: as the model is stored.
        attention: Attention implementation, as model.attention.
        trust_remote_code: Run Python code that comes with the model.
        json: Print one JSON object.
        mt_bench: Write answers to MT-Bench's 80 questions, or let another model judge them. --limit asks only
            the first questions.
        max_new_tokens: Tokens of the longest MT-Bench answer; the protocol's is 1024.
        judge_url: OpenAI-compatible server. Its key is in the environment: LISATUNE_JUDGE_KEY, or
            OPENAI_API_KEY for api.openai.com.
        judge_model: Name of the judge on the server.
        judge_timeout: Seconds to wait for a judgement, which a slow machine may need more of.
        judge_price: Price of a million tokens read and written, IN,OUT, for the estimate before it starts.
    """
    from lisatune.evaluate.printing import print_scores
    from lisatune.evaluate.scores import differences, without_items, write_evaluation
    from lisatune.evaluate.tasks import PRESETS, open_tasks, split_tasks
    from lisatune.runs.summary import model_of

    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1, got {limit}")
    name, run = model_of(model)
    options = LoadOptions(device, dtype, attention, trust_remote_code)
    output = output or (run / "evaluation" if run else Path("runs") / f"{Path(model).name}-evaluation")
    if mt_bench is not None:
        from lisatune.cli.mt_bench import answer, judge

        if tasks is not None:
            raise ValueError("--tasks and --mt-bench are two evaluations; give one command for each")
        if mt_bench == "answers":
            return answer(name, run, output, options, limit=limit, max_new_tokens=max_new_tokens)
        return judge(
            output,
            judge_url,
            judge_model,
            price=judge_price,
            timeout=judge_timeout,
            limit=limit,
            json=json,
        )
    if tasks is None:
        raise ValueError(
            f"give --tasks, such as --tasks arc_easy,winogrande; known: {', '.join(PRESETS)}, lm:NAME"
        )
    sequences = _parse_batch(batch)
    names = split_tasks(tasks)
    subjects = [(name, output)]
    if against is not None:
        subjects.append((model_of(against)[0], output / "against"))
    for each, _ in subjects:
        options.check(each)
    with open_tasks(names, shots=shots, data=data) as opened:
        uses_template = _choose_template(chat_template, run)
        found = [
            _evaluate(each, opened, folder, limit, sequences, uses_template, options, quiet=json)
            for each, folder in subjects
        ]
    evaluation = found[0]
    if against is not None:
        evaluation["against"] = found[1]["model"]
        evaluation["differences"] = differences(evaluation["tasks"], found[1]["tasks"])
    evaluation["tasks"] = {key: without_items(score) for key, score in evaluation["tasks"].items()}
    write_evaluation(output, evaluation)
    if json:
        print_line(json_text.dumps(evaluation))
    else:
        print_scores(evaluation)
        terminal().print(f"{output}/evaluation.json", soft_wrap=True, markup=False)
    return 0


def _parse_batch(text: str) -> int | None:
    """Read --batch; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch must be auto or a number >= 1, got {text!r}")
    return int(text)


def _choose_template(asked: str, run: Path | None) -> Callable[[Any], bool]:
    """Say for each task of the harness whether it is asked through the chat template."""
    from lisatune.runs.summary import trained_on_chat

    if asked != "auto":
        return lambda task: asked == "on"
    chats = run is not None and bool(trained_on_chat(run))
    return lambda task: chats and task.OUTPUT_TYPE == "generate_until"


def _evaluate(
    name: str,
    tasks: "Sequence[OpenTask]",
    output: Path,
    limit: int | None,
    batch: int | None,
    uses_template: Callable[[Any], bool],
    options: LoadOptions,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Evaluate one model on open tasks, and write its scores."""
    from importlib.metadata import version

    from lisatune.evaluate.benchmark import Progress, score_tasks
    from lisatune.evaluate.printing import ScoreLines
    from lisatune.evaluate.scores import ScoreFolder, identify
    from lisatune.memory.estimate import largest_batch
    from lisatune.memory.process import available_bytes

    folder = ScoreFolder(output, name=name, identity=identify(name))
    gc.collect()  # the model before this one
    model, tokenizer = options.load(name)
    if not tokenizer.chat_template and any(
        uses_template(leaf) for task in tasks for leaf in task.leaves.values()
    ):
        raise ValueError(f"the tokenizer in {name} has no chat template; leave out --chat-template")
    device = options.pick()

    def rule(length: int) -> int:
        if batch is not None:
            return batch
        return largest_batch(model, length, available_bytes(device), device)

    progress = Progress() if quiet else ScoreLines(name, len(tasks))
    scores = score_tasks(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch=rule,
        chat_template=uses_template,
        folder=folder,
        progress=progress,
    )
    return {
        "model": folder.model | {"device": str(device), "dtype": str(model.dtype).removeprefix("torch.")},
        "harness": f"lm-evaluation-harness {version('lm_eval')}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "tasks": scores,
    }
