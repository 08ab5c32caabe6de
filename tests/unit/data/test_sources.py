import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lisatune.data.sources import BadRowError, Meter, read_rows
from lisatune.files.hub import UNREACHABLE

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n"

ROWS = [{"text": "first\nline"}, {"text": "zweite Zeile: äöü"}, {"text": '😀 third, "quoted"'}]


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, mtime=0),
    ".xz": lzma.compress,
    ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    plain = path.with_suffix("") if path.suffix in PACK else path
    if plain.suffix == ".jsonl":
        plain.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1), "utf-8")
    elif plain.suffix == ".csv":
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(plain)
    if path != plain:
        path.write_bytes(PACK[path.suffix](plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet", "JSONL"])
@pytest.mark.parametrize("packed", ["", *PACK])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, extension: str, packed: str) -> None:
    path = write(tmp_path, f"data.{extension.lower()}{packed}", ROWS)
    path = path.rename(tmp_path / f"data.{extension}{packed}")
    assert [row for _, row in read_rows(str(path))] == ROWS


@pytest.mark.parametrize("sign", [";", "\t"])
def test_a_csv_file_may_be_divided_by_other_signs(tmp_path: Path, sign: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f'\ufeffprompt{sign}completion\n"a{sign} b"{sign}c, d\n', "utf-8")
    assert [row for _, row in read_rows(str(path))] == [{"prompt": f"a{sign} b", "completion": "c, d"}]


def test_a_json_file_may_hold_one_object_per_line(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", ROWS).rename(tmp_path / "data.json")
    assert [row for _, row in read_rows(str(path))] == ROWS


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_ignored(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path, f"data.{extension}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row for _, row in read_rows(str(path))] == ROWS


def test_places_count_lines_of_the_file_blank_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\r\n{"text": "c"}')
    assert [place for place, _ in read_rows(str(path))] == [f"{path}, line {n}" for n in (1, 4, 5)]
    path = tmp_path / "data.csv"
    path.write_text('text\n"two\nlines"\nb\n')
    assert [place for place, _ in read_rows(str(path))] == [f"{path}, line {n}" for n in (3, 4)]


def test_a_folder_gives_one_row_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "sub" / "c.txt").write_text("third", "utf-8")
    (tmp_path / "readme.md").write_text("not this")
    assert [row["text"] for _, row in read_rows(str(tmp_path))] == ["first", "second", "third"]


def test_a_long_csv_field_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path, "data.csv", [{"text": "x" * 300_000}])
    assert [len(row["text"]) for _, row in read_rows(str(path))] == [300_000]
    assert csv.field_size_limit() == before


def test_long_csv_fields_are_read_while_another_csv_file_comes_to_its_end(tmp_path: Path) -> None:
    short, long = ({"text": "x"}, {"text": "x" * 300_000})
    first = read_rows(str(write(tmp_path, "first.csv", [short])))
    second = read_rows(str(write(tmp_path, "second.csv", [short, long])))
    rows = [next(first), next(second), *first, *second]
    assert [len(row["text"]) for _, row in rows] == [1, 1, 300_000]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello\n", "not JSON (Expecting value at column 1); one record is one JSON object on one line"),
        (b'{"text": "a"} {"text": "b"}\n', "not JSON (Extra data at column 15)"),
        (b'{"text": "\xe4"}\n', "not UTF-8 (byte 0xe4); save it as UTF-8"),
        (b'{"text": "a"},', "not JSON (a comma with nothing after it, near column 14); delete the comma"),
        (b'{"text": "a",}', "not JSON (a comma with nothing after it, near column 14); delete the comma"),
        (b"[" * 100_000, "not JSON that can be read (maximum recursion depth"),
        (b"1" * 5000, "not JSON that can be read (Exceeds the limit"),
    ],
)
def test_a_line_that_cannot_be_read_is_told_and_the_next_one_read(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + content.rstrip(b"\n") + b'\n{"text": "b"}\n')
    (_, first), (place, bad), (_, last) = read_rows(str(path))
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert place == f"{path}, line 2"
    assert isinstance(bad, BadRowError)
    assert str(bad).startswith(problem)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'[{"text": "a"},\n {"text": }]',
            r"a\.json, line 2: not JSON \(Expecting value at column 11\)$",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n {"text": "b"},\n]',
            r"a\.json, line 3: not JSON \(a comma with nothing after it, near column 1\); delete the comma",
        ),
        ("a.csv", LFS, r"a\.csv is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        ("a.parquet", LFS, r"a\.parquet is a Git LFS pointer"),
        ("a.json", b'[{"text": "a"},\n {"text": "\xff"}]', r"a\.json, line 2: not UTF-8 \(byte 0xff\)"),
        (
            "a.csv",
            b'text\nfine\n"no end\n',
            r"a\.csv, line 3: not CSV \(unexpected end of data\); check the quotes",
        ),
        ("a.parquet", b"PAR1, so to say", r"a\.parquet is not a readable parquet file after row 0: "),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz is not a complete gzip file \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz is not a complete gzip file",
        ),
        (
            "a.jsonl.xz",
            lzma.compress(b'{"text": "a"}\n' * 99)[:-9],
            r"a\.jsonl\.xz is not a complete xz file \(Compressed file ended before",
        ),
        ("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz is not a complete xz file \(Input format not supported"),
        (
            "a.jsonl.zst",
            PACK[".zst"](b'{"text": "a"}\n' * 99)[:-9],
            r"a\.jsonl\.zst is not a complete zstd file",
        ),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst is not a complete zstd file"),
        ("a.parquet.gz", gzip.compress(b"?", mtime=0), r"a\.parquet\.gz is not a readable parquet file"),
        (
            "a.pkl",
            b"",
            r"cannot read .*a\.pkl: unknown file type \.pkl; use \.jsonl, \.json, \.csv, \.parquet",
        ),
        ("a", b"", r"cannot read .*a: unknown file type \(none\)"),
        ("a.txt", b"hello", r"a\.txt: unknown file type \.txt; .* or a folder of \.txt files"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(path)))


def test_a_csv_row_with_too_many_fields_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,more\n1,2,3\n1,2\n")
    (_, bad), (_, good) = read_rows(str(path))
    assert str(bad) == "more fields than the header's 2"
    assert good == {"text": "1", "more": "2"}


def test_a_missing_file_names_the_nearest_one_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*trian\.jsonl; did you mean .*train\.jsonl\?"
    ):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(FileNotFoundError, match="check the path"):
        list(read_rows(str(tmp_path / "no" / "folder")))


@pytest.mark.parametrize("source", ["a.jsonl", "b.csv.gz", "./name", "~/no-such", "x/y.txt", r"C:\a", "D:/a"])
def test_what_looks_like_a_path_never_goes_to_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder") as caught:
        list(read_rows(source))
    assert ("; give the path by which this machine knows it" in str(caught.value)) == (":" in source)


def test_a_folder_without_text_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no \.txt file in it or below, it holds train\.jsonl; name one file, .*\.jsonl"
    ):
        list(read_rows(str(tmp_path)))
    (tmp_path / "train.jsonl").rename(tmp_path / "data.arrow")
    with pytest.raises(
        ValueError, match=r"it holds data\.arrow; write the data set with its method to_parquet"
    ):
        list(read_rows(str(tmp_path)))
    (tmp_path / "data.arrow").rename(tmp_path / "data.txt").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"data\.txt is a Git LFS pointer"):
        list(read_rows(str(tmp_path)))


def test_a_hub_id_is_loaded_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        return [{"text": f"{name} {config} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lisatune.data.sources.ask_hub", lambda name, kind: "")
    assert list(read_rows("openai/gsm8k:main", split="test")) == [
        ("openai/gsm8k:main, test row 1", {"text": "openai/gsm8k main test"})
    ]
    assert [row["text"] for _, row in read_rows("v1.5/data.set")] == ["v1.5/data.set None train"]


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="cannot load split 'train' of 'no/such-data' from the Hugging Face"
    ) as info:
        list(read_rows("no/such-data"))
    assert "\n" not in str(info.value)


def test_a_name_that_is_nothing_here_goes_to_the_hub_once_and_gives_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-rows").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lisatune.data.sources.ask_hub", lambda name, kind: UNREACHABLE)
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder my-row, and .* did you mean my-rows\?; set"
    ):
        list(read_rows("my-row"))


def test_python_docs_have_two_parts() -> None:
    train = [row["instruction"] for _, row in read_rows("python-docs")]
    held_out = [row["instruction"] for _, row in read_rows("python-docs:validation")]
    assert len(train) > len(held_out) > 100
    with pytest.raises(ValueError, match="parts train and validation, not 'test'"):
        list(read_rows("python-docs:test"))


@pytest.mark.parametrize(
    "name", [*(f"a.jsonl{end}" for end in ("", ".gz", ".xz", ".zst")), "a.csv", "a.json"]
)
def test_reading_tells_which_share_of_the_bytes_or_rows_is_done(tmp_path: Path, name: str) -> None:
    rows = [{"text": random.Random(number).randbytes(300).hex()} for number in range(3000)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith((".csv", ".json")):
        text = (
            json.dumps(rows) if name == "a.json" else "text\n" + "".join(row["text"] + "\n" for row in rows)
        )
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix, bytes)(text.encode()))
    assert_share_grows(str(tmp_path / name))


def assert_share_grows(source: str) -> None:
    meter = Meter()
    assert meter.share() == 0
    shares = [meter.share() for _ in read_rows(source, meter=meter)]
    assert shares == sorted(shares)
    assert shares[0] < 0.2 < 0.4 < shares[len(shares) // 2] < 0.7
    assert 0.99 <= shares[-1] <= meter.share() == 1


def test_reading_parquet_and_a_folder_tells_its_share_too(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number:03}.txt").write_text("a")
    assert_share_grows(str(folder))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 200}), tmp_path / "a.parquet")
    assert_share_grows(str(tmp_path / "a.parquet"))
