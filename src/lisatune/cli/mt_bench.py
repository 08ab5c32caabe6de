"""MT-Bench by `lisatune evaluate --mt-bench`: what it prints, and the options of the judge."""

import json as json_text
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lisatune.cli.loading import LoadOptions
from lisatune.console import grid, plural, print_line, terminal, time_left

__all__ = ["answer", "judge"]

SECONDS_BETWEEN_LINES = 10
"""Seconds between two lines on how far it is."""


def answer(
    name: str,
    run: Path | None,
    output: Path,
    options: LoadOptions,
    *,
    limit: int | None,
    max_new_tokens: int,
) -> int:
    """Write a model's answers to MT-Bench's questions."""
    from lisatune.evaluate.mt_bench import FOLDER, answer_questions, load_questions
    from lisatune.evaluate.scores import identify
    from lisatune.runs.folder import first_day

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be >= 1, got {max_new_tokens}")
    options.check(name)
    model, tokenizer = options.load(name)
    questions = load_questions(limit)
    answers = answer_questions(
        model,
        tokenizer,
        output,
        questions,
        identity=identify(name),
        max_new_tokens=max_new_tokens,
        date=None if run is None else first_day(run),
        advance=_Lines("questions"),
    )
    terminal().print(
        f"{plural(len(answers), 'question')} answered: {output / FOLDER}", soft_wrap=True, markup=False
    )
    return 0


def judge(
    output: Path,
    url: str | None,
    model: str | None,
    *,
    price: str | None,
    timeout: float,
    limit: int | None,
    json: bool,
) -> int:
    """Let another model judge the answers in a folder, and print the scores."""
    from lisatune.evaluate.judge import Estimate, Judge, find_key, judge_answers
    from lisatune.evaluate.mt_bench import load_questions

    if not url or not model:
        raise ValueError("--mt-bench judge asks a server; give --judge-url and --judge-model")
    prices = _parse_price(price)
    judge = Judge(url, model, timeout=timeout)
    judge = replace(judge, key=find_key(url))  # whose URL is one

    def begin(estimate: Estimate) -> None:
        if json or not estimate.requests:
            return
        cost = "" if estimate.cost is None else f", at most {estimate.cost:.2f} by --judge-price"
        terminal().print(
            f"{model} at {judge.host} will judge {plural(estimate.requests, 'answer')}: about "
            f"{estimate.read_tokens:,} tokens to read, at most {estimate.written_tokens:,} to write{cost}",
            soft_wrap=True,
            markup=False,
        )

    advance = (lambda done, of: None) if json else _Lines("judgements")
    scores = judge_answers(output, load_questions(limit), judge, price=prices, begin=begin, advance=advance)
    if json:
        print_line(json_text.dumps(scores))
    else:
        _print_scores(scores)
    return 0


def _parse_price(text: str | None) -> tuple[float, float] | None:
    """Read --judge-price."""
    if text is None:
        return None
    try:
        read, written = (float(each) for each in text.split(","))
    except ValueError:
        read = written = -1.0
    if read < 0 or written < 0:
        raise ValueError(
            f"--judge-price must be two numbers such as 2.50,10 per million tokens, got {text!r}"
        )
    return read, written


class _Lines:
    """Says how far something is, at most every few seconds, with the time that is left."""

    def __init__(self, what: str) -> None:
        self._what, self._first = what, -1
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._first, self._began = done, now
        if done > self._first and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            rest = time_left(now - self._began, (done - self._first) / (of - self._first))
            terminal().print(f"    {done} of {of} {self._what}, {rest}")


def _print_scores(scores: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("category")
    for name in ("turn 1", "turn 2", "mean"):
        table.add_column(name, justify="right")
    for name, row in (scores["categories"] | {"all": scores["score"]}).items():
        figures = (row["turn_1"], row["turn_2"], row["mean"])
        table.add_row(name, *("–" if each is None else f"{each:.2f}" for each in figures))
    judge = scores["judge"]
    days = " to ".join(dict.fromkeys((judge["first_day"], judge["last_day"])))
    console = terminal()
    console.print(table)
    rows = [
        ("scores", f"1 to 10, {plural(scores['questions'], 'question')} of two turns"),
        ("judge", f"{judge['model']} at {judge['server']}, {days}"),
    ]
    if scores["without_rating"]:
        rows.append(("left out", f"{plural(scores['without_rating'], 'judgement')} without a rating"))
    if scores["read_tokens"]:
        rows.append(("tokens", f"{scores['read_tokens']:,} read, {scores['written_tokens']:,} written"))
    console.print(grid(rows))
