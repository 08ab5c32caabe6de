"""Checkpoints without the weights of the base model that never change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from lisatune.lisa.proof import fingerprint_whole
from lisatune.runs.checkpoint import begin_checkpoint, load_checkpoint, load_weights
from lisatune.runs.left_out import hash_fixed
from lisatune.runs.manifest import DamagedCheckpointError, verify, write_manifest


def start(*, seed: int = 0) -> dict[str, Any]:
    """Return a model of which only the head trains, and its optimizer."""
    model = tiny.llama()
    model.lm_head.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn.init.normal_(model.lm_head.weight)
    return {"model": model, "optimizer": torch.optim.SGD(model.lm_head.parameters(), lr=0.1)}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    left_out = hash_fixed(model, optimizer)
    writer = begin_checkpoint(folder, step=3, model=model, optimizer=optimizer, left_out=left_out)
    writer.write()
    writer.finish()
    return writer.target


def edit_state(path: Path, left_out: Any) -> None:
    """Replace the hashes in state.json, and the hash of the file."""
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "left_out": left_out}))
    write_manifest(path, 3, is_whole=False)


def test_only_what_trains_is_stored_and_the_rest_stays(tmp_path: Path) -> None:
    run = start()
    path = save(tmp_path, **run)
    assert set(load_file(path / "weights.safetensors")) == {"lm_head.weight"}
    assert json.loads((path / "manifest.json").read_text())["format"] == 3
    for load in (load_checkpoint, load_weights):
        other = start(seed=1)
        assert not torch.equal(other["model"].lm_head.weight, run["model"].lm_head.weight)
        load(path, **(other if load is load_checkpoint else {"model": other["model"]}))
        tiny.assert_same_weights(other["model"], run["model"])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.5.mlp.down_proj.weight"])
def test_another_base_model_is_refused_before_anything_changes(name: str, tmp_path: Path) -> None:
    path, other = save(tmp_path, **start()), start(seed=1)
    with torch.no_grad():
        weight = other["model"].get_parameter(name)
        weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))
    before = tiny.weights(other["model"])
    with pytest.raises(ValueError, match=f"the base model is another one: 1 of .* changed, first {name}; "):
        load_checkpoint(path, **other)
    assert not tiny.moved(before, other["model"])


@pytest.mark.parametrize("left_out", [{"nope": 1}, {"model.norm.weight": "1"}, 7, ["model.norm.weight"], {}])
def test_hashes_that_no_run_wrote_are_damage(left_out: Any, tmp_path: Path) -> None:
    path = save(tmp_path, **start())
    edit_state(path, left_out)
    verify(path)
    with pytest.raises(DamagedCheckpointError, match="holds what no run wrote"):
        load_checkpoint(path, **start(seed=1))


def test_hash_does_not_depend_on_how_many_elements_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(6.0).view(2, 3)
    at_once = fingerprint_whole(weight)
    monkeypatch.setattr("lisatune.lisa.proof.CHUNK", 4)
    assert fingerprint_whole(weight) == at_once


def test_every_element_counts_in_its_place() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    seen = set()
    for order in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [5, 4, 3, 2, 1, 0]):
        model.weight.data = torch.arange(6.0)[order].view(2, 3)
        seen.add(hash_fixed(model, optimizer)["weight"])
    assert len(seen) == 4
