"""Names on the Hugging Face hub, asked for once and briefly. Other libraries try again for up to a minute."""

from functools import cache
from typing import Literal

from lisatune.console import first_line

__all__ = ["SECONDS", "UNREACHABLE", "ask_hub"]

SECONDS = 5
"""How long the hub has to answer."""

UNREACHABLE = "the Hugging Face hub cannot be reached"


@cache
def ask_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str:
    """Ask the hub whether it has a model or a dataset; the answer is kept as long as the process runs.

    A name that cannot be a hub id is never asked for, and nothing is under HF_HUB_OFFLINE.

    Args:
        name: hub id.
        kind: what it should be.
        revision: branch, tag or commit.

    Returns:
        An empty text if the hub has it. Else what is wrong, as a part of a sentence. It begins with
        `UNREACHABLE` if the hub gave no answer, so that an earlier download may still serve.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, constants, errors
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError('names on the hub need huggingface_hub: pip install "lisatune[train]"') from error
    try:
        validate_repo_id(name)
        if constants.HF_HUB_OFFLINE:
            return f"{UNREACHABLE}, because HF_HUB_OFFLINE is set"
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except errors.HFValidationError:
        return "the name cannot be a hub id either"
    except errors.RevisionNotFoundError:
        return f"on the Hugging Face hub it has no revision {revision}"
    except errors.GatedRepoError:
        return "the Hugging Face hub wants its terms accepted first: on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        return f"the Hugging Face hub has no {kind} of that name (if it is private: `hf auth login`)"
    except Exception as error:  # whatever the HTTP library of this version of huggingface_hub raises
        return f"{UNREACHABLE} ({first_line(error)})"
    return ""
