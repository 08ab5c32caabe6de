"""The second half of Table 4's small sibling: fine-tune each model of a comparison on GSM8K, by one recipe.

python experiments/then_sft.py runs/continual-compare gsm8k.jsonl [section.key=value …] [--evaluate TASKS]

Takes the chosen run of the first seed of each arm, whose models `lisatune compare --keep-models` has kept,
and the model that the comparison began with. Prints the loss on held-out maths text before, the loss on
held-out GSM8K rows and scores after, and writes them to runs/then-sft/results.json. A finished run is not
repeated.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lisatune.compare import read_results
from lisatune.train import load_recipe, train

RECIPE = Path(__file__).parents[1] / "recipes" / "then-sft.yaml"
OUTPUT = Path("runs") / "then-sft"


def main(arguments: list[str]) -> int:
    """Fine-tune the models one after another."""
    if len(arguments) < 2:
        sys.exit(__doc__)
    tasks = None
    if "--evaluate" in arguments:
        at = arguments.index("--evaluate")
        tasks = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    folder, rows, *overrides = arguments
    results = read_results(folder)
    models: dict[str, tuple[str, float | None]] = {
        "before": (results["recipe"]["model"]["name"], results["base"]["test_loss"])
    }
    for run in results["runs"]:
        kept = Path(folder) / run["folder"] / "model"
        if run["chosen"] and run["seed"] == results["seeds"][0] and kept.is_dir():
            models[run["arm"]] = (str(kept), run["test_loss"])
    found: list[dict[str, Any]] = []
    for arm, (model, loss) in models.items():
        name = "".join(letter if letter.isalnum() else "-" for letter in arm)
        given = [f"model.name={model}", f"data.train={rows}", f"run.output={OUTPUT / name}", *overrides]
        given += [f"run.evaluate={tasks}"] if tasks else []
        summary = train(load_recipe(RECIPE, given), resume="auto")
        found.append(
            {
                "arm": arm,
                "text_loss": loss,
                "gsm8k_loss": summary["held_out_loss_after"],
                "scores": summary.get("scores", {}),
            }
        )
        (OUTPUT / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for each in found:
        scores = ", ".join(f"{name} {score['value']:.3f}" for name, score in each["scores"].items())
        print(f"{each['arm']:<30} text {each['text_loss']:.4f}  gsm8k {each['gsm8k_loss']:.4f}  {scores}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
