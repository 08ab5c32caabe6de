"""MT-Bench, part 2: let another model grade the answers, by any OpenAI-compatible server.

Protocol (lm-sys/FastChat, fastchat/llm_judge/common.py; arXiv 2306.05685): single-answer grading at
temperature 0, one request for each turn, with GPT-4's reference answers for math, reasoning and coding. The
rating is the number in [[ ]], or else in [ ]; a judgement without one counts as missing. The score is the
mean of all turns.

    mt_bench/judgments-JUDGE.jsonl   every request and reply, in FastChat's format
    mt_bench/scores-JUDGE.json       the scores, with the judge's name and the dates

The key of the server is in no file and in no message.
"""

import datetime
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

from lisatune.evaluate.mt_bench import (
    FOLDER,
    TEMPERATURES,
    Answer,
    Question,
    read_answers,
    read_data,
    read_lines,
)
from lisatune.files.disk import explain_write_errors, replace_file

__all__ = ["Estimate", "Judge", "estimate_cost", "find_key", "judge_answers"]

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged beside a reference answer."""

MAX_TOKENS = 2048
"""Tokens of the longest judgement."""

CHARACTERS_PER_TOKEN = 4
"""Rough, for English: the estimate before the judge is asked."""

LONGEST_TIMEOUT = 10.0**6
"""Seconds; the system cannot wait for much more."""

LONGEST_WAIT = 60.0
"""Seconds between two tries, unless the server asks for more."""

RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

KEY = "LISATUNE_JUDGE_KEY"
"""Environment variable with the server's key."""


class Judgment(TypedDict):
    """A line of judgments-JUDGE.jsonl."""

    question_id: int
    model: str
    judge: tuple[str, str]
    """The judge's name and that of the prompt."""

    user_prompt: str
    judgment: str
    score: float
    """1 to 10; -1 where the judgement has no rating."""

    turn: int
    tstamp: float
    usage: dict[str, Any] | None
    """Tokens by the server's count."""


@dataclass(frozen=True)
class Estimate:
    """What judging will take, before it begins."""

    requests: int
    read_tokens: int
    """Tokens of all prompts, at 4 characters a token."""

    written_tokens: int
    """Most tokens of all judgements."""

    cost: float | None
    """Most that it costs, in the money of the price; None without a price."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, because the key would go to another server."""

    def redirect_request(self, *unused: Any) -> None:
        """Refuse."""


@dataclass(frozen=True)
class Judge:
    """A model on an OpenAI-compatible server.

    Args:
        url: such as https://api.openai.com/v1; `/chat/completions` is added.
        model: its name on the server.
        key: sent as a bearer token; None sends none.
        timeout: seconds to wait for a reply.
        tries: requests until a judgement is given up.
        sleep: waits for some seconds; tests replace it.

    Raises:
        ValueError: the URL is none, the key cannot be sent, or the timeout is out of range.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 300.0
    tries: int = 8
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"the judge's timeout must be seconds > 0 and at most {LONGEST_TIMEOUT:,.0f}, got "
                f"{self.timeout:g}"
            )
        if not _is_address(self.url):
            raise ValueError(
                "the judge's url must be a server's address, such as http://127.0.0.1:8080/v1, got "
                f"{self.url!r}"
            )
        if self.key and not re.fullmatch("[!-~]+", self.key):
            raise ValueError(
                f"the judge's key holds a blank, or a character that is not ASCII; set {KEY} to the key alone"
            )

    def __repr__(self) -> str:
        return f"Judge({self.url!r}, {self.model!r})"

    @property
    def host(self) -> str:
        """The server, without what else may stand in its URL."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def ask(self, system: str, prompt: str) -> tuple[str, dict[str, Any] | None]:
        """Ask for one judgement; try again after errors of the server or of the network, and when it is busy.

        Returns:
            The text, which may be empty, and the server's count of tokens.

        Raises:
            ValueError: the server refuses the request: another try would not help.
            RuntimeError: it failed too often; the message has the last reason.
        """
        reason = ""
        for attempt in range(self.tries):
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                return self._ask_once(system, prompt)
            except urllib.error.HTTPError as error:
                reason = self._explain(error)
                if error.code != 429 and error.code < 500 and error.code != 408:
                    raise ValueError(f"the judge at {self.host} refuses: {reason}") from None
                wait = max(wait, _retry_after(error.headers.get("Retry-After")))
            # timeouts and broken replies too
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                reason = self._hide(f"{type(error).__name__}: {error}")
            if attempt < self.tries - 1:
                self.sleep(wait)
        raise RuntimeError(
            f"the judge at {self.host} failed {self.tries} times ({reason}); give the command again to go on"
        )

    def _ask_once(self, system: str, prompt: str) -> tuple[str, dict[str, Any] | None]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "n": 1}
        url = self.url.rstrip("/")
        url += "" if url.endswith("/chat/completions") else "/chat/completions"
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout) as reply:
            answer = json.loads(reply.read())
        text = answer["choices"][0]["message"]["content"]
        return "" if text is None else str(text), answer.get("usage")

    def _explain(self, error: urllib.error.HTTPError) -> str:
        """Say what a server says about an error."""
        try:
            told = json.loads(error.read())["error"]
            told = told["message"] if isinstance(told, dict) else told
        except (OSError, ValueError, LookupError, TypeError):
            told = error.reason
        return self._hide(f"{error.code} {told}")

    def _hide(self, text: str) -> str:
        """Take the key out of a text, and make it one short line."""
        text = text.replace(self.key, "***") if self.key else text
        return " ".join(text.split())[:300]


def _is_address(url: str) -> bool:
    """Whether a request can go to a URL."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is no number of a port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", url)


def find_key(url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Find the server's key in the environment.

    LISATUNE_JUDGE_KEY is for any server. OPENAI_API_KEY goes to api.openai.com alone. A line's end behind the
    key, which a file leaves there, is none of it.
    """
    names = [KEY, *(["OPENAI_API_KEY"] if urlsplit(url).hostname == "api.openai.com" else [])]
    return next(filter(None, (environment.get(name, "").strip() for name in names)), None)


def judge_answers(
    output: Path,
    questions: Sequence[Question],
    judge: Judge,
    *,
    price: tuple[float, float] | None = None,
    begin: Callable[[Estimate], None] = lambda estimate: None,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Judge the answers in a folder that this judge has not judged yet, and write the scores.

    Args:
        output: folder of the evaluation, with answers from `answer_questions`.
        questions: from `load_questions`; each must have an answer.
        judge: who judges.
        price: money for a million tokens read, and for a million written.
        begin: is told the cost of what is left, before the first request.
        advance: called with the number of judgements done and of all.

    Returns:
        The scores, as in scores-JUDGE.json.

    Raises:
        FileNotFoundError: questions have no answer.
        ValueError: the judge refuses.
        RuntimeError: the judge fails; what it has judged is kept.
    """
    answers = {answer["question_id"]: answer for answer in read_answers(output)}
    missing = [question["question_id"] for question in questions if question["question_id"] not in answers]
    if missing:
        raise FileNotFoundError(
            f"{output / FOLDER} has no answers to {len(missing)} of {len(questions)} questions; let the "
            "model write them first, as `lisatune evaluate --mt-bench answers` does"
        )
    slug = re.sub(r"[^\w.-]+", "-", judge.model)
    file = output / FOLDER / f"judgments-{slug}.jsonl"
    kept: dict[tuple[int, int], Judgment] = {
        (line["question_id"], line["turn"]): line for line in read_lines(file)
    }
    tasks = [(question, turn) for turn in (1, 2) for question in questions]
    done: dict[tuple[int, int], Judgment] = {}
    waiting = []
    for question, turn in tasks:
        key = question["question_id"], turn
        name, system, prompt = write_prompt(question, answers[key[0]], turn)
        if key in kept and kept[key]["user_prompt"] == prompt and kept[key]["judge"][0] == judge.model:
            done[key] = kept[key]
        else:
            waiting.append((question, turn, name, system, prompt))
    begin(estimate_cost([system + prompt for *_, system, prompt in waiting], price))
    for at, (question, turn, name, system, prompt) in enumerate(waiting):
        advance(len(tasks) - len(waiting) + at, len(tasks))
        text, usage = judge.ask(system, prompt)
        judgment: Judgment = {
            "question_id": question["question_id"],
            "model": answers[question["question_id"]]["model_id"],
            "judge": (judge.model, name),
            "user_prompt": prompt,
            "judgment": text,
            "score": read_rating(text),
            "turn": turn,
            "tstamp": time.time(),
            "usage": usage,
        }
        done[question["question_id"], turn] = judgment
        with explain_write_errors(file.parent), file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(judgment, ensure_ascii=False) + "\n")
    advance(len(tasks), len(tasks))
    scores = add_up(questions, [done[question["question_id"], turn] for question, turn in tasks], judge)
    with explain_write_errors(file.parent):
        replace_file(file.parent / f"scores-{slug}.json", json.dumps(scores, indent=1) + "\n")
    return scores


def estimate_cost(prompts: Sequence[str], price: tuple[float, float] | None) -> Estimate:
    """Estimate what the judge reads and at most writes, and what that costs."""
    read = sum(len(prompt) for prompt in prompts) // CHARACTERS_PER_TOKEN
    written = len(prompts) * MAX_TOKENS
    cost = None if price is None else (read * price[0] + written * price[1]) / 1e6
    return Estimate(len(prompts), read, written, cost)


def write_prompt(question: Question, answer: Answer, turn: int) -> tuple[str, str, str]:
    """Fill in FastChat's prompt for a turn.

    Returns:
        Name of the prompt, system message and user message.
    """
    has_reference = question["category"] in WITH_REFERENCE
    name = f"single-{'math-' if has_reference else ''}v1{'-multi-turn' if turn == 2 else ''}"
    template = next(each for each in read_data("judge_prompts.jsonl") if each["name"] == name)
    answers: list[str] = answer["choices"][0]["turns"]
    if turn == 1:
        values = {"question": question["turns"][0], "answer": answers[0]}
    else:
        values = {f"question_{i + 1}": text for i, text in enumerate(question["turns"])}
        values |= {f"answer_{i + 1}": text for i, text in enumerate(answers)}
    if has_reference:
        references = read_data("reference_answer_gpt4.jsonl")
        reference = next(each for each in references if each["question_id"] == question["question_id"])
        texts = reference["choices"][0]["turns"][:turn]
        values |= {f"ref_answer_{i + 1}": text for i, text in enumerate(texts)}
    return name, template["system_prompt"], template["prompt_template"].format(**values)


def read_rating(text: str) -> float:
    """Read the rating of a judgement; -1 if it has none."""
    for pattern in RATINGS:
        if match := pattern.search(text):
            return float(match[1])
    return -1.0


def add_up(questions: Sequence[Question], judgments: Sequence[Judgment], judge: Judge) -> dict[str, Any]:
    """Average judgements by category and turn; those without a rating are left out and counted."""
    category = {question["question_id"]: question["category"] for question in questions}
    rated = [judgment for judgment in judgments if judgment["score"] != -1]

    def mean(chosen: list[Judgment]) -> float | None:
        return sum(judgment["score"] for judgment in chosen) / len(chosen) if chosen else None

    def by_turn(chosen: list[Judgment]) -> dict[str, float | None]:
        turns = {f"turn_{turn}": mean([each for each in chosen if each["turn"] == turn]) for turn in (1, 2)}
        return turns | {"mean": mean(chosen)}

    days = [datetime.datetime.fromtimestamp(each["tstamp"], datetime.UTC).date() for each in judgments]
    prompts = json.dumps(read_data("judge_prompts.jsonl")).encode()
    counted = [each["usage"] or {} for each in judgments]
    return {
        "judge": {
            "model": judge.model,
            "server": judge.host,
            "first_day": min(days).isoformat(),
            "last_day": max(days).isoformat(),
            "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        },
        "model": judgments[0]["model"],
        "questions": len(questions),
        "without_rating": len(judgments) - len(rated),
        "read_tokens": sum(int(each.get("prompt_tokens") or 0) for each in counted),
        "written_tokens": sum(int(each.get("completion_tokens") or 0) for each in counted),
        "score": by_turn(rated),
        "categories": {
            name: by_turn([each for each in rated if category[each["question_id"]] == name])
            for name in TEMPERATURES
            if name in category.values()
        },
    }


def _retry_after(text: str | None) -> float:
    """Read the seconds of a Retry-After header; 0 if there are none, or a date stands there."""
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
