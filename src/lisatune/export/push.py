"""Put a folder on the Hugging Face hub: first everything is checked, then one question is asked.

The token comes from the environment alone, and is in no file and no message.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune import __version__
from lisatune.console import byte_text, first_line, plural
from lisatune.files.hub import UNREACHABLE
from lisatune.models.locate import ADAPTER_CONFIG

__all__ = ["Target", "ask_target", "check_folder", "push"]

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables that a token is read from; the first one that is set counts."""

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier upload that are deleted if the new one lacks them: a server would load them too."""


@dataclass(frozen=True)
class Target:
    """Where a folder will go."""

    hub_id: str
    url: str
    exists: bool
    """Whether there is such a repository already."""

    is_private: bool
    """Whether others will be unable to see it."""

    def question(self, folder: Path) -> str:
        """Ask what is going to happen."""
        files = _files(folder)
        size = byte_text(sum(file.stat().st_size for file in files))
        what = f"the {'private' if self.is_private else 'PUBLIC'} repository"
        what = (
            f"{what} {self.url}, whose weights it replaces"
            if self.exists
            else f"{what} {self.url}, a new one"
        )
        return f"upload {plural(len(files), 'file')} ({size}) from {folder} to {what}?"


def ask_target(hub_id: str, *, public: bool) -> Target:
    """Check hub id and token with the hub. Nothing is changed there.

    Args:
        hub_id: OWNER/NAME.
        public: whether everybody may see it.

    Raises:
        ValueError: there is no token, the hub refuses it, it may not write, the hub id is none or has another
            owner, or the repository is public and `public` is not set.
        OSError: the hub cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    _check_id(hub_id)
    api, variable = _open()
    from huggingface_hub import errors

    make_one = f"make one with write access at {api.endpoint}/settings/tokens"
    with _explain(f"the hub refuses the token in {variable}; {make_one}"):
        me = api.whoami()
    owner, name = hub_id.split("/")
    mine = [str(me["name"]), *(str(group["name"]) for group in me.get("orgs", []))]
    if owner not in mine:
        raise ValueError(
            f"{hub_id} belongs to {owner}, and the token in {variable} to {me['name']}, who may write to "
            f"{', '.join(mine)}; give --push-to {me['name']}/{name}"
        )
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"the token in {variable} may only read; {make_one}")
    with _explain(f"the hub does not let the token in {variable} see {hub_id}"):
        try:
            there: Any = api.repo_info(hub_id)
        except errors.RepositoryNotFoundError:
            there = None
    if there is not None and not there.private and not public:
        raise ValueError(
            f"{hub_id} exists and is public; give --public to upload there, or another --push-to for a "
            "private one"
        )
    is_private = bool(there.private) if there is not None else not public
    return Target(hub_id, f"{api.endpoint}/{hub_id}", there is not None, is_private)


def check_folder(folder: Path) -> None:
    """Refuse a folder that would show a local path to others.

    Raises:
        ValueError: adapters name their base by its local path, by which nobody else finds it either.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return
    base = str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    if base.startswith(("/", ".", "~")) or base.count("/") > 1 or "\\" in base:
        raise ValueError(
            f"{file} names the base by its local path, {base}; put its hub id there before you upload, so "
            "that others find it"
        )


def push(target: Target, folder: Path) -> str:
    """Create the repository if there is none, and upload all files of a folder in one commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError, OSError: the hub refuses, or cannot be reached.
    """
    api, variable = _open()
    with _explain(f"the hub does not let the token in {variable} write to {target.hub_id}"):
        if not target.exists:
            api.create_repo(target.hub_id, private=target.is_private)
        done = api.upload_folder(
            repo_id=target.hub_id,
            folder_path=folder,
            commit_message=f"Upload from lisatune {__version__}",
            ignore_patterns=[".*"],
            delete_patterns=WEIGHTS if target.exists else None,
        )
    return str(done.commit_url)


def _open() -> tuple[Any, str]:
    """Open the hub's API; also return the variable that the token is from.

    Raises:
        ValueError: no variable has a token.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(f'{error}; --push-to needs it: pip install "lisatune[train]"') from None
    variable = next((name for name in TOKENS if os.environ.get(name)), None)
    if variable is None:
        raise ValueError(
            f"--push-to needs a token with write access in the environment variable {TOKENS[0]}; one that "
            "`hf auth login` keeps is not used"
        )
    endpoint = os.environ.get("HF_ENDPOINT")
    return HfApi(endpoint=endpoint and endpoint.rstrip("/"), token=os.environ[variable]), variable


def _check_id(hub_id: str) -> None:
    """Refuse what cannot be a hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not re.fullmatch(r"[^/\s]+/[^/\s]+", hub_id):
        raise ValueError(f"--push-to must be OWNER/NAME, got {hub_id!r}")
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ValueError(f"--push-to {hub_id!r} is not a hub id: {first_line(error)}") from None


@contextmanager
def _explain(refused: str) -> Iterator[None]:
    """Turn the errors of the hub's library into one sentence; `refused` is that for a missing right."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        says = error.server_message or first_line(error)
        if code in (401, 403):
            raise ValueError(f"{refused} ({code}: {says})") from None
        raise OSError(f"the hub answers with an error ({code}: {says}); try again later") from error
    except errors.OfflineModeIsEnabled:
        raise OSError(f"{UNREACHABLE}, because HF_HUB_OFFLINE is set") from None
    except (ValueError, RuntimeError) as error:
        reason = first_line(error.__cause__ or error)
        raise OSError(f"the upload failed ({reason}); the same command tries again") from error
    except Exception as error:  # whatever the HTTP library of this version of huggingface_hub raises
        raise OSError(f"{UNREACHABLE} ({first_line(error)})") from error


def _files(folder: Path) -> list[Path]:
    """List what is uploaded."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
