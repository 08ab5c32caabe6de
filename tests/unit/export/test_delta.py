"""A delta holds what changed and no more, and gives the model back bit for bit, on its own base alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lisatune.export.delta import apply_delta, write_delta
from lisatune.export.source import Source, open_source
from lisatune.files.disk import sha256_of
from lisatune.models import load
from lisatune.models.load import load_model, load_tokenizer, save_model
from tiny_run import write_model

CHANGED = ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """The base with three weights changed, one of them in the sign of a zero alone."""
    return write_tuned(base, base.parent / "tuned")


def write_tuned(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = load_model(str(base))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights[CHANGED[0]][0, 0] = 0.25
        weights[CHANGED[1]][3] += 1e-3
        weights[CHANGED[2]][0] = float("nan")
    save_model(model.to(dtype), load_tokenizer(str(base)), folder)
    return folder


def bits(folder: Path) -> dict[str, bytes]:
    """Bytes of each weight in a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {k: w.contiguous().view(torch.uint8).numpy().tobytes() for k, w in load_file(file).items()}
    return found


def test_what_changed_is_stored_and_applied_back_bit_for_bit(base: Path, tuned: Path, tmp_path: Path) -> None:
    found = write_delta(Source(tuned, None, str(base)), tmp_path / "delta")
    assert (found.changed, found.weights) == (3, len(bits(tuned)))
    assert set(bits(tmp_path / "delta")) == set(CHANGED)
    assert found.num_bytes == sum(map(len, bits(tmp_path / "delta").values()))
    assert apply_delta(tmp_path / "delta", tmp_path / "back", str(base)) == str(base)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in tuned.iterdir()}
    for file in tuned.iterdir():  # to the last byte of each file, not only of each weight
        assert sha256_of(file) == sha256_of(tmp_path / "back" / file.name), file.name


def test_the_sign_of_a_zero_is_a_change(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    weights["model.norm.weight"][0] = 0.0
    save_file(weights, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    weights["model.norm.weight"][0] = -0.0
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert (
        write_delta(Source(tmp_path / "other", None, str(tmp_path / "one")), tmp_path / "delta").changed == 1
    )
    apply_delta(tmp_path / "delta", tmp_path / "back", str(tmp_path / "one"))
    assert bits(tmp_path / "back") == bits(tmp_path / "other")


def test_weights_that_only_have_another_dtype_are_not_stored(base: Path, tmp_path: Path) -> None:
    tuned = write_tuned(base, tmp_path / "tuned", torch.bfloat16)
    assert write_delta(Source(tuned, None, str(base)), tmp_path / "delta").changed == 3
    apply_delta(tmp_path / "delta", tmp_path / "back", str(base))
    assert bits(tmp_path / "back") == bits(tuned)


def test_models_in_several_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LARGEST_FILE", "10KB")
    monkeypatch.setattr("lisatune.export.delta.BYTES_IN_FILE", 100)
    tuned = write_tuned(base, tmp_path / "tuned")
    assert len(list(tuned.glob("*.safetensors"))) > 2
    write_delta(Source(tuned, None, str(base)), tmp_path / "delta")
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) == 3
    apply_delta(tmp_path / "delta", tmp_path / "back", str(base))
    assert bits(tmp_path / "back") == bits(tuned)
    want = json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"]
    assert json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"] == want
    assert torch.isnan(load_model(str(tmp_path / "back")).model.norm.weight[0])


def test_another_base_is_refused_by_its_hash_also_under_the_same_name(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    write_delta(Source(tuned, None, str(base)), tmp_path / "delta")
    other = tmp_path / "base"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-7
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"is not the base of this delta: the hash of its weights is \w{12}…"
    ):
        apply_delta(tmp_path / "delta", tmp_path / "back", str(other))
    assert not (tmp_path / "back").exists()
    model = load_model(str(base))  # the same weights in another folder and other files are the base
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    apply_delta(tmp_path / "delta", tmp_path / "back", str(tmp_path / "again"))
    assert bits(tmp_path / "back") == bits(tuned)


def test_the_base_is_named_without_its_path_and_asked_for(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_delta(Source(tuned, None, str(base)), tmp_path / "delta")
    text = (tmp_path / "delta" / "delta.json").read_text()
    assert str(base.parent) not in text
    with pytest.raises(
        FileNotFoundError, match=r"the base of this delta, base, is not here .*; give its folder as base"
    ):
        apply_delta(tmp_path / "delta", tmp_path / "back")


@pytest.mark.parametrize("spoil", ["cut", "format", "away", "weight", "changed", "file"])
def test_a_damaged_delta_is_refused(spoil: str, base: Path, tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    write_delta(Source(tuned, None, str(base)), folder)
    about = json.loads((folder / "delta.json").read_text())
    if spoil == "cut":
        (folder / "delta.json").write_text("{")
    if spoil == "format":
        (folder / "delta.json").write_text(json.dumps(about | {"format": 2}))
    if spoil == "away":
        about["weights"][CHANGED[0]]["file"] = "../../x.safetensors"
        (folder / "delta.json").write_text(json.dumps(about))
    weights = load_file(folder / "delta.safetensors")
    if spoil == "weight":
        del weights[CHANGED[0]]
    if spoil == "changed":
        weights[CHANGED[0]][0, 0] += 1
    save_file(weights, folder / "delta.safetensors")
    if spoil == "file":
        (folder / "delta.safetensors").write_bytes((folder / "delta.safetensors").read_bytes()[:-9])
    says = {
        "cut": "is damaged",
        "format": "has format 2, and this lisatune reads 1",
        "away": "only .safetensors files in its own folder",
        "weight": f"lacks the weight {CHANGED[0]}; copy it again",
        "file": "delta.safetensors is damaged .*; copy it again",
        "changed": "is damaged: the result has another hash; copy it again",
    }
    with pytest.raises(ValueError, match=says[spoil]):
        apply_delta(folder, tmp_path / "back", str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


def test_what_is_no_model_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters, not a model: they are the difference already"):
        write_delta(open_source(str(tmp_path / "adapters"), str(base)), tmp_path / "delta")
    (tmp_path / "adapters" / "bottleneck.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds bottleneck adapters, .* cannot be merged .*; copy the folder"
    ):
        write_delta(open_source(str(tmp_path / "adapters"), str(base)), tmp_path / "delta")
    with pytest.raises(ValueError, match="does not say which model it began with; give it as base"):
        write_delta(open_source(str(tuned)), tmp_path / "delta")
    with pytest.raises(FileNotFoundError, match=r"holds no delta: it has no delta\.json"):
        apply_delta(tuned, tmp_path / "back", str(base))
