"""Print the chosen runs of finished comparisons, one per line, as experiments/runs.jsonl keeps them.

python experiments/gather.py NAME FOLDER… >> experiments/runs.jsonl       or, as one list, --json NAME FOLDER…

NAME is that of the data. FOLDER holds results.json, or folders that do. Runs that failed or are missing are
left out, and so are those of learning rates that were not chosen.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lisatune.compare import read_results

FIGURES = ("lr", "seed", "tokens", "validation_loss", "test_loss", "general_loss")


def gather(data: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a line for each chosen run of one comparison."""
    results = read_results(folder)
    arms = {arm["name"]: arm for arm in results["arms"]}
    for run in results["runs"]:
        if run["chosen"] and run["test_loss"] is not None:
            arm, figures = arms[run["arm"]], dict(run)
            memory = arm["memory"]
            yield {
                "data": data,
                "arm": run["arm"],
                "overrides": arm["overrides"],
                **{key: figures[key] for key in FIGURES},
                "step_peak_bytes": memory and memory["peak_bytes"],
                "trainable": run["trainable"],
                "train_seconds": run["train_seconds"],
            }


def main(arguments: list[str]) -> None:
    """Print the lines of all folders."""
    data, *folders = [each for each in arguments if each != "--json"] or [""]
    if not folders:
        sys.exit(__doc__)
    lines: list[dict[str, Any]] = []
    for folder in folders:
        found = sorted(path.parent for path in Path(folder).rglob("results.json"))
        if not found:
            sys.exit(f"{folder} has no results.json")
        lines += [line for each in found for line in gather(data, each)]
    if "--json" in arguments:
        print(json.dumps(lines, ensure_ascii=False, indent=1))
    else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
