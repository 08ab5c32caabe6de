"""MT-Bench, part 1: write a model's answers to 80 questions of two turns, as FastChat does.

Protocol (lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py; arXiv 2306.05685): one answer to each
question, at most 1,024 tokens a turn, at the temperature of the question's category (greedy below 1e-4), seed
0 before each question. The conversation is written by the tokenizer's own chat template, where FastChat has a
list of templates by model name. `evaluate.judge` is part 2.

    mt_bench/model.json       the model and the settings
    mt_bench/answers.jsonl    the answers, in FastChat's format
"""

import json
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import torch

from lisatune.data.chat import encode_prompt
from lisatune.evaluate.held_out import make_generation_config
from lisatune.evaluate.scores import check_model
from lisatune.files.disk import explain_write_errors, replace_file
from lisatune.losses.causal_lm import evaluation_mode
from lisatune.nn.hidden import max_positions

__all__ = [
    "FOLDER",
    "TEMPERATURES",
    "Answer",
    "answer_questions",
    "load_questions",
    "read_answers",
    "read_data",
]

FOLDER = "mt_bench"
"""Folder of the answers and judgements, in the output folder."""

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of each category, in FastChat's order."""

GREEDY_BELOW = 1e-4

MAX_NEW_TOKENS = 1024

TOP_K = 50
"""What transformers 4 sampled from unless it was told otherwise, and FastChat told it nothing."""

FAILED = "ERROR"
"""The answer that stands for none, as in FastChat; a judge gives it a low score."""


class Question(TypedDict):
    """A question of MT-Bench."""

    question_id: int
    category: str
    turns: list[str]


class Answer(TypedDict):
    """A model's answers to both turns of a question, a line of answers.jsonl."""

    question_id: int
    model_id: str
    choices: list[dict[str, Any]]
    tstamp: float


def read_data(name: str) -> list[dict[str, Any]]:
    """Read one of FastChat's files that come with lisatune."""
    text = (files("lisatune.evaluate") / "mt_bench_data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def load_questions(limit: int | None = None) -> list[Question]:
    """Return the first `limit` questions, or all 80."""
    questions: Any = read_data("question.jsonl")[:limit]
    return list(questions)


def answer_questions(
    model: Any,
    tokenizer: Any,
    output: Path,
    questions: Sequence[Question],
    *,
    identity: dict[str, Any],
    max_new_tokens: int = MAX_NEW_TOKENS,
    date: str | None = None,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> list[Answer]:
    """Answer questions that are not answered yet, and add them to answers.jsonl.

    The model is left in the mode that it was in, and random generators as they were.

    Args:
        model: a transformers or PEFT causal language model, on any device.
        tokenizer: its tokenizer, with a chat template.
        output: folder of the evaluation.
        questions: from `load_questions`.
        identity: what `scores.identify` says of the model.
        max_new_tokens: tokens of the longest answer of a turn, >= 1.
        date: the day that the chat template sees as today, YYYY-MM-DD. Default: today.
        advance: called with the number of answered questions and of all.

    Returns:
        The answers to `questions`, in order.

    Raises:
        ValueError: the folder has answers of another model or other settings, or there is no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "MT-Bench is a conversation, and the tokenizer has no chat template; set one in "
            "tokenizer_config.json (a wrong one lowers the score)"
        )
    folder = output / FOLDER
    settings = {
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }
    _note_model(folder, identity, settings)
    answers = {answer["question_id"]: answer for answer in read_answers(output)}
    for done, question in enumerate(questions):
        advance(done, len(questions))
        if question["question_id"] in answers:
            continue
        turns = _answer(model, tokenizer, question, max_new_tokens, date)
        answer: Answer = {
            "question_id": question["question_id"],
            "model_id": identity["name"],
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        answers[question["question_id"]] = answer
        with explain_write_errors(folder), (folder / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    advance(len(questions), len(questions))
    return [answers[question["question_id"]] for question in questions]


def read_answers(output: Path) -> list[Answer]:
    """Read answers.jsonl; a last line that a kill has cut is left out.

    Raises:
        ValueError: another line is damaged.
    """
    return read_lines(output / FOLDER / "answers.jsonl")


def read_lines(file: Path) -> list[Any]:
    """Read a .jsonl file that is added to line by line; a last line that a kill has cut is cut off.

    Raises:
        ValueError: another line is damaged.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:
        replace_file(file, whole + "\n" if whole else "")
    try:
        return [json.loads(line) for line in whole.split("\n") if line]  # a text may hold U+2028 itself
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete the line") from None


def _note_model(folder: Path, model: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write model.json, or refuse a folder whose answers are of another model or other settings."""
    file = folder / "model.json"
    check_model(file, model)
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for key, value in settings.items():
        if before.get(key, value) != value:  # older versions kept max_new_tokens alone
            raise ValueError(
                f"the answers in {folder} were written with {key} {before[key]}, and it is {value} now; name "
                "another output folder"
            )
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(model | settings, indent=1) + "\n")


def _answer(
    model: Any, tokenizer: Any, question: Question, max_new_tokens: int, date: str | None
) -> list[str]:
    """Answer both turns of a question."""
    temperature = TEMPERATURES[question["category"]]
    sampling = {"temperature": temperature, "top_k": TOP_K, "top_p": 1.0}
    config = make_generation_config(
        model, tokenizer, max_new_tokens, sampling if temperature >= GREEDY_BELOW else None
    )
    limit, answers = max_positions(model), list[str]()
    messages: list[dict[str, Any]] = []
    with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng():
        torch.manual_seed(0)  # the index of the choice
        for turn in question["turns"]:
            messages.append({"role": "user", "content": turn})
            ids = encode_prompt(tokenizer, messages, date=date)
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
            if room < 1:
                answers.append(FAILED)
            else:
                config.max_new_tokens = room
                prompt_BT = torch.tensor([ids], device=model.device)
                out_BT = model.generate(
                    prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=config
                )
                text: str = tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True)
                answers.append(text.strip())
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers
