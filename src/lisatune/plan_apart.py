"""`lisatune plan` in a process of its own: for one that has no memory left, or has joined real ranks."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lisatune import plain_yaml
from lisatune.recipe import Recipe

__all__ = ["plan_apart"]


def plan_apart(recipe: Recipe, *options: str, seconds: float) -> dict[str, Any]:
    """Plan a recipe.

    Args:
        recipe: its `run.device` is a kind of device.
        options: of the command.
        seconds: longest to wait.

    Returns:
        What the command prints with --json.

    Raises:
        subprocess.SubprocessError: the command failed, or took too long.
        ValueError, OSError: it could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        plain = replace(recipe, run=replace(recipe.run, report_to=()))
        path.write_text(plain_yaml.dump(plain.as_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "lisatune.cli", "plan", str(path), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    values: dict[str, Any] = json.loads(done.stdout)
    return values
