"""Read training records from files, folders or the hub, and bring them into one of three forms.

The keys of the first record tell of which kind the records are; `lisatune.data.kinds` lists the kinds. They
leave as

    {"text": str}
    {"prompt": ..., "completion": ...}          both str, or both lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}

and conversations with functions also with `tools`. A question with its answer becomes prompt and completion
with one message each. Plain strings stay plain: no chat template is put around them. Every record is checked
while it is read, and an unusable one is reported with file and line.

Fields that carry meaning are honoured or refused by name, never dropped: a column `system` or `history`
becomes messages; calls of functions, their results and `tools` go through the chat template; an answer with
`weight: 0` or `train: false` stays in the conversation and carries no loss; separate reasoning, images and
labels of bad answers are refused. All other columns are named once.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lisatune.data.kinds import KINDS, Record, normalise, recognise_kind, rename_fields
from lisatune.data.oasst import plant_trees
from lisatune.data.sources import BadRowError, read_rows
from lisatune.data.turns import EMPTY, Messages, answer_text
from lisatune.recipe import unknown

__all__ = ["Record", "Records", "read_records", "split_records"]


@dataclass(frozen=True)
class Records:
    """Checked records in one of the three forms above."""

    rows: list[Record]
    kind: str
    """Form in which the records came, one of `lisatune.data.kinds.KINDS`."""
    skipped: int
    """Number of records left out under `on_bad_row="skip"`."""
    source: str
    """The file, folder or hub id that they were read from."""
    first_skipped: str = ""
    """Place of the first record that was left out, and what is wrong with it."""
    unused: tuple[str, ...] = ()
    """Fields that hold something and that nothing reads, in the order in which they were met."""


def read_records(
    source: str,
    *,
    kind: str = "auto",
    split: str = "train",
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    fields: Mapping[str, str] | None = None,
) -> Records:
    """Read and check records.

    Args:
        source: a .jsonl, .json, .csv or .parquet file (also .gz); a folder of .txt files, one record each; a
            hub id, also as `id:config`; `python-docs` or `python-docs:validation` (made by `python_docs`).
        kind: one of `lisatune.data.kinds.KINDS`; `auto` recognises it by the fields of the first record.
        split: split of a hub dataset.
        limit: stop after this many usable records.
        on_bad_row: raise at an unusable record (`error`), or leave it out and count it (`skip`).
        fields: the records' own names of fields, by the names that a kind needs: `{"question": "problem"}`.

    Returns:
        The records in one of three forms: `{"text": …}`, `{"prompt": …, "completion": …}` or
        `{"messages": […]}`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is nothing to read, every answer is empty, or a record is unusable; the message
            names file and line.
        ImportError: reading this source needs a package of lisatune[train] that is not installed.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "rows.jsonl"
        >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
        >>> records = read_records(str(file))
        >>> records.kind, records.rows
        ('prompt-completion', [{'prompt': '2 + 2 =', 'completion': ' 4'}])
    """
    if kind != "auto" and kind not in KINDS:
        raise ValueError(f"unknown kind of records {kind!r}; use auto, {', '.join(KINDS)}")
    known = sorted({name for each in KINDS.values() for name in (*each.needed, *each.optional)})
    for name in fields or {}:
        if name not in known:
            raise ValueError(f"data.fields: {unknown('field', name, known)}")
    rows: list[Record] = []
    skipped, first_skipped = 0, ""
    unused: dict[str, None] = {}
    for place, row in plant_trees(_rename(read_rows(source, split=split), fields or {})):
        try:
            if isinstance(row, BadRowError):
                raise row
            if kind == "auto":
                kind = recognise_kind(row)
            rows.append(normalise(row, kind))
            unused |= dict.fromkeys(
                name for name, value in row.items() if not KINDS[kind].reads(name) and value not in EMPTY
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
    _check_answers(rows, source)
    if unused:
        warnings.warn(
            f"{source}: nothing reads the field{'s' if len(unused) > 1 else ''} {', '.join(unused)}",
            stacklevel=2,
        )
    return Records(rows, kind, skipped, source, first_skipped, tuple(unused))


def _rename(rows: Iterator[tuple[str, Any]], names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        try:
            yield place, rename_fields(row, names)
        except BadRowError as problem:
            yield place, problem


def _check_answers(rows: list[Record], source: str) -> None:
    """Warn of empty answers, from which a model learns to say nothing; refuse records without any other."""
    answers = [answer for row in rows for answer in _take_answers(row)]
    num_empty = sum(not answer.strip() for answer in answers)
    if answers and num_empty == len(answers):
        raise ValueError(f"{source} has no answer to learn from: all {num_empty} answers are empty")
    if num_empty:
        warnings.warn(
            f"{source}: {num_empty:,} of {len(answers):,} answers are empty; the model learns to say nothing",
            stacklevel=3,
        )


def _take_answers(row: Record) -> list[str]:
    """Take the texts that carry loss; none of plain text, which is checked on its own."""
    if "text" in row or isinstance(row.get("completion"), str):
        return [row["completion"]] if "completion" in row else []
    turns = row["messages"][1:] if "messages" in row else row["completion"]
    return [
        answer_text(turn) for turn in turns if turn["role"] == "assistant" and turn.get("train") is not False
    ]


def split_records(
    records: Records, share: float, seed: int, *, most: int | None = None
) -> tuple[Records, Records]:
    """Hold out a share of the records by their prompts, so that no question is on both sides.

    Records with the same prompt up to case and spacing (for text: the same text) stay together. The different
    prompts are ranked by a hash of (seed, prompt), and the lowest `share` of them is held out. So the split
    does not depend on the order of the records.

    Args:
        records: the records to split.
        share: share of the different prompts to hold out, 0 < share < 1; their number is rounded, but at
            least one is held out and at least one stays.
        seed: names the split; the same seed gives the same split.
        most: hold out at most this many prompts, >= 1; None: no limit.

    Returns:
        The records to train on and the held-out records, each in the order given.

    Raises:
        ValueError: there are fewer than two different prompts.
    """
    keys = [_hash_prompt(row, seed) for row in records.rows]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise ValueError(
            f"{records.source} has 1 different prompt, and holding it out leaves nothing to train on; give "
            "validation data, or set data.validation_share to 0 to evaluate nothing"
        )
    wanted = min(round(share * len(ranked)), len(ranked) if most is None else most)
    num_held_out = min(max(wanted, 1), len(ranked) - 1)
    held_out = set(ranked[:num_held_out])
    train = [row for row, key in zip(records.rows, keys, strict=True) if key not in held_out]
    validation = [row for row, key in zip(records.rows, keys, strict=True) if key in held_out]
    return replace(records, rows=train), replace(records, rows=validation)


def _hash_prompt(row: Record, seed: int) -> bytes:
    prompt = (
        row["text"]
        if "text" in row
        else row["prompt"]
        if "prompt" in row
        else _take_question(row["messages"])
    )
    if not isinstance(prompt, str):
        prompt = "\0".join(f"{message['role']}\0{message['content']}" for message in prompt)
    return hashlib.blake2b(f"{seed}/{' '.join(prompt.split()).casefold()}".encode(), digest_size=16).digest()


def _take_question(messages: Messages) -> Messages:
    """Take the turns before the first answer."""
    return messages[: [message["role"] for message in messages].index("assistant", 1)]
