"""Rows that are read while a run trains: every record once a pass, exact places, shards that fail."""

import errno
import gzip
import json
import lzma
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import shard_server
from lisatune.data import shard_reader
from lisatune.data.prepare import prepare_data
from lisatune.data.shards import ShardFolder, list_shards
from lisatune.data.sources import read_rows
from lisatune.data.streaming import Stream, StreamError
from lisatune.distributed import ranks
from lisatune.methods import Full
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig
from lisatune.train.recipe_file import build_recipe
from shard_server import Shards
from tiny_text import byte_tokenizer

TOKENIZER = byte_tokenizer(None)
SHARDS, RECORDS = 4, 9


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "WAITS", (0, 0, 0))


@pytest.fixture
def server() -> Iterator[Shards]:
    """A server with shards of texts, part-0.jsonl.gz and so on."""
    with shard_server.serve() as served:
        for shard in range(SHARDS):
            served.files[f"part-{shard}.jsonl.gz"] = gzip.compress(texts_of(shard))
        yield served


@pytest.fixture
def open_stream(tmp_path: Path) -> Iterator[Callable[..., Stream]]:
    """Opens a stream at its beginning or at a place."""
    opened: list[Stream] = []

    def open_one(
        train: Any, *, place: dict[str, int] | None = None, hold_out: int = 0, **data: Any
    ) -> Stream:
        config = DataConfig(train=train, streaming=True, **({"max_length": 64, "window": 5} | data))
        stream = Stream(config, TOKENIZER, seed=3, batch_size=2, cache=tmp_path / "cache")
        opened.append(stream)
        if hold_out:
            stream.hold_out(hold_out)
        stream.seek([place] if place else [])
        return stream

    yield open_one
    for stream in opened:
        stream.close()


def texts_of(shard: int) -> bytes:
    return b"".join(b'{"text": "%d-%d"}\n' % (shard, record) for record in range(RECORDS))


def every_shard(server: Shards) -> str:
    return f"{server.url}/part-{{0..{SHARDS - 1}}}.jsonl.gz"


def write_shards(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        (folder / f"part-{shard}.jsonl").write_bytes(texts_of(shard))
    return f"{folder}/part-*.jsonl"


def read(stream: Stream, start: int, stop: int) -> list[str]:
    """Return the texts of the rows of some micro-steps, in order."""
    rows = chain.from_iterable(stream.batch(step) for step in range(start, stop))
    return [text for row in rows for text in TOKENIZER.decode(row["input_ids"]).split("<eos>") if text]


ALL = {f"{shard}-{record}" for shard in range(SHARDS) for record in range(RECORDS)}
PASS = len(ALL) // 2
"""Micro-steps of a pass over all records, unpacked."""


# ---- what is read


def test_a_pass_has_every_record_once_and_the_next_pass_another_order(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    # Windows of 6 records, so that one ends where the pass does.
    stream = open_stream(write_shards(tmp_path / "shards"), window=6)
    passes = [read(stream, number * PASS, (number + 1) * PASS) for number in range(3)]
    assert [set(texts) for texts in passes] == [ALL] * 3
    assert [len(texts) for texts in passes] == [len(ALL)] * 3
    orders = [tuple(dict.fromkeys(text[0] for text in texts)) for texts in passes]
    assert len(set(orders)) > 1
    assert orders[0] != ("0", "1", "2", "3")
    assert passes[0][:6] != sorted(passes[0][:6]), "a window is shuffled"


def test_each_window_is_shuffled_in_its_own_way(tmp_path: Path, open_stream: Callable[..., Stream]) -> None:
    path = tmp_path / "one.jsonl"
    path.write_bytes(texts_of(0)[: 8 * len(b'{"text": "0-0"}\n')])
    texts = read(open_stream(str(path), window=4), 0, 12)
    windows = [texts[start : start + 4] for start in range(0, len(texts), 4)]
    assert len({tuple(sorted(window).index(text) for text in window) for window in windows}) > 2


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_continues_at_any_micro_step_with_the_same_rows(
    tmp_path: Path, open_stream: Callable[..., Stream], *, packing: bool
) -> None:
    how = {"train": write_shards(tmp_path / "shards"), "packing": packing, "max_length": 12, "window": 7}
    straight, places = open_stream(**how), []
    texts = []
    for step in range(30):
        places.append(straight.places(step)[0])
        texts.append(read(straight, step, step + 1))
    assert len({place["window"] for place in places}) > 3
    for step in (0, 1, 5, 13, 22, 28):
        resumed = open_stream(**how, place=places[step])
        assert [read(resumed, number, number + 1) for number in range(step, 30)] == texts[step:]
        assert resumed.places(29)[0] == places[29]


def test_a_stream_goes_back_to_an_earlier_place(tmp_path: Path, open_stream: Callable[..., Stream]) -> None:
    stream = open_stream(write_shards(tmp_path / "shards"))
    first, place = read(stream, 0, 4), stream.places(4)[0]
    then = read(stream, 4, 12)
    stream.seek([place])
    assert read(stream, 4, 12) == then
    stream.seek([])
    assert read(stream, 0, 4) == first


def test_a_resumed_stream_reads_no_shard_before_its_window(
    server: Shards, open_stream: Callable[..., Stream]
) -> None:
    straight = open_stream(every_shard(server))
    read(straight, 0, 12)
    place = straight.places(12)[0]
    assert place["shard"] == 2
    straight.close()
    asked = list(dict.fromkeys(server.requests))
    server.requests.clear()
    resumed = open_stream(every_shard(server), place=place)
    read(resumed, 12, 13)
    resumed.close()
    assert not {asked[0], asked[1]} & set(server.requests)


def test_at_most_a_window_is_read_ahead_and_nothing_is_left_on_disk(
    server: Shards, open_stream: Callable[..., Stream], tmp_path: Path
) -> None:
    stream = open_stream(every_shard(server))
    read(stream, 0, 1)
    stream.close()  # waits for the thread
    assert len(server.requests) <= 2, "two windows of 5 records are in two shards of 9"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_shard_that_failed_is_not_asked_for_again_after_the_run(
    server: Shards, open_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "WAITS", (60, 60, 60))
    asked_twice = threading.Event()

    class Requests(list[str]):
        def append(self, name: str) -> None:
            super().append(name)
            if len(self) == 1:  # all shards but the first are refused
                server.failures = dict.fromkeys(set(server.files) - {name}, 9)
            else:
                asked_twice.set()

    server.requests = Requests()
    stream = open_stream(every_shard(server))
    read(stream, 0, 1)  # the thread reads the second window ahead, which ends in another shard
    assert asked_twice.wait(60)
    stream.close()
    assert len(server.requests) == 2


def test_what_a_kill_left_behind_is_deleted_and_what_another_process_reads_is_not(tmp_path: Path) -> None:
    left = tmp_path / "stream-left"
    left.mkdir()
    (left / "part.jsonl").write_text("{}")
    addresses = ["http://nowhere/part.jsonl"]
    first = ShardFolder(tmp_path, addresses, lambda: False)
    assert not left.exists()
    second = ShardFolder(tmp_path, addresses, lambda: False)
    assert len(list(tmp_path.iterdir())) == 2
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_the_first_records_are_held_out_of_every_pass(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    held_out = RECORDS + 3  # all of the first shard, and some of the second
    stream = open_stream(write_shards(tmp_path / "shards"), hold_out=held_out, window=6)
    left = ALL - {f"0-{record}" for record in range(RECORDS)} - {f"1-{record}" for record in range(3)}
    assert Counter(read(stream, 0, len(left))) == dict.fromkeys(left, 2)
    with pytest.raises(StreamError, match="holds out all records of 4 shards, and none is left to train on"):
        open_stream(write_shards(tmp_path / "shards"), hold_out=len(ALL))


def test_a_run_evaluates_on_the_first_records_or_on_a_file(tmp_path: Path) -> None:
    def prepare(**data: Any) -> list[str]:
        config = DataConfig(train=write_shards(tmp_path / "shards"), streaming=True, **data)
        run = RunConfig(steps=5)
        recipe = Recipe(model=ModelConfig(name="tiny"), data=config, method=Full(), run=run)
        prepared = prepare_data(recipe, TOKENIZER)
        assert prepared.steps == 5
        assert prepared.stream is not None
        prepared.stream.close()
        return [TOKENIZER.decode(row["input_ids"]) for row in prepared.validation.rows]

    assert prepare(validation_limit=3) == ["0-0<eos>", "0-1<eos>", "0-2<eos>"]
    file = tmp_path / "held.jsonl"
    file.write_text('{"text": "apart"}\n')
    assert prepare(validation=str(file)) == ["apart<eos>"]
    assert prepare(validation_share=0) == []


# ---- several ranks


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "count", lambda: count)
    monkeypatch.setattr(ranks, "has_others", lambda: False)


def test_ranks_read_different_shards_and_continue_where_each_was(
    tmp_path: Path, open_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_shards(tmp_path / "shards")
    texts = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        stream = open_stream(pattern, window=6)
        texts.append(read(stream, 0, 5))
        places = stream.places(5)
        assert len(places) == 2
        then = read(stream, 5, PASS // 2)
        stream.seek(places)
        assert read(stream, 5, PASS // 2) == then
        texts[-1] += then
    shards_of = [{text[0] for text in own} for own in texts]
    assert [len(shards) for shards in shards_of] == [2, 2]
    assert sorted(texts[0] + texts[1]) == sorted(ALL)
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(
        ValueError, match="divided among 2 ranks and would continue with 4; resume it on as many"
    ):
        open_stream(pattern).seek(places)


def test_more_ranks_than_shards_read_all_and_each_takes_its_part_of_every_batch(
    tmp_path: Path, open_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = write_shards(tmp_path / "shards")
    alone = open_stream(pattern)
    monkeypatch.setattr(alone, "_batch_size", 12)
    whole = read(alone, 0, 3)
    parts = []
    for rank in range(6):
        as_rank(monkeypatch, rank, 6)
        parts.append(read(open_stream(pattern), 0, 3))
    assert sorted(text for part in parts for text in part) == sorted(whole)
    assert parts[0][:2] == whole[:12:6]
    assert parts[5][:2] == whole[5:12:6]


# ---- shards that fail


def test_a_shard_that_fails_twice_or_breaks_off_is_fetched_again_and_no_record_is_lost(
    server: Shards, open_stream: Callable[..., Stream]
) -> None:
    expected = read(open_stream(every_shard(server)), 0, PASS)
    server.failures = {"part-1.jsonl.gz": 2}
    server.cuts = {"part-2.jsonl.gz": 3}
    server.requests.clear()
    assert read(open_stream(every_shard(server)), 0, PASS) == expected
    counts = Counter(server.requests)
    assert counts["part-1.jsonl.gz"] >= 3
    assert counts["part-2.jsonl.gz"] >= 4


def test_waits_between_tries_grow(
    server: Shards, open_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert list(shard_reader.WAITS) == sorted(set(shard_reader.WAITS))
    assert len(shard_reader.WAITS) == 3


@pytest.mark.parametrize(
    ("break_it", "tries", "problem"),
    [
        (lambda server: server.failures.update({"part-1.jsonl.gz": 99}), 4, "HTTP Error 503"),
        (lambda server: server.cuts.update({"part-1.jsonl.gz": 99}), 4, "the connection ended after"),
        (lambda server: shorten(server, "part-1.jsonl.gz"), 4, "is not a complete gzip file"),
    ],
)
def test_a_shard_that_stays_broken_is_named_after_four_tries(
    server: Shards,
    open_stream: Callable[..., Stream],
    break_it: Callable[[Shards], None],
    tries: int,
    problem: str,
) -> None:
    break_it(server)
    with pytest.raises(StreamError) as caught:
        read(open_stream(every_shard(server)), 0, PASS)
    assert f"cannot read the shard {server.url}/part-1.jsonl.gz after 4 tries" in str(caught.value)
    assert problem in str(caught.value)
    assert "stream-" not in str(caught.value), "the name of the downloaded file says nothing to a user"
    assert server.requests.count("part-1.jsonl.gz") == tries


def shorten(server: Shards, name: str) -> None:
    """Cut off the file itself, so that its length is that which is announced."""
    server.files[name] = server.files[name][:-12]


def test_a_shard_that_is_gone_is_named_at_once(server: Shards, open_stream: Callable[..., Stream]) -> None:
    del server.files["part-3.jsonl.gz"]
    with pytest.raises(StreamError, match=r"cannot read the shard .*/part-3\.jsonl\.gz \(HTTP Error 404"):
        read(open_stream(every_shard(server)), 0, PASS)


def test_rows_before_a_broken_shard_still_come(server: Shards, open_stream: Callable[..., Stream]) -> None:
    order = read(open_stream(every_shard(server)), 0, PASS)
    server.failures = {f"part-{order[-1][0]}.jsonl.gz": 99}
    stream = open_stream(every_shard(server))
    assert read(stream, 0, 10) == order[:20]
    with pytest.raises(StreamError):
        read(stream, 10, PASS)


def test_a_bad_record_is_named_by_shard_and_line_and_never_skipped_silently(
    server: Shards, open_stream: Callable[..., Stream]
) -> None:
    server.files["part-2.jsonl.gz"] = gzip.compress(texts_of(2) + b'{"txt": 5}\n')
    with pytest.raises(StreamError) as caught:
        read(open_stream(every_shard(server)), 0, PASS)
    assert str(caught.value).startswith(f"{server.url}/part-2.jsonl.gz, line 10: the field 'text' is missing")
    assert server.requests.count("part-2.jsonl.gz") == 1, "another try cannot help"
    with pytest.warns(UserWarning, match=r"part-2\.jsonl\.gz, line 10: .*; skipped, and more"):
        texts = read(open_stream(every_shard(server), on_bad_row="skip", window=6), 0, PASS + 6)
    assert set(texts) == ALL


def test_what_is_left_out_is_counted_through_all_windows(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    for shard in range(3):
        rows = [{"prompt": "2 + 2 =", "completion": " 4" * count} for count in (1, 40, 0, 1)]
        rows[2] = {"prompt": "no answer"}
        rows[3] |= {"image": "a.png"}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{shard}.jsonl").write_text(text)
    how = {
        "train": str(tmp_path / "*.jsonl"),
        "on_bad_row": "skip",
        "window": 3,
        "max_length": 20,
        "text_only": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut, dropped = open_stream(**how), open_stream(**how, long="drop")
        read(cut, 0, 3)
        middle = cut.places(3)[0]
        read(cut, 3, 6)
        read(dropped, 0, 6)
        place = cut.places(6)[0]
        assert (place["skipped"], place["cut"], place["dropped"], place["media"]) == (4, 4, 0, 4)
        assert "4 records skipped: not usable; 4 records cut at max_length" in cut.describe(6)
        assert "4 records without images, sound or videos" in cut.describe(6)
        assert dropped.places(6)[0]["dropped"] == 6
        again = open_stream(**how, place=middle)
        read(again, 3, 6)
        assert again.places(6)[0] == place


def test_what_is_skipped_is_counted_once_where_a_whole_shard_is_held_out(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    for shard in range(2):
        rows = [{"prompt": f"{number} =", "completion": " 4", "image": "a.png"} for number in range(2)]
        rows.append({"prompt": "no answer"})
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"train": str(tmp_path / "*.jsonl"), "on_bad_row": "skip", "text_only": True, "window": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = open_stream(**how, hold_out=3)  # the first shard, and one record of the second
        read(stream, 0, 3)
    place = stream.places(3)[0]
    assert place["shard"] > 4
    media = 2 * place["shard"] + place["record"]
    assert (place["skipped"], place["media"]) == (place["shard"], media)
    skipped = [str(each.message) for each in caught if "; skipped, and more" in str(each.message)]
    assert len(skipped) == len(set(skipped)) == 2


def test_what_is_left_out_of_a_shard_that_never_ends_is_counted_and_named(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    lines = [{"text": f"{number}", "stars": 5} if number % 4 else {"txt": ""} for number in range(200)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"train": str(tmp_path / "one.jsonl"), "on_bad_row": "skip", "window": 6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = open_stream(**how, hold_out=2)  # lines 2 and 3
        read(stream, 0, 6)
    told = [str(each.message).removeprefix(str(tmp_path)) for each in caught]
    assert [text.split(": ")[0] for text in told] == ["/one.jsonl, line 1", "/one.jsonl"]
    assert told[0].endswith("; skipped, and more of this shard are counted")
    assert told[1].endswith("nothing reads the field stars")
    middle, skipped = stream.places(6)[0], "0 shards read to the end (0.00 × all 1); 5 records skipped"
    assert (middle["record"], middle["skipped"]) == (14, 5)
    assert stream.describe(6).startswith(skipped), "the window of the last step counts"
    read(stream, 6, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = open_stream(**how, place=middle)
    read(again, 6, 12)
    assert again.places(12) == stream.places(12)


def test_records_that_are_held_out_too_are_counted_and_the_first_is_named(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    texts = ["a", "b", "c", "b", "d", "a", "e"]
    (tmp_path / "one.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))

    def prepare(**data: Any) -> tuple[list[str], str]:
        config = DataConfig(train=str(tmp_path / "one.jsonl"), streaming=True, window=5, **data)
        run = RunConfig(steps=5, batch_size=5)
        recipe = Recipe(model=ModelConfig(name="tiny"), data=config, method=Full(), run=run)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stream = prepare_data(recipe, TOKENIZER).stream
        assert stream is not None
        stream.batch(0)
        stream.close()
        return [str(each.message) for each in caught if "held-out" in str(each.message)], stream.describe(1)

    (told,), said = prepare(validation_limit=2)
    assert told.startswith(f"record 4 of {tmp_path}/one.jsonl is in the held-out data too, so held-out loss")
    assert said.endswith("; 2 records in the held-out data too")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"text": "c"}\n')
    (told,), said = prepare(validation=str(held_out))
    assert told.startswith("record 3 of ")
    assert said.endswith("; 1 record in the held-out data too")
    assert prepare(validation_share=0)[0] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_shard_for_which_there_is_no_space_is_one_sentence_without_another_try(
    server: Shards,
    open_stream: Callable[..., Stream],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(StreamError) as caught:
            open_stream(every_shard(server))
    assert f"cannot write the shard {server.url}/part-" in str(caught.value)
    advice = "free space, such as with" if number == errno.ENOSPC else "name another folder"
    says = f"into the cache {tmp_path / 'cache'}: {os.strerror(number)}; {advice}"
    assert says in str(caught.value)
    assert len(server.requests) == 1
    (tmp_path / "file").touch()
    config = DataConfig(train=every_shard(server), streaming=True)
    with pytest.raises(OSError, match=r"cannot write prepared tokens into the cache .*file: File exists"):
        Stream(config, TOKENIZER, seed=3, batch_size=2, cache=tmp_path / "file")


def test_a_server_that_is_not_there_is_named_with_what_to_do(open_stream: Callable[..., Stream]) -> None:
    says = r"x\.jsonl after 4 tries \(Connection refused\); check its name and the connection"
    with pytest.raises(StreamError, match=says):
        open_stream("http://127.0.0.1:9/x.jsonl")


def test_numbers_that_count_down_are_refused_and_a_file_is_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a1.jsonl", "a2.jsonl", "a[1].jsonl"):
        Path(name).write_text('{"text": "x"}')
    assert list_shards("a[1].jsonl") == ["a[1].jsonl"]
    assert list_shards("a[12].jsonl") == list_shards("a{1..2}.jsonl") == ["a1.jsonl", "a2.jsonl"]
    for source in ("a{2..1}.jsonl", "http://localhost/a{2..1}.jsonl"):
        with pytest.raises(ValueError, match=r"jsonl counts down from 2 to 1; write \{1\.\.2\}"):
            list_shards(source)


@pytest.mark.parametrize("source", ["a{1..2}.jsonl", "data/*", "http://localhost/rows", "a[0-9].jsonl"])
def test_addresses_and_patterns_without_streaming_are_no_hub_ids(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"addresses and patterns need data\.streaming: true"):
        next(read_rows(source))


def test_a_field_that_nothing_reads_is_named_once_and_not_for_every_shard(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.jsonl").write_text('{"text": "a", "stars": 5}\n' * 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(open_stream(str(tmp_path / "*.jsonl")), 0, 12)
    assert ["nothing reads the field stars" in str(each.message) for each in caught] == [True]


def test_shards_of_two_kinds_are_refused(tmp_path: Path, open_stream: Callable[..., Stream]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "b", "answer": "c"}\n')
    with pytest.raises(StreamError, match=r"records of a stream must be of one kind, and there are .*; set"):
        open_stream(str(tmp_path / "*.jsonl"))


def test_a_token_that_the_model_lacks_is_refused_in_a_later_window(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    stream = open_stream(write_shards(tmp_path / "shards"))
    stream.vocabulary = 100
    with pytest.raises(StreamError, match="the tokenizer makes token 257, and the model has 100"):
        read(stream, 0, PASS)


# ---- which shards there are


def test_shards_may_be_of_any_type_and_a_text_file_is_one_record(
    tmp_path: Path, open_stream: Callable[..., Stream]
) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["parquet"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "xz"}\n'))
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "zst"}\n')
    (tmp_path / "d.csv").write_text("text\ncsv\n")
    (tmp_path / "e.txt").write_text("a whole\ntext")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "f.json").write_text('[{"text": "json"}]')
    texts = read(open_stream(str(tmp_path), window=6), 0, 3)
    assert set(texts) == {"parquet", "xz", "zst", "csv", "a whole\ntext", "json"}


def test_a_parquet_shard_that_is_damaged_is_fetched_again_and_named(
    server: Shards, open_stream: Callable[..., Stream]
) -> None:
    server.files = {"part.parquet": b"PAR1 and nothing more"}
    with pytest.raises(StreamError, match=r"cannot read the shard .*/part\.parquet after 4 tries"):
        open_stream(f"{server.url}/part.parquet")
    assert len(server.requests) == 4


def test_shards_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "shards")
    names = [f"{tmp_path}/shards/part-{shard}.jsonl" for shard in range(SHARDS)]
    assert list_shards(pattern) == list_shards(str(tmp_path / "shards")) == names
    assert list_shards(names[2]) == names[2:3]
    assert list_shards("https://host/{08..10}/a-{0..1}.jsonl?x=1") == [
        f"https://host/{folder}/a-{number}.jsonl?x=1" for folder in ("08", "09", "10") for number in "01"
    ]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{}/*.jsonl", "data.train: no file matches {}/*.jsonl; check the path"),
        ("{}/absent.jsonl", "there is no file or folder {}/absent.jsonl; check the path"),
        ("{}", "data.train: folder {} has no file of a known type in it or below"),
        ("http://host/rows.bin", "cannot read http://host/rows.bin: unknown file type .bin; use"),
    ],
)
def test_a_source_without_shards_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        list_shards(source.format(tmp_path))
    assert problem.format(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "data.streaming has no end, so run.steps must say how long to train; set it"),
        (["run.steps=5", "data.limit=5"], "data.limit=5 cannot work with data.streaming"),
        (["run.steps=5", "data.deduplicate=true"], "data.deduplicate=true cannot work with data.streaming"),
        (
            ["run.steps=5", "data.validation_limit=null"],
            "data.validation_limit=null cannot work with data.streaming",
        ),
        (
            ["run.steps=5", "data.train=[{path: a, weight: 1}]"],
            "data.train=a mixture cannot work with data.streaming",
        ),
        (["run.steps=5", "data.window=0"], "data.window must be >= 1, got 0"),
        (["data.streaming=false", "data.window=5"], "data.window=5 does nothing without data.streaming"),
        (["run.steps=5", "loss.name=dpo"], "data.streaming=true cannot work with loss.name=dpo"),
    ],
)
def test_settings_that_a_stream_cannot_have_are_refused(overrides: list[str], problem: str) -> None:
    sections = {"model": {"name": "tiny"}, "data": {"train": "*.jsonl", "streaming": True}}
    with pytest.raises(ValueError, match=r"^(command line|recipe\.yaml): ") as caught:
        build_recipe("recipe.yaml", sections, overrides)
    assert problem in str(caught.value)


def test_several_paths_make_one_stream(tmp_path: Path, open_stream: Callable[..., Stream]) -> None:
    write_shards(tmp_path / "shards")
    paths = [f"{tmp_path}/shards/part-{shard}.jsonl" for shard in (0, 2)]
    assert {text[0] for text in read(open_stream(paths), 0, 9)} == {"0", "2"}


def test_numbers_in_braces_name_files_too(tmp_path: Path) -> None:
    for number in ("08", "09", "10"):
        (tmp_path / f"part-{number}.jsonl").write_bytes(texts_of(0))
    found = [Path(shard).name for shard in list_shards(f"{tmp_path}/part-{{08..10}}.jsonl")]
    assert found == ["part-08.jsonl", "part-09.jsonl", "part-10.jsonl"]
    with pytest.raises(
        FileNotFoundError, match=r"names .*part-11\.jsonl, which is not there; check the numb"
    ):
        list_shards(f"{tmp_path}/part-{{08..12}}.jsonl")
