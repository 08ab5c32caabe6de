"""The command `lisatune compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["compare"]


def compare(
    recipe: Path,
    /,
    *overrides: str,
    methods: str | None = None,
    lr: str | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    general: str | None = None,
    reference: str | None = None,
    output: Path | None = None,
    keep_models: bool = False,
    retry_failed: bool = False,
) -> int:
    """Compare methods on the same records and tokens, each with its own best learning rate.

    Held-out records are halved: one half chooses learning rates, the other gives the final figures.
    Given again, the command goes on where it was; with a finished folder it prints the results:

        lisatune compare recipe.yaml --methods full,lora:rank=128,lisa:active=8 --lr 1e-5,1e-4
        lisatune compare experiments/table2.yaml --seeds 3 --budget tokens=100000
        lisatune compare runs/table2-compare --reference full

    Args:
        recipe: YAML file, also with a section `compare`; or the folder of a comparison.
        overrides: `section.key=value`; wins over the file, for every arm.
        methods: Arms joined by commas: NAME, NAME:key=value+key=value, or names from the file.
        lr: Learning rates to choose from, joined by commas. Default: the recipe's alone.
        seeds: Runs of each arm at its chosen learning rate, with seeds counted up from run.seed.
        budget: Length of every run, tokens=N or steps=N. Default: the recipe's.
        general: Text to measure forgetting on, given like data.train.
        reference: Arm to compare the others to. Default: the first of method full.
        output: Folder. Default: runs/NAME-compare.
        keep_models: Keep the models of chosen runs.
        retry_failed: Make failed runs again.
    """
    from lisatune.compare.arms import read_comparison

    if recipe.is_dir() or recipe.name == "results.json":
        return _show(recipe, reference)
    comparison = read_comparison(
        recipe,
        overrides,
        methods=methods,
        lr=lr,
        seeds=seeds,
        budget=budget,
        general=general,
        reference=reference,
    )
    from lisatune.cli.report import write_comparison_report
    from lisatune.compare.stages import compare as run
    from lisatune.compare.tables import print_results

    output = output or Path("runs") / f"{comparison.name}-compare"
    results = run(comparison, output, keep_models=keep_models, retry_failed=retry_failed)
    write_comparison_report(results, output)
    print_results(results, output)
    return 0 if any(arm["test_loss"] for arm in results["arms"]) else 1


def _show(path: Path, reference: str | None) -> int:
    """Print the results in a folder again, compared to another arm if asked."""
    from lisatune.compare.outcome import compare_to
    from lisatune.compare.results import read_results
    from lisatune.compare.tables import print_results

    results = read_results(path)
    compare_to(results, reference or results["reference"])
    print_results(results, path if path.is_dir() else path.parent)
    return 0
