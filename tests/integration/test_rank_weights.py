"""On two ranks no process holds a whole model: not while it loads, is saved, goes on, or is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lisatune.models.load import load_model, load_tokenizer, save_model
from lisatune.runs.manifest import DamagedCheckpointError, list_checkpoints, newest_checkpoint, verify
from rank_launcher import launch
from tiny_text import CHATML, byte_tokenizer

LARGEST_FILE = "100KB"
CONFIGS = {
    "untied": LlamaConfig(
        hidden_size=48,
        intermediate_size=120,
        num_hidden_layers=7,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    ),
    "tied": LlamaConfig(
        hidden_size=33,
        intermediate_size=65,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=10,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=6, n_head=3, n_positions=64),
}
FOREIGN = "foreign"
"""Saved without its head's prefix: transformers renames what it loads."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model folders; those of `untied` in several files."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    for name, config in {**CONFIGS, FOREIGN: CONFIGS["tied"]}.items():
        config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
        config.bos_token_id = config.pad_token_id = tokenizer.pad_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config.max_new_tokens = 7
        saved = model.base_model if name == FOREIGN else model
        saved.save_pretrained(root / name, max_shard_size=LARGEST_FILE if name == "untied" else "1GB")
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def held(folders: Path) -> dict[str, list[Any]]:
    """What each of two ranks reports of each model."""
    names = [*CONFIGS, FOREIGN]
    size = {"untied": LARGEST_FILE}
    jobs = [{"held": str(folders / name), "largest_file": size.get(name, "1GB")} for name in names]
    jobs.append({"saving": str(folders / "checkpoints")})
    names.append("saving")
    return dict(zip(names, map(list, zip(*launch(2, folders, jobs, dies=1), strict=True)), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_rank_holds_more_than_its_part_and_one_unit(held: dict[str, list[Any]], name: str) -> None:
    for rank in held[name]:
        part, unit = rank["shard"], rank["unit"]
        assert part + unit < 0.85 * rank["whole"], "the model is too small to tell"
        assert rank["all at once"] >= rank["whole"], "the count misses something"
        # A tensor, this rank's part, and a copy where torch's all-gather pads rows and cuts them off again;
        # gloo's thread may let go of the tensor before it, and of that one's part, only a moment later.
        one = 4 * rank["tensor"]
        assert rank["load"] <= part + unit
        assert rank["export"] <= part + one
        generators = 16384  # which a checkpoint holds whole; of weights and state nothing is gathered
        assert rank["save"] <= part + rank["state"] + generators
        # What is read is there beside the state that it is going to replace.
        assert rank["resume"] <= part + 2 * rank["state"] + unit


@pytest.mark.parametrize("name", [*CONFIGS, FOREIGN])
def test_weights_are_those_of_one_process(held: dict[str, list[Any]], name: str) -> None:
    for rank in held[name]:
        assert rank["equal"]
        assert rank["restored"]
    buffers = {"gpt2": 0}.get(name, 2)
    assert [len(rank["buffers"]) for rank in held[name]] == [buffers, buffers]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_what_one_process_writes_byte_for_byte(
    folders: Path, held: dict[str, list[Any]], name: str
) -> None:
    assert held[name][0]["equal"]
    written = {file.name: file.read_bytes() for file in (folders / f"{name}-out").iterdir()}
    alone = folders / f"{name}-alone"
    save_model(load_model(str(folders / name)), load_tokenizer(str(folders / name)), alone)
    expected = {file.name: file.read_bytes() for file in alone.iterdir()}
    if name == "untied":  # in more files, whose order transformers chooses otherwise
        whole = load(expected.pop("model.safetensors"))
        places = json.loads(written.pop("model.safetensors.index.json"))["weight_map"]
        assert places.keys() == whole.keys()
        parts = {file: load(written.pop(file)) for file in set(places.values())}
        assert len(parts) > 5
        assert all(torch.equal(parts[places[key]][key], whole[key]) for key in whole)
        AutoModelForCausalLM.from_pretrained(folders / f"{name}-out")
    assert written.keys() == expected.keys()
    for file, content in expected.items():
        assert written[file] == content, file


def test_a_model_by_other_names_is_loaded_whole_and_written_so_that_it_loads(
    folders: Path, held: dict[str, list[Any]]
) -> None:
    for rank in held[FOREIGN]:
        assert rank["is whole"]
    model = AutoModelForCausalLM.from_pretrained(folders / f"{FOREIGN}-out")
    twin = AutoModelForCausalLM.from_pretrained(folders / "tied")
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_a_rank_that_fails_or_dies_while_it_saves_leaves_no_checkpoint(
    folders: Path, held: dict[str, list[Any]]
) -> None:
    first, second = held["saving"]
    assert second is None, "rank 1 lives"
    assert "No space left on device" in first["2"]
    assert first["2"].startswith("OSError: could not write")
    assert first["left after 2"] == ["step-000001"]
    assert "RuntimeError" in first["3"]
    assert list_checkpoints(folders / "checkpoints") == [folders / "checkpoints" / "step-000001"]


def test_a_checkpoint_that_misses_the_file_of_a_rank_is_refused_by_name(
    folders: Path, held: dict[str, list[Any]]
) -> None:
    path = folders / "checkpoints" / "step-000001"
    verify(path)
    for name in ("weights", "optimizer"):
        missing = path / f"{name}-00002-of-00002.safetensors"
        content = missing.read_bytes()
        missing.unlink()
        with pytest.raises(
            DamagedCheckpointError, match=f"{missing.name}, which one of its ranks wrote, is mis"
        ):
            verify(path)
        assert newest_checkpoint(path.parent) is None
        missing.write_bytes(content)
    assert newest_checkpoint(path.parent) == path
