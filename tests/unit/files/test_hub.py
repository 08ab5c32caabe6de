"""The hub is asked once and briefly, and its answer is a part of a sentence."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lisatune.files.hub import UNREACHABLE, ask_hub


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_hub.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[dict[str, Any]]:
    """Let the hub answer with an error or, for None, with the repository; return the questions."""
    asked: list[dict[str, Any]] = []

    def repo_info(self: HfApi, name: str, **options: Any) -> None:
        asked.append(options)
        if error is not None:
            raise error

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return asked


def refusal(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("404 of the hub\nwith more lines", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, ""),
        (
            refusal(RepositoryNotFoundError),
            "the Hugging Face hub has no model of that name (if it is private",
        ),
        (refusal(GatedRepoError), "the Hugging Face hub wants its terms accepted first"),
        (refusal(RevisionNotFoundError), "on the Hugging Face hub it has no revision v2"),
        (ConnectionError("no route\nto host"), f"{UNREACHABLE} (no route)"),
    ],
)
def test_the_hub_is_asked_once_for_a_few_seconds(
    error: Exception | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, error)
    answers = {ask_hub("some/model", "model", "v2") for _ in range(3)}
    assert len(answers) == 1
    assert answers.pop().startswith(says) if says else answers.pop() == ""
    assert asked == [{"repo_type": "model", "revision": "v2", "timeout": 5}]


@pytest.mark.parametrize("name", ["a b", "a--b", "a/b.git", "./a", ".", "x" * 97])
def test_a_name_that_cannot_be_a_hub_id_is_never_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, None)
    assert ask_hub(name, "dataset") == "the name cannot be a hub id either"
    assert not asked


def test_nothing_is_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ask_hub("some/model", "model").startswith(UNREACHABLE)
    assert not asked
