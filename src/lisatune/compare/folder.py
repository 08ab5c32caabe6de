"""What a folder is one comparison by, in compare.json, and the refusal of any other.

Arms, learning rates and seeds may be added to a comparison; what all its runs share may not change.
"""

import json
from pathlib import Path
from typing import Any

from lisatune.compare.arms import Comparison
from lisatune.compare_results import Data
from lisatune.disk import replace_file
from lisatune.runs import differences

__all__ = ["check_folder", "claim"]

NO_MATTER = frozenset(
    ("run.output", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.report_to", "optimizer.lr")
)
"""Keys that a comparison may be gone on with changed: they change no result, or are set for each run."""


def _identity(comparison: Comparison) -> dict[str, Any]:
    """What a folder is one comparison by."""
    recipe = comparison.recipe.as_dict()
    arms = {
        arm.name: {
            section: values
            for section, values in arm.recipe.as_dict().items()
            if section in ("method", "optimizer", "run")
        }
        for arm in comparison.arms
    }
    shared = {section: values for section, values in recipe.items() if section != "method"}
    shared["compare"] = {
        "budget": ", ".join(f"{kind}={count}" for kind, count in comparison.budget.items()) or "the recipe's",
        "general": comparison.general,
        "general_limit": comparison.general_limit,
        "evaluations": comparison.evaluations,
    }
    return {"shared": shared, "arms": arms}


def check_folder(output: Path, comparison: Comparison) -> None:
    """Refuse a folder that holds another comparison, or something else.

    Raises:
        ValueError: with what differs.
    """
    file = output / "compare.json"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if not file.exists():
        if output.exists() and any(entry.name not in (".lock", "data") for entry in output.iterdir()):
            raise ValueError(f"{output} has other files than a comparison's; name another --output")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["asked"]
        changed = differences(before["shared"], _identity(comparison)["shared"], NO_MATTER)
        known = before["arms"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged; name another --output") from None
    for name, arm in _identity(comparison)["arms"].items():
        if name in known:
            changed += [f"{name}: {each}" for each in differences(known[name], arm, NO_MATTER)]
    if changed:
        raise ValueError(
            f"{output} holds another comparison: {'; '.join(dict.fromkeys(changed))}; undo that, or name "
            "another --output"
        )


def claim(output: Path, comparison: Comparison, data: Data) -> None:
    """Write down what the folder is for, and check that its data is what it was."""
    file = output / "compare.json"
    asked = _identity(comparison)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, sha256 in before["sha256"].items() if data["sha256"].get(name) != sha256]
        if changed:
            raise ValueError(f"{output / 'data' / changed[0]} was changed; name another --output")
        asked["arms"] = before["asked"]["arms"] | asked["arms"]
    replace_file(file, json.dumps({"asked": asked, "sha256": data["sha256"]}, indent=1) + "\n")
