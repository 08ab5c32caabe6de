"""Whole runs on a stream: resumed, stopped by a shard that fails, killed, from the hub."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shard_server
import tiny_run
from faults import kills, runs
from lisatune.compare import slices
from lisatune.compare.arms import read_comparison
from lisatune.data import shard_reader
from lisatune.data.streaming import StreamError
from lisatune.recipe import Recipe
from lisatune.train import load_recipe, train
from lisatune.train.check import check
from lisatune.train.resume import RunState
from shard_server import Shards

STEPS = 12


@pytest.fixture(scope="module")
def server() -> Iterator[Shards]:
    with shard_server.serve() as served:
        for shard in range(3):
            lines = (json.dumps({"text": f"line {row} of shard {shard}"}) + "\n" for row in range(9))
            served.files[f"part-{shard}.jsonl.gz"] = gzip.compress("".join(lines).encode())
        yield served


def given(server: Shards, folder: Path, *more: str) -> list[str]:
    address = f"{server.url}/part-{{0..2}}.jsonl.gz"
    return [
        *(f"data.train={address}", "data.streaming=true", "data.window=7", "data.validation_limit=4"),
        *(f"run.steps={STEPS}", f"run.output={folder}/run", *more),
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    model = tiny_run.write_model(folder / "tiny")
    return tiny_run.write_recipe(folder, model, tiny_run.write_rows(folder / "rows.jsonl"))


@pytest.fixture(scope="module")
def straight(server: Shards, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("straight")
    train(load_recipe(recipe, given(server, folder)))
    return folder / "run"


class BreakError(Exception):
    """Ends a run."""


def stop_after(step: int) -> object:
    def stop(state: RunState) -> None:
        if state.step == step:
            raise BreakError

    return stop


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("saved", "stopped"), [(2, 3), (3, 8), (5, 11)])
def test_a_run_stopped_within_a_window_continues_bit_equal(
    server: Shards, recipe: Path, straight: Path, tmp_path: Path, saved: int, stopped: int
) -> None:
    asked = load_recipe(recipe, given(server, tmp_path, f"run.save_every={saved}"))
    with pytest.raises(BreakError):
        train(asked, after_step=stop_after(stopped))  # type: ignore[arg-type]
    train(asked, resume=True)
    assert weights(tmp_path / "run") == weights(straight)


def test_a_shard_that_stays_broken_ends_the_run_with_a_checkpoint_from_which_it_continues(
    server: Shards, recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "WAITS", (0, 0, 0))
    asked: Recipe = load_recipe(recipe, given(server, tmp_path))

    def break_shards(state: RunState) -> None:
        if state.step == 2:
            server.failures = dict.fromkeys(server.files, 99)

    with pytest.raises(StreamError) as caught:
        train(asked, after_step=break_shards)
    server.failures = {}
    problem = str(caught.value)
    assert f"cannot read the shard {server.url}/part-" in problem
    tried = "after 4 tries (HTTP Error 503: Service Unavailable); check its name and the connection"
    assert f"{tried}; stopped after step " in problem
    assert f" of {STEPS}, which is saved; " in problem
    train(asked, resume=True)
    assert weights(tmp_path / "run") == weights(straight)


def test_killed_runs_on_a_stream_end_bit_equal(
    server: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = given(server, tmp_path, "data.packing=true", "run.eval_every=3")
    overrides = [each for each in overrides if not each.startswith(("run.output", "run.steps"))]
    monkeypatch.setitem(runs.VARIANTS, "stream", ("{active: 2, period: 2}", overrides))
    series = kills.Series(tmp_path / "killed", "stream")
    tally = series.kill_and_compare(random.Random(2), [*kills.KINDS, "before a file"])
    assert tally.mismatches == []
    assert tally.finished == 1


def test_check_outlines_a_stream_and_a_resumed_run_refuses_other_shards(
    server: Shards, recipe: Path, straight: Path, tmp_path: Path
) -> None:
    report = check(load_recipe(recipe, given(server, tmp_path)))
    assert report.problems == []
    assert report.outline is not None
    assert (report.outline.shards, report.outline.train_rows, report.outline.validation_rows) == (3, 7, 4)
    fewer = [f"data.train={server.url}/part-{{0..1}}.jsonl.gz", "run.steps=20"]
    with pytest.raises(ValueError, match=r"data\.train: .* → "):
        train(load_recipe(recipe, [*given(server, straight.parent), *fewer]), resume=True)


def test_a_stream_cannot_be_compared(server: Shards, recipe: Path, tmp_path: Path) -> None:
    comparison = read_comparison(recipe, given(server, tmp_path), methods="lisa,full", lr="1e-3")
    with pytest.raises(ValueError, match=r"data\.streaming reads records while a run trains"):
        slices.write_slices(comparison, tmp_path / "data")


READ_FROM_HUB = """
import sys
from pathlib import Path
from lisatune.data import shard_reader, streaming
from lisatune.recipe import DataConfig
from tiny_text import byte_tokenizer

shard_reader.WAITS = (0, 0, 0)
data = DataConfig(train=sys.argv[1], streaming=True, window=4)
stream = streaming.Stream(data, byte_tokenizer(None), seed=0, batch_size=2, cache=Path(sys.argv[2]))
stream.seek([])
rows = [row for step in range(6) for row in stream.batch(step)]
print(stream.shards, sorted(byte_tokenizer(None).decode(row["input_ids"]) for row in rows), sep="\\n")
stream.close()
"""


@pytest.fixture
def hub() -> Iterator[Shards]:
    """A hub with a data set of three shards."""
    with shard_server.serve() as served:
        served.files["README.md"] = b"---\nlicense: mit\n---\n"
        for shard in range(3):
            text = b'{"text": "line one"}\n{"text": "line two"}\n' * (shard + 1)
            served.files[f"data/train-{shard}.jsonl.gz"] = gzip.compress(text)
        served.files["data/test-0.jsonl"] = b'{"text": "not for training"}\n'
        yield served


def read_from(hub: Shards, folder: Path) -> subprocess.CompletedProcess[str]:
    """Stream the data set in a process that takes the server for the hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", READ_FROM_HUB, shard_server.HUB_ID, str(folder / "cache")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


AT = f"hf://datasets/{shard_server.HUB_ID}@{shard_server.COMMIT}/data"


def test_a_data_set_of_the_hub_is_streamed_though_shards_fail_twice_and_break_off(
    hub: Shards, tmp_path: Path
) -> None:
    hub.failures = {"data/train-1.jsonl.gz": 2}
    hub.cuts = {"data/train-2.jsonl.gz": 1}
    run = read_from(hub, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        str([f"{AT}/train-{shard}.jsonl.gz" for shard in range(3)]),
        str(["line one<eos>"] * 6 + ["line two<eos>"] * 6),
    ]
    assert hub.failures == {"data/train-1.jsonl.gz": 0}
    assert hub.cuts == {"data/train-2.jsonl.gz": 0}
    assert not list(tmp_path.rglob("*.jsonl.gz")), "a shard is not kept"


def test_a_shard_of_the_hub_that_is_gone_is_named_at_once(hub: Shards, tmp_path: Path) -> None:
    hub.gone = {"data/train-1.jsonl.gz"}
    run = read_from(hub, tmp_path)
    assert run.returncode == 1
    said = run.stderr.strip().splitlines()[-1]
    assert f"StreamError: cannot read the shard {AT}/train-1.jsonl.gz (" in said
    assert "404" in said
    assert "tries" not in said
