"""Prepared sources on disk: every source is tokenised once, and later runs read its file of tokens.

Files of an entry of the cache, for D records, N tokens and S spans:

    tokens.bin          token ids, uint16, or uint32 if the vocabulary has more than 65,536: [N]
    offsets.bin         where each record begins, and the end of the last, int64 [D + 1]
    spans.bin           begin and end of what carries loss, in positions of tokens.bin, int64 [S, 2]
    digests.bin         hash of each record, 16 bytes: [D]
    prompts-SEED.bin    hash of each prompt under a seed, 16 bytes: [D]; made when it is first asked for
    meta.json           what the entry was made from, counts, warnings

Records are kept at their whole length: `data.max_length`, `data.long`, packing and the split cost little and
are made anew for each run. A source is read twice when it is prepared. The first time, every record is
checked, so that a bad one stops a run within seconds; then the records are tokenised, in the tokenizer's own
threads. Memory holds one batch of records, and 40 bytes for each record.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisatune.console import follow
from lisatune.data.cache import collect_facts, explain_cache_errors, name_entry, read_meta, work_alone
from lisatune.data.records import Record, RecordReader
from lisatune.data.rows import Documents, Encoded, TokenFile
from lisatune.data.splitting import hash_prompt
from lisatune.data.tokens import LossOn, check_wishes, encode, is_chat
from lisatune.files.disk import write_aside

__all__ = ["Prepared", "prepare_source"]


@dataclass(frozen=True)
class Prepared:
    """A source in tokens."""

    documents: Documents
    """`texts_per_record` for each usable record, in their order."""
    texts_per_record: int
    """2 for pairs of answers: the chosen one with its prompt, then the rejected one."""
    kind: str
    """Form in which the records came."""
    skipped: int
    """Number of records that cannot be used."""
    num_media: int
    """Number of records whose images, sound or videos were left out."""
    is_chat: bool
    """Whether the first record is a conversation."""
    prompts: NDArray[np.bytes_] | None
    """Hash of each record's prompt under the seed that was asked for, 16 bytes."""

    @property
    def num_records(self) -> int:
        """Number of usable records."""
        return len(self.documents) // self.texts_per_record

    @property
    def digests(self) -> NDArray[np.bytes_]:
        """Hash of each record; equal records have equal hashes."""
        digests = np.ascontiguousarray(self.documents.digests)
        return digests.view(f"S{16 * self.texts_per_record}")


def prepare_source(
    reader: RecordReader,
    tokenizer: Any,
    *,
    folder: Path,
    loss_on: LossOn = "auto",
    date: str | None = None,
    seed: int | None = None,
) -> Prepared:
    """Take a source's tokens from the cache, or make them and put them there.

    Args:
        reader: the source.
        tokenizer: the tokenizer of the model to train.
        folder: the cache, from `tokens_folder`.
        loss_on, date: as for `lisatune.data.tokens.tokenize`.
        seed: of the hashes of prompts; None: they are not needed.

    Raises:
        ValueError, FileNotFoundError, ImportError: as in `read_records` and `tokenize`.
        OSError: the cache cannot be written.
    """
    facts = collect_facts(reader, tokenizer, loss_on, date)
    entry = folder / name_entry(facts)
    meta = read_meta(entry)
    if meta is None:
        with explain_cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with work_alone(entry, reader.source):
            meta = read_meta(entry)
            if meta is None:
                meta = _make_entry(entry, facts, reader, tokenizer, loss_on, date, seed)
    # The entry may be made from the same records under another name.
    for text in meta["warnings"]:
        warnings.warn(text.replace(meta["source"], reader.source), stacklevel=3)
    if meta["skipped"] and reader.on_bad_row == "error":
        problem = meta["first_skipped"].replace(meta["source"], reader.source)
        raise ValueError(f"{problem}; fix it, or set data.on_bad_row=skip")
    with suppress(OSError):
        os.utime(entry / "meta.json")  # when it was last used
    documents = Documents(
        TokenFile(entry / "tokens.bin", meta["dtype"]),
        np.fromfile(entry / "offsets.bin", np.int64),
        np.fromfile(entry / "spans.bin", np.int64).reshape(-1, 2),
        np.fromfile(entry / "digests.bin", "S16"),
    )
    prompts = None
    if seed is not None:
        file = entry / f"prompts-{seed}.bin"
        if not file.exists():
            _add_prompts(file, reader, seed)
        prompts = np.fromfile(file, "S16")
    return Prepared(
        documents=documents,
        texts_per_record=reader.texts_per_record,
        kind=meta["kind"],
        skipped=meta["skipped"],
        num_media=meta["num_media"],
        is_chat=meta["is_chat"],
        prompts=prompts,
    )


def _make_entry(
    entry: Path,
    facts: dict[str, Any],
    reader: RecordReader,
    tokenizer: Any,
    loss_on: LossOn,
    date: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """Read and check all records, then tokenise them into a new entry; return what it says of itself."""
    first: Record | None = None
    prompts = bytearray()
    count = 0
    with follow(f"reading {reader.source}", share=reader.meter.share) as advance:
        for _, record in reader:
            first = first or record
            count += 1
            if seed is not None:
                prompts += hash_prompt(record, seed)
            advance(count)
    assert first is not None  # the reader refuses a source without records
    check_wishes(reader.source, reader.kind, loss_on, "auto")
    with (
        _keeping_warnings() as caught,
        explain_cache_errors(entry.parent),
        write_aside(entry) as aside,
        follow(f"tokenising {reader.source}", count * reader.texts_per_record) as advance,
    ):
        reader.warn()
        texts = (text for _, record in reader for text in reader.texts(record))
        how: dict[str, Any] = {"loss_on": loss_on, "date": date, "texts_per_record": reader.texts_per_record}
        encoded = encode(texts, tokenizer, source=reader.source, **how)
        dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
        num_tokens = _write(aside, encoded, dtype, advance)
        if seed is not None:
            (aside / f"prompts-{seed}.bin").write_bytes(prompts)
        meta = {
            "source": reader.source,
            "kind": reader.kind,
            "skipped": reader.skipped,
            "first_skipped": reader.first_skipped,
            "num_media": reader.num_media,
            "is_chat": is_chat(first),
            "dtype": dtype,
            "records": count,
            "tokens": num_tokens,
            "warnings": _take_texts(caught),
            "sizes": {path.name: path.stat().st_size for path in aside.iterdir()},
            "made_from": facts,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def _write(folder: Path, parts: Iterable[Encoded], dtype: str, advance: Callable[[int], None]) -> int:
    """Write encoded records into the files of an entry; return the number of their tokens."""
    num_tokens, offsets = 0, [np.zeros(1, np.int64)]
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "spans.bin").open("wb") as spans,
        (folder / "digests.bin").open("wb") as digests,
    ):
        done = 0
        for part in parts:
            tokens.write(part.ids.astype(dtype).tobytes())
            spans.write((part.spans + num_tokens).tobytes())
            digests.write(part.digests.tobytes())
            offsets.append(num_tokens + np.cumsum(part.lengths))
            num_tokens += len(part.ids)
            done += len(part.lengths)
            advance(done)
    (folder / "offsets.bin").write_bytes(np.concatenate(offsets).tobytes())
    return num_tokens


def _add_prompts(file: Path, reader: RecordReader, seed: int) -> None:
    """Hash the prompts of an entry under another seed."""
    with follow(f"reading {reader.source}", share=reader.meter.share) as advance:
        prompts = bytearray()
        for count, (_, record) in enumerate(reader, 1):
            prompts += hash_prompt(record, seed)
            advance(count)
    with explain_cache_errors(file.parent.parent):
        aside = file.with_name(f".{file.name}.tmp-{os.getpid()}")
        try:
            aside.write_bytes(prompts)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def _keeping_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Keep back warnings; those that are still in the list at the end are given then."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        for each in caught:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _take_texts(caught: list[warnings.WarningMessage]) -> list[str]:
    """Take the warnings for users out of the list, and return their texts, each once."""
    texts = [str(each.message) for each in caught if each.category is UserWarning]
    caught[:] = [each for each in caught if each.category is not UserWarning]
    return list(dict.fromkeys(texts))
