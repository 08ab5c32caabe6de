"""Uploads to a server with the hub's routes: private, asked once, nothing else in the repository touched."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

import hub_server
from hub_server import TOKEN, Hub
from lisatune.export.push import ask_target, check_folder, push
from tiny_run import write_model

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, with a token for it in the environment."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with hub_server.serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "mine")
    (folder / "README.md").write_text("---\ntags: [lisatune]\n---\n# Mine\n")
    (folder / ".hidden").write_text("not uploaded")
    return folder


def test_a_folder_becomes_a_new_private_repository(hub: Hub, folder: Path) -> None:
    target = ask_target("me/mine", public=False)
    assert not any(request.startswith(("POST", "PUT")) for request in hub.requests)  # nothing changed yet
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".hidden"}
    question = target.question(folder)
    assert question.startswith(f"upload {len(files)} files (")
    assert question.endswith(f" from {folder} to the private repository {hub.url}/me/mine, a new one?")
    assert push(target, folder) == f"{hub.url}/me/mine/commit/1"
    assert hub.repositories["me/mine"] == {"visibility": "private", "files": files}


def test_public_only_when_asked_and_for_a_group_too(hub: Hub, folder: Path) -> None:
    target = ask_target("our-group/mine", public=True)
    assert " to the PUBLIC repository " in target.question(folder)
    push(target, folder)
    assert hub.repositories["our-group/mine"]["visibility"] == "public"


def test_a_second_upload_replaces_weights_and_leaves_other_files(hub: Hub, folder: Path) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors.index.json": b"{}",
        "notes.txt": b"mine",
    }
    hub.repositories["me/mine"] = {"visibility": "private", "files": dict(old)}
    target = ask_target("me/mine", public=False)
    assert "/me/mine, whose weights it replaces?" in target.question(folder)
    push(target, folder)
    there = hub.repositories["me/mine"]["files"]
    assert there["notes.txt"] == b"mine"
    assert [name for name in there if name.endswith((".safetensors", "index.json"))] == ["model.safetensors"]


def test_a_public_repository_gets_nothing_by_accident(hub: Hub) -> None:
    hub.repositories["me/mine"] = {"visibility": "public", "files": {}}
    with pytest.raises(ValueError, match="me/mine exists and is public; give --public to upload there"):
        ask_target("me/mine", public=False)
    assert not ask_target("me/mine", public=True).is_private


def test_without_a_token_in_the_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ValueError, match=r"--push-to needs a token with write access in .* HF_TOKEN; one that"
    ):
        ask_target("me/mine", public=False)
    assert hub.requests == []


def test_a_token_that_is_refused_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(
        ValueError, match=r"the hub refuses the token in HF_TOKEN; make one with .* \(401: "
    ) as error:
        ask_target("me/mine", public=False)
    assert "wrongwrong" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_that_may_only_read(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(
        ValueError, match="the token in HF_TOKEN may only read; make one with write access at"
    ):
        ask_target("me/mine", public=False)


def test_a_hub_id_of_another_owner(hub: Hub) -> None:
    says = (
        "openai/mine belongs to openai, and .* to me, who may write to me, our-group; give --push-to me/mine"
    )
    with pytest.raises(ValueError, match=says):
        ask_target("openai/mine", public=False)
    assert hub.requests == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("hub_id", ["mine", "a/b/c", "me/", "me/a b", "me/x--y", "https://hub/me/x"])
def test_what_can_be_no_hub_id(hub_id: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match="--push-to"):
        ask_target(hub_id, public=False)
    assert hub.requests == []


def test_a_hub_that_refuses_to_create(hub: Hub, folder: Path) -> None:
    target = ask_target("me/mine", public=False)
    hub.may_create = False
    with pytest.raises(
        ValueError, match=r"does not let the token in HF_TOKEN write to me/mine \(403: .*quota"
    ):
        push(target, folder)


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the Hugging Face hub cannot be reached"):
        ask_target("me/mine", public=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="cannot be reached, because HF_HUB_OFFLINE is set"):
        ask_target("me/mine", public=False)


def test_adapters_of_a_local_base_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"base_model_name_or_path": "some/base"}')
    check_folder(tmp_path)
    file.write_text('{"base_model_name_or_path": "/home/me/base"}')
    with pytest.raises(
        ValueError, match="names the base by its local path, /home/me/base; put its hub id there"
    ):
        check_folder(tmp_path)
