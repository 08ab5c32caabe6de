"""The records of a recipe as they are read: to train on, and held out."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lisatune.console import plural
from lisatune.data.mixture import divide_limit, hold_out_of_each
from lisatune.data.pairs import PairReader
from lisatune.data.records import Record, RecordReader, Records
from lisatune.data.splitting import hash_prompt
from lisatune.recipe import Recipe, SourceConfig

__all__ = [
    "held_out_source",
    "open_reader",
    "open_readers",
    "read_data",
    "read_marked",
    "warn_of_seen_records",
]

NAMED_RECORDS = 3
"""Records that a warning names."""


def read_data(recipe: Recipe) -> tuple[list[Iterator[Record]], Records]:
    """Read the records to train on, one by one, source by source, and the held-out ones.

    The iterators must be read in their order. Errors as in `prepare_data`.
    """
    data = recipe.data
    if data.streaming:
        raise ValueError(
            "data.streaming reads records while a run trains, and here all are needed; set it to false"
        )
    readers, held_out_reader = open_readers(recipe)
    none = Records([], readers[0].kind, 0, data.train_name)
    if not data.holds_out:
        return [_read_all(reader) for reader in readers], none
    if held_out_reader is not None:
        held_out = list(_read_all(held_out_reader))
        return [_read_all(reader) for reader in readers], replace(
            none, rows=held_out, source=held_out_reader.source
        )
    keys = [
        np.array([hash_prompt(record, recipe.run.seed) for record in _read_all(reader)], dtype="S16")
        for reader in readers
    ]
    limits = divide_limit(data.validation_limit, data.sources, [len(each) for each in keys])
    is_held_out = hold_out_of_each(keys, [reader.source for reader in readers], data.validation_share, limits)
    held_out = [
        record
        for reader, is_out, most in zip(readers, is_held_out, limits, strict=True)
        for record in islice(read_marked(reader, is_out), most)
    ]
    train = [read_marked(reader, ~is_out) for reader, is_out in zip(readers, is_held_out, strict=True)]
    return train, replace(none, rows=held_out)


def open_readers(recipe: Recipe) -> tuple[list[RecordReader], RecordReader | None]:
    """Return the records to train on, and those of `data.validation`; the latter None if they are a share."""
    train = [open_reader(recipe, source, recipe.data.on_bad_row) for source in recipe.data.sources]
    held_out = held_out_source(recipe)
    return train, None if held_out is None else open_reader(recipe, held_out, recipe.data.on_bad_row)


def held_out_source(recipe: Recipe) -> SourceConfig | None:
    """Return the source of `data.validation`; None if held-out data is a share of the training data."""
    data = recipe.data
    path = data.validation
    if path is None and data.train == "python-docs" and data.holds_out:
        path = "python-docs:validation"
    if path is None:
        return None
    how: dict[str, Any] = {key: getattr(data, key) for key in ("kind", "split", "fields", "text_only")}
    return SourceConfig(path=path, limit=data.validation_limit, **how)


def open_reader(recipe: Recipe, source: SourceConfig, on_bad_row: Literal["error", "skip"]) -> RecordReader:
    """Return the records of a source; pairs of answers if the recipe's loss needs them."""
    how: dict[str, Any] = {key: getattr(source, key) for key in ("split", "limit", "fields", "text_only")}
    if recipe.loss.rows_per_record == 2:
        scores = recipe.loss.has_score
        return PairReader(source.path, needs_prompt=not scores, on_bad_row=on_bad_row, **how)
    how["needs_answer"] = recipe.data.needs_answers
    return RecordReader(source.path, kind=source.kind or "auto", on_bad_row=on_bad_row, **how)


def _read_all(reader: RecordReader) -> Iterator[Record]:
    """Read all records, then give the reader's warnings."""
    for _, record in reader:
        yield record
    reader.warn()


def read_marked(reader: RecordReader, is_wanted: NDArray[np.bool_]) -> Iterator[Record]:
    """Read the records that are marked, in their order."""
    return (record for (_, record), wanted in zip(reader, is_wanted.tolist(), strict=True) if wanted)


def warn_of_seen_records(reader: RecordReader, is_seen: NDArray[np.bool_], held_out: str) -> None:
    """Warn of training records that are in the held-out data too, and name the first ones."""
    count = int(is_seen.sum())
    if not count:
        return
    marked = zip(reader, is_seen.tolist(), strict=True)
    places = islice((place for (place, _), is_one in marked if is_one), NAMED_RECORDS)
    more = ", …" if count > NAMED_RECORDS else ""
    warnings.warn(
        f"{plural(count, 'training record')} {'is' if count == 1 else 'are'} in the held-out data {held_out} "
        f"too, so held-out loss is partly loss on training data: {', '.join(places)}{more}; take them out",
        stacklevel=3,
    )
