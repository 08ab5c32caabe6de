"""Rows are slices of documents, in memory or in a file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lisatune.data.examples import Examples, divide, pack
from lisatune.data.rows import Documents, Encoded, Rows, TokenFile, TokenRow
from lisatune.losses.causal_lm import IGNORE

Row = dict[str, list[int]]


@st.composite
def made_up(draw: st.DrawFn) -> list[Row]:
    """Rows of which any tokens but the first carry loss."""
    rows = []
    for ids in draw(
        st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=12), min_size=1, max_size=9)
    ):
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [token if learns else IGNORE for token, learns in zip(ids, learned, strict=True)]
        rows.append({"input_ids": ids, "labels": [IGNORE, *labels[1:]]})
    return rows


def lists(rows: Iterator[TokenRow] | Rows) -> list[Row]:
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


@settings(deadline=None)
@given(made_up())
def test_rows_come_back_as_they_were(rows: list[Row]) -> None:
    kept = Rows.of(rows)
    assert lists(kept) == rows
    assert lists(kept[1:]) == rows[1:]
    assert kept.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert kept.loss_counts.tolist() == [sum(label != IGNORE for label in row["labels"]) for row in rows]
    assert kept.highest == max(max(row["input_ids"]) for row in rows)
    assert kept[-1]["input_ids"].dtype == torch.int64


@settings(deadline=None)
@given(made_up(), st.booleans())
def test_rows_may_be_chosen(rows: list[Row], packs: bool) -> None:
    kept = pack(Examples(Rows.of(rows)), 12).rows if packs else Rows.of(rows)
    chosen = np.arange(len(kept))[::-2]
    assert lists(kept.take(chosen)) == [lists(kept)[index] for index in chosen.tolist()]
    assert kept.take(chosen).loss_counts.tolist() == kept.loss_counts[chosen].tolist()


@settings(deadline=None)
@given(made_up(), st.integers(1, 5), st.sampled_from(["split", "cut", "drop"]))
def test_dividing_is_slicing(rows: list[Row], max_length: int, long: str) -> None:
    """Pieces, counts and what is left out are those of a loop over lists."""
    pieces, lost = [], 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        starts = range(0, len(ids), max_length) if long == "split" else [0]
        if long == "drop" and len(ids) > max_length:
            starts = []
        own = [(ids[i : i + max_length], [IGNORE, *labels[i + 1 : i + max_length]]) for i in starts]
        used = [piece for piece in own if any(label != IGNORE for label in piece[1])]
        lost += len(ids) - sum(len(piece[0]) for piece in used)
        pieces += used
    documents = Rows.of(rows).documents
    if not pieces:
        is_learned = any(label != IGNORE for row in rows for label in row["labels"])
        is_dropped = long == "drop" and any(len(row["input_ids"]) > max_length for row in rows)
        named = "max_length" if is_learned or is_dropped else r"data\.loss_on"
        with pytest.raises(ValueError, match=named):
            divide(documents, np.arange(len(rows)), max_length=max_length, long=long, source="x")  # type: ignore[arg-type]
        return
    found = divide(documents, np.arange(len(rows)), max_length=max_length, long=long, source="x")  # type: ignore[arg-type]
    assert [(row["input_ids"], row["labels"]) for row in lists(found.rows)] == pieces
    assert found.num_lost_tokens == lost


def test_a_label_that_is_not_its_token_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2 has a label that is neither -100 nor the token there"):
        Rows.of([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [-100, 3]}])


def test_a_token_file_is_read_like_an_array_and_outlives_its_name(tmp_path: Path) -> None:
    tokens = np.arange(60_000, 60_100).astype(np.uint16)
    (tmp_path / "tokens.bin").write_bytes(tokens.tobytes())
    file = TokenFile(tmp_path / "tokens.bin", "uint16")
    (tmp_path / "tokens.bin").unlink()
    assert len(file) == 100
    assert file[7:93].tolist() == tokens[7:93].tolist()
    assert file[90:200].tolist() == tokens[90:].tolist()


def test_equal_documents_have_equal_hashes_and_others_do_not() -> None:
    ids, lengths = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3], np.uint32), np.array([3, 3, 3])
    documents = Documents.gather([Encoded(ids, lengths, np.array([[1, 3], [4, 6], [7, 8]]))])
    first, second, other = documents.digests.tolist()
    assert first == second != other
