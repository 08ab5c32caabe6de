"""Pairs of answers to one prompt, of which people prefer one: records and tokens.

A record has `chosen` and `rejected`, and the prompt in one of three ways:

    prompt, chosen, rejected: text                      plain text, without a chat template
    prompt: text or messages; chosen, rejected: the answers, as messages or text
    chosen, rejected: whole conversations as messages   the prompt is what both begin with
    chosen, rejected: text                              for a loss that scores whole texts: no prompt

It leaves as a record of prompt and completion, which is the chosen answer, with `rejected` beside them:

    {"prompt": ..., "completion": ..., "rejected": ...}      all str, or all lists of messages

So whatever reads prompts and completions reads these too.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lisatune.data.examples import Examples
from lisatune.data.kinds import REFUSED, check_names, rename_rows
from lisatune.data.media import take_text
from lisatune.data.records import Record, Records
from lisatune.data.rows import Rows
from lisatune.data.sources import BadRowError, read_rows
from lisatune.data.tokens import tokenize
from lisatune.data.turns import EMPTY, Messages, check_messages, check_text, require_answer
from lisatune.losses.causal_lm import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_pairs", "tokenize_pairs"]

Row: TypeAlias = dict[str, list[int]]
"""`input_ids` and `labels` of one answer after its prompt."""

USED = ("prompt", "chosen", "rejected", "system")
"""Fields that are read."""


def read_pairs(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    fields: Mapping[str, str] | None = None,
    text_only: bool = False,
    needs_prompt: bool = True,
) -> Records:
    """Read and check pairs of answers.

    Args:
        source, split, limit, on_bad_row, fields, text_only: as for `read_records`.
        needs_prompt: whether it must be known where answers of plain text begin.

    Returns:
        Records of the kind "pairs": prompt, completion (the chosen answer) and rejected.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is nothing to read, or a record is unusable; the message names file and line.
        ImportError: reading this source needs a package of lisatune[train] that is not installed.
    """
    rows: list[Record] = []
    skipped, first_skipped, num_media = 0, "", 0
    unused: dict[str, None] = {}
    names = check_names(fields, USED)
    for place, row in rename_rows(read_rows(source, split=split), names):
        try:
            if isinstance(row, BadRowError):
                raise row
            row, has_media = take_text(row) if text_only else (row, False)
            rows.append(_read_pair(row, needs_prompt))
            num_media += has_media
            unused |= dict.fromkeys(
                key for key, value in row.items() if key not in USED and value not in EMPTY
            )
        except BadRowError as problem:
            if on_bad_row == "error":
                raise ValueError(f"{place}: {problem}; fix it, or set data.on_bad_row=skip") from None
            skipped, first_skipped = skipped + 1, first_skipped or f"{place}: {problem}"
        if limit is not None and len(rows) >= limit:
            break
    if not rows and skipped:
        raise ValueError(f"{source} has no usable record, all {skipped} were skipped; first: {first_skipped}")
    if not rows:
        raise ValueError(f"{source} is empty: it has no records")
    if unused:
        warnings.warn(
            f"{source}: nothing reads the field{'s' if len(unused) > 1 else ''} {', '.join(unused)}",
            stacklevel=2,
        )
    return Records(rows, "pairs", skipped, source, first_skipped, tuple(unused), num_media)


def _read_pair(row: Any, needs_prompt: bool) -> Record:
    if not isinstance(row, dict):
        raise BadRowError("a record must be an object with the fields prompt, chosen and rejected")
    for field, holds in REFUSED.items():
        if field not in USED and row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds {holds}")
    for field in ("tools", "functions"):
        if row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds tools, which pairs of answers cannot be trained with yet")
    for field in ("chosen", "rejected"):
        if row.get(field) in EMPTY:
            raise BadRowError(
                f"the field {field!r} is missing or empty; a pair has chosen and rejected; the fields are: "
                f"{', '.join(map(str, row)) or 'none'}"
            )
    system = row.get("system") or ""
    before = [{"role": "system", "content": check_text(system, "system")}] if system else []
    prompt, chosen, rejected = (row.get(field) for field in USED[:3])
    if prompt in EMPTY and isinstance(chosen, str) and needs_prompt:
        raise BadRowError("the field 'prompt' is missing or empty, so it is unknown where the answers begin")
    if any(isinstance(part, list) for part in (prompt, chosen, rejected)):
        prompt, chosen, rejected = _read_messages(prompt, chosen, rejected)
        if before and prompt[0]["role"] == "system":
            raise BadRowError("'system' and the first message are both a system message; keep one")
        prompt = before + prompt
    elif before:
        raise BadRowError(
            "'system' cannot stand before plain text; write it into the prompt, or use messages"
        )
    else:
        prompt = prompt if prompt not in EMPTY else ""
        texts = zip(USED, (prompt, chosen, rejected), strict=False)
        prompt, chosen, rejected = (check_text(text, field) for field, text in texts)
    if chosen == rejected:
        raise BadRowError("'chosen' and 'rejected' are equal, so there is no preference to learn")
    return {"prompt": prompt, "completion": chosen, "rejected": rejected}


def _read_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Bring prompt and answers into lists of messages; what both conversations begin with is the prompt."""
    sides = []
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        messages = check_messages(answer, field)
        if messages[-1]["role"] != "assistant":
            raise BadRowError(f"the last message of {field!r} must be the assistant's answer")
        sides.append(require_answer(messages))
    first, second = sides
    common = 0
    while common < min(len(first), len(second)) - 1 and first[common] == second[common]:
        common += 1
    asked = prompt
    if isinstance(prompt, str) and prompt:
        asked = [{"role": "user", "content": check_text(prompt, "prompt")}]
    if asked not in EMPTY:
        asked = check_messages(asked, "prompt")
    if first[0]["role"] == "assistant" and asked not in EMPTY:  # only the answers
        return asked, first, second
    if common == 0 or not first[common]["role"] == second[common]["role"] == "assistant":
        raise BadRowError(
            "'chosen' and 'rejected' have no common prompt: they must begin with the same messages up to an "
            "answer; or give 'prompt', and the answers alone"
        )
    if asked not in EMPTY and asked[-1]["content"] not in [each["content"] for each in first[:common]]:
        raise BadRowError("'prompt' is not part of the conversations in 'chosen' and 'rejected'; keep one")
    return first[:common], first[common:], second[common:]


def tokenize_pairs(
    records: Records,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    long: Literal["auto", "cut", "drop"] = "auto",
    date: str | None = None,
) -> Examples:
    """Turn pairs into token ids and labels: two rows for each pair, first the chosen one.

    Args:
        records: from `read_pairs`.
        tokenizer: as for `lisatune.data.tokens.tokenize`.
        max_length: length of the longest sequence in tokens.
        long: what happens to a pair with a longer answer. `cut`: the end of the answer is cut off, and a pair
            that is equal then is left out. `drop`: the pair is left out. `auto`: `cut`.
        date: as for `tokenize`.

    Returns:
        Rows of `input_ids` and `labels` (-100 on the prompt): chosen, rejected, chosen, … All counts are of
        pairs.

    Raises:
        ValueError: as in `tokenize`; or a prompt alone fills `max_length`.
    """
    whole: dict[str, Any] = {"max_length": 2**31 - 1, "long": "cut", "date": date}
    other = [row | {"completion": row["rejected"]} for row in records.rows]
    chosen = tokenize(records, tokenizer, **whole).rows
    rejected = tokenize(replace(records, rows=other), tokenizer, **whole).rows
    rows: list[Row] = []
    num_cut = num_equal = num_dropped = num_lost = 0
    for number, both in enumerate(zip(chosen, rejected, strict=True), 1):
        pair = [{name: values.tolist() for name, values in row.items()} for row in both]
        pieces = [_cut(row, max_length) for row in pair]
        lost = sum(len(row["input_ids"]) for row in pair)
        if pieces != pair and long == "drop":
            num_dropped, num_lost = num_dropped + 1, num_lost + lost
            continue
        for row, piece in zip(pair, pieces, strict=True):
            if all(label == IGNORE for label in piece["labels"]):
                prompt = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
                raise ValueError(
                    f"{records.source}, record {number}: the prompt has {prompt} tokens, so data.max_length="
                    f"{max_length} leaves nothing of the answers; raise it, or set data.long: drop to leave "
                    "such records out"
                )
        if pieces[0] == pieces[1]:
            num_equal, num_lost = num_equal + 1, num_lost + lost
            continue
        num_cut += pieces != pair
        num_lost += lost - sum(len(piece["input_ids"]) for piece in pieces)
        rows += pieces
    if not rows:
        raise ValueError(
            f"{records.source}: no pair is left after data.max_length={max_length}: {num_dropped} are longer "
            f"and {num_equal} are equal up to there; raise it"
        )
    return Examples(
        Rows.of(rows),
        num_cut=num_cut,
        num_without_loss=num_equal,
        num_dropped=num_dropped,
        num_lost_tokens=num_lost,
    )


def _cut(row: Row, max_length: int) -> Row:
    return {name: values[:max_length] for name, values in row.items()}
