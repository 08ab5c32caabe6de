"""Changed records of every kind, written in every format."""

import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from faults import changing

Writer = Callable[[Path, list[dict[str, Any]], random.Random], Path]
"""Writes rows, some of them changed, into a folder."""

CALL = {"name": "add", "arguments": '{"a": 1}'}
QUESTION = {"message_id": "q", "parent_id": None, "role": "prompter", "text": "a"}
ANSWER = {"message_id": "a", "parent_id": "q", "role": "assistant", "text": "b", "rank": 0}
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "Count.", "input": "to 2", "output": "1 2"}] * 3,
    "prompt-completion": [{"prompt": "1 + 1 =", "completion": " 2"}] * 3,
    "messages": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3,
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3,
    "text": [{"text": "Once upon a time"}] * 3,
    "instruction": [{"instruction": "Count.", "context": "to 2", "response": "1 2"}] * 3,
    "question-answer": [{"question": "1 + 1?", "answer": "2"}] * 3,
    "query-response": [{"query": "1 + 1?", "response": "2"}] * 3,
    "calls": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
                {"role": "tool", "content": "3", "name": "add"},
                {"role": "assistant", "content": "b"},
            ],
            "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
        }
    ]
    * 3,
    "images": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>a"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ],
            "images": ["a.png"],
        }
    ]
    * 3,
    "oasst": [{"message_tree_id": "q", "prompt": QUESTION | {"replies": [QUESTION | ANSWER]}}] * 3,
    "pairs": [{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}] * 3,
    "oasst, one message a row": [QUESTION, QUESTION | ANSWER, QUESTION | {"message_id": "q2"}],
}


def _some(rows: list[dict[str, Any]], generator: random.Random) -> list[Any]:
    return [changing.mutate_value(row, generator) if generator.random() < 0.5 else row for row in rows]


def _jsonl(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
    path = folder / "rows.jsonl"
    if generator.random() < 0.5:
        path.write_bytes("\n".join(json.dumps(row) for row in _some(rows, generator)).encode())
    else:
        path.write_bytes(changing.mutate("\n".join(map(json.dumps, rows)).encode(), generator))
    return path


def _json(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
    path = folder / "rows.json"
    path.write_bytes(changing.mutate_json(json.dumps(rows).encode(), generator))
    return path


def _csv(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "rows.csv"
    path.write_bytes(changing.mutate(text.getvalue().encode(), generator))
    return path


def _parquet(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
    path = folder / "rows.parquet"
    changed = rows
    if generator.random() < 0.5:
        changed = [row if isinstance(row, dict) else {"text": row} for row in _some(rows, generator)]
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(changed), path)
    except Exception:  # arrow cannot hold such a table
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        changed = rows
    if changed is rows:
        path.write_bytes(changing.mutate(path.read_bytes(), generator))
    return path


def _compressed(suffix: str, compress: Callable[[bytes], bytes]) -> Writer:
    def write(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
        data = compress("\n".join(map(json.dumps, rows)).encode())
        path = folder / f"rows.jsonl{suffix}"
        path.write_bytes(changing.mutate(data, generator))
        return path

    return write


def _zst(data: bytes) -> bytes:
    written = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(written, "zstd") as file:
        file.write(data)
    return bytes(written.getvalue())


def _folder(folder: Path, rows: list[dict[str, Any]], generator: random.Random) -> Path:
    for number, row in enumerate(rows):
        (folder / f"{number}.txt").write_bytes(changing.mutate(json.dumps(row).encode(), generator))
    return folder


FORMS: dict[str, Writer] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl.gz": _compressed(".gz", gzip.compress),
    ".jsonl.xz": _compressed(".xz", lzma.compress),
    ".jsonl.zst": _compressed(".zst", _zst),
    "folder": _folder,
}
