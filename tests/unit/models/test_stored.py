"""`find_weights` asks for every file of a model, also where the cache has some of them."""

from pathlib import Path

import huggingface_hub
import pytest

from lisatune.models import stored


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the first of a model's two files."""
    folder = tmp_path / "models--some--model"
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_files_that_the_cache_lacks_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(stored, "locate", lambda name, revision: name)  # the hub answers
    assert stored.find_weights("some/model") == cache
    assert asked == [("some/model", None, ["model*.safetensors", "*.json"])]


def test_the_cache_serves_while_the_hub_cannot_be_reached(cache: Path) -> None:
    assert stored.find_weights("some/model") == cache


def test_a_folder_is_taken_as_it_is(cache: Path) -> None:
    assert stored.find_weights(str(cache)) == cache
