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
labels of bad answers are refused. `text_only` leaves images, sound and videos out instead. All other columns
are named once.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lisatune.console import follow
from lisatune.data.kinds import KINDS, Record, check_names, normalise, recognise_kind, rename_rows
from lisatune.data.media import take_text
from lisatune.data.oasst import plant_trees
from lisatune.data.sources import BadRowError, Meter, read_rows
from lisatune.data.turns import EMPTY, answer_text

__all__ = ["Record", "RecordReader", "Records", "count_characters", "read_records"]


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
    num_media: int = 0
    """Number of records whose images, sound or videos were left out under `text_only`."""


def read_records(
    source: str,
    *,
    kind: str = "auto",
    split: str = "train",
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    fields: Mapping[str, str] | None = None,
    text_only: bool = False,
    needs_answer: bool = True,
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
        text_only: leave images, sound and videos out of records, and keep their text.
        needs_answer: whether a conversation without an answer to learn from is unusable.

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
    how: dict[str, Any] = {"kind": kind, "split": split, "limit": limit, "fields": fields}
    how |= {"text_only": text_only, "needs_answer": needs_answer}
    reader = RecordReader(source, on_bad_row=on_bad_row, **how)
    rows = [record for _, record in reader]
    reader.warn()
    return Records(
        rows,
        reader.kind,
        reader.skipped,
        source,
        reader.first_skipped,
        tuple(reader.unused),
        reader.num_media,
    )


class RecordReader:
    """Records that are read and checked one after the other, so that a source may be larger than memory.

    Every iteration reads the source from its start and yields each record with its place. The attributes
    are known once an iteration has reached the end. Arguments and errors are those of `read_records`; `rows`
    reads the rows of a source with a split.
    """

    texts_per_record = 1
    """2 for pairs of answers."""

    def __init__(
        self,
        source: str,
        *,
        kind: str = "auto",
        split: str = "train",
        limit: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        fields: Mapping[str, str] | None = None,
        text_only: bool = False,
        needs_answer: bool = True,
        rows: Callable[..., Iterator[tuple[str, Any]]] = read_rows,
    ) -> None:
        if kind != "auto" and kind not in KINDS:
            raise ValueError(f"unknown kind of records {kind!r}; use auto, {', '.join(KINDS)}")
        needed = (name for each in KINDS.values() for name in (*each.needed, *each.optional))
        self.fields = check_names(fields, needed)
        self.source, self.split, self.limit, self.on_bad_row = source, split, limit, on_bad_row
        self.asked_kind = self.kind = kind
        self.text_only, self.needs_answer = text_only, needs_answer
        self._rows = rows
        self.meter = Meter()
        self.skipped, self.first_skipped = 0, ""
        self.unused: dict[str, None] = {}
        """Fields that hold something and that nothing reads, in the order in which they were met."""
        self.num_answers = self.num_empty = self.num_media = 0

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        self.kind, self.skipped, self.first_skipped, self.unused = self.asked_kind, 0, "", {}
        self.num_answers = self.num_empty = self.num_media = num_records = 0
        rows = self._rows(self.source, split=self.split, meter=self.meter)
        for place, row in plant_trees(rename_rows(rows, self.fields)):
            try:
                if isinstance(row, BadRowError):
                    raise row
                row, has_media = take_text(row) if self.text_only else (row, False)
                record = self._normalise(row)
                self.unused |= dict.fromkeys(
                    name for name, value in row.items() if not self._reads(name) and value not in EMPTY
                )
            except BadRowError as problem:
                if self.on_bad_row == "error":
                    raise ValueError(f"{place}: {problem}; fix it, or set data.on_bad_row=skip") from None
                self.skipped += 1
                self.first_skipped = self.first_skipped or f"{place}: {problem}"
                continue
            answers = _take_answers(record)
            self.num_answers += len(answers)
            self.num_empty += sum(not answer.strip() for answer in answers)
            num_records += 1
            self.num_media += has_media
            yield place, record
            if num_records == self.limit:
                break
        if not num_records and self.skipped:
            raise ValueError(
                f"{self.source} has no usable record among {self.skipped}; the first: {self.first_skipped}"
            )
        if not num_records:
            raise ValueError(f"{self.source} is empty: it has no records")
        if self.num_answers and self.num_empty == self.num_answers:
            raise ValueError(
                f"{self.source} has no answer to learn from: all {self.num_empty} answers are empty"
            )

    def _normalise(self, row: Any) -> Record:
        """Bring a row into its form."""
        if self.kind == "auto":
            self.kind = recognise_kind(row)
        return normalise(row, self.kind, needs_answer=self.needs_answer)

    def _reads(self, name: str) -> bool:
        """Whether anything of a field is used."""
        return KINDS[self.kind].reads(name)

    @property
    def facts(self) -> list[Any]:
        """What the records depend on besides the content of the source, as JSON values."""
        return [self.asked_kind, self.split, self.limit, sorted(self.fields.items()), self.text_only]

    def texts(self, record: Record) -> tuple[Record, ...]:
        """Return the `texts_per_record` records of one text each that are tokenised of a record."""
        return (record,)

    def read_through(self) -> int:
        """Read and check all records, give the warnings, and return the number of records."""
        count = 0
        with follow(f"reading {self.source}", share=self.meter.share) as advance:
            for count, _ in enumerate(self, 1):
                advance(count)
        self.warn()
        return count

    def warn(self) -> None:
        """Give the warnings of `notes`."""
        for note in self.notes:
            warnings.warn(note, stacklevel=3)

    @property
    def notes(self) -> list[str]:
        """Warnings of empty answers, from which a model learns nothing, and of fields that nothing reads.

        They are about the records of the last iteration.
        """
        notes = []
        if self.num_empty:
            notes.append(
                f"{self.source}: {self.num_empty:,} of {self.num_answers:,} answers are empty; the model "
                "learns to say nothing"
            )
        if self.unused:
            notes.append(
                f"{self.source}: nothing reads the field{'s' if len(self.unused) > 1 else ''} "
                f"{', '.join(self.unused)}"
            )
        return notes


def _take_answers(row: Record) -> list[str]:
    """Take the texts that carry loss; none of plain text, which is checked on its own."""
    if "text" in row or isinstance(row.get("completion"), str):
        return [row["completion"]] if "completion" in row else []
    turns = row["messages"][1:] if "messages" in row else row["completion"]
    return [
        answer_text(turn) for turn in turns if turn["role"] == "assistant" and turn.get("train") is not False
    ]


def count_characters(value: Any) -> int:
    """Count the characters of all texts in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(count_characters, value.values()))
    return sum(map(count_characters, value)) if isinstance(value, Sequence) else 0
