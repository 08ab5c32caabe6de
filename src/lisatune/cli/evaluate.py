"""The command `lisatune evaluate`: benchmark tasks and MT-Bench, for a model or for a run."""

import gc
import json as json_text
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lisatune.cli.loading import LoadOptions
from lisatune.cli.mt_bench import answer, judge
from lisatune.cli.options import refuse_unused
from lisatune.console import print_line, terminal

if TYPE_CHECKING:
    import torch

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
            of the harness, or lm:NAME for its own settings; separated by commas. NAME:limit=N limits one;
            at the end, all that have none.
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
    from lisatune.evaluate.tasks import PRESETS, open_tasks, split_tasks
    from lisatune.files.disk import check_writable
    from lisatune.runs.summary import model_of

    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be >= 1, got {limit}")
    if mt_bench is None:
        judges = {"url": judge_url, "model": judge_model, "price": judge_price}
        unused = {f"--judge-{name}": value is not None for name, value in judges.items()}
        unused |= {"--judge-timeout": judge_timeout != 300, "--max-new-tokens": max_new_tokens != 1024}
        refuse_unused(unused, "without --mt-bench")
    else:
        unused = {"--shots": shots is not None, "--against": against is not None, "--data": data is not None}
        unused |= {"--batch": batch != "auto", "--chat-template": chat_template != "auto"}
        refuse_unused(unused, "with --mt-bench")
    if mt_bench == "answers":
        refuse_unused({"--json": json}, "with --mt-bench answers, which are in a file")
    name, run = model_of(model)
    options = LoadOptions(device, dtype, attention, trust_remote_code)
    folder = Path(model).name
    folder = Path(model).resolve().name if folder in ("", "..") else folder  # such as `.`
    output = output or (run / "evaluation" if run else Path("runs") / f"{folder}-evaluation")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    check_writable(output, "--output")
    if mt_bench is not None and tasks is not None:
        raise ValueError("--tasks and --mt-bench are two evaluations; give one command for each")
    if mt_bench == "answers":
        return answer(name, run, output, options, limit=limit, max_new_tokens=max_new_tokens)
    if mt_bench == "judge":
        how: dict[str, Any] = {"price": judge_price, "timeout": judge_timeout, "limit": limit, "json": json}
        return judge(output, judge_url, judge_model, **how)
    if tasks is None:
        raise ValueError(
            f"give --tasks, such as --tasks arc_easy,winogrande; known: {', '.join(PRESETS)}, lm:NAME"
        )
    asking = _Asking(limit, _parse_batch(batch), _choose_template(chat_template, run), options, quiet=json)
    names = split_tasks(tasks)
    base = None if against is None else model_of(against)[0]
    for each in filter(None, (name, base)):
        options.check(each)
    with open_tasks(names, shots=shots, data=data) as opened:
        evaluation = asking.ask(name, opened, output)
        of_base = None if base is None else asking.ask(base, opened, output / "against")
    _finish(evaluation, of_base, output, json)
    return 0


def _finish(evaluation: dict[str, Any], of_base: dict[str, Any] | None, output: Path, as_json: bool) -> None:
    """Compare an evaluation to that of the base, write it, and print it."""
    from lisatune.evaluate.printing import print_scores
    from lisatune.evaluate.scores import differences, without_items, write_evaluation

    if of_base is not None:
        evaluation["against"] = of_base["model"]
        evaluation["differences"] = differences(evaluation["tasks"], of_base["tasks"])
    evaluation["tasks"] = {key: without_items(score) for key, score in evaluation["tasks"].items()}
    write_evaluation(output, evaluation)
    if as_json:
        print_line(json_text.dumps(evaluation))
    else:
        print_scores(evaluation)
        terminal().print(f"{output}/evaluation.json", soft_wrap=True, markup=False)


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


@dataclass(frozen=True)
class _Asking:
    """How tasks are asked, of a model and of the one that it is compared to."""

    limit: int | None
    batch: int | None
    """Sequences in a batch; None: as many as fit."""
    uses_template: Callable[[Any], bool]
    options: LoadOptions
    quiet: bool

    def ask(self, name: str, tasks: "Sequence[OpenTask]", output: Path) -> dict[str, Any]:
        """Evaluate a model on open tasks, and write its scores."""
        from importlib.metadata import version

        from lisatune.evaluate.benchmark import Progress, score_tasks
        from lisatune.evaluate.printing import ScoreLines
        from lisatune.evaluate.scores import ScoreFolder, identify

        folder = ScoreFolder(output, name=name, identity=identify(name))
        gc.collect()  # the model before this one
        model, tokenizer = self.options.load(name)
        leaves = [leaf for task in tasks for leaf in task.leaves.values()]
        if not tokenizer.chat_template and any(map(self.uses_template, leaves)):
            raise ValueError(f"the tokenizer in {name} has no chat template; give --chat-template off")
        device = self.options.pick()
        scores = score_tasks(
            model,
            tokenizer,
            tasks,
            limit=self.limit,
            batch=lambda length: self._choose_batch(model, length, device),
            chat_template=self.uses_template,
            folder=folder,
            progress=Progress() if self.quiet else ScoreLines(name, len(tasks)),
        )
        about = {"device": str(device), "dtype": str(model.dtype).removeprefix("torch.")}
        return {
            "model": folder.model | about,
            "harness": f"lm-evaluation-harness {version('lm_eval')}",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "tasks": scores,
        }

    def _choose_batch(self, model: Any, length: int, device: "torch.device") -> int:
        from lisatune.memory.estimate import largest_batch
        from lisatune.memory.process import available_bytes

        if self.batch is not None:
            return self.batch
        return largest_batch(model, length, available_bytes(device), device)
