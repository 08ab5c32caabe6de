"""The records of a recipe as they are read: to train on, and held out."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisatune.console import plural
from lisatune.data.mixture import divide_limit, hold_out_of_each
from lisatune.data.records import Record, RecordReader, Records
from lisatune.data.splitting import hash_prompt
from lisatune.recipe import Recipe

__all__ = ["open_readers", "read_data", "read_marked", "warn_of_seen_records"]

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
    data = recipe.data
    held_out = data.validation
    if held_out is None and data.train == "python-docs" and data.holds_out:
        held_out = "python-docs:validation"
    keys = ("kind", "split", "limit", "fields", "text_only")
    common: dict[str, Any] = {"on_bad_row": data.on_bad_row, "needs_answer": data.needs_answers}
    train = [
        RecordReader(source.path, **common, **{key: getattr(source, key) for key in keys})
        for source in data.sources
    ]
    if held_out is None:
        return train, None
    how: dict[str, Any] = {key: getattr(data, key) for key in ("kind", "split", "fields", "text_only")}
    return train, RecordReader(held_out, limit=data.validation_limit, **common, **how)


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
