"""The command `lisatune compare`."""

from pathlib import Path

from lisatune.cli.options import refuse_unused
from lisatune.console import BAD_INPUT

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
    evaluate: str | None = None,
    evaluate_data: str | None = None,
    reference: str | None = None,
    output: Path | None = None,
    keep_models: bool = False,
    retry_failed: bool = False,
) -> int:
    """Compare methods on the same records and tokens, each at its own best learning rate.

    Held-out records are halved: one half chooses learning rates, the other gives the final figures.
    The same command continues a stopped comparison. Given its folder, it prints the results:

        lisatune compare recipe.yaml --methods full,lora:rank=128,lisa:active=8 --lr 1e-5,1e-4
        lisatune compare experiments/table2.yaml --seeds 3 --budget tokens=100000
        lisatune compare runs/table2-compare --reference full

    Args:
        recipe: YAML file, which may have a section `compare`; or the folder of a comparison.
        overrides: `section.key=value`; wins over the file, in every arm.
        methods: Arms, separated by commas: METHOD, METHOD:key=value+key=value, or arms' names in the file.
        lr: Learning rates to choose from, separated by commas. Default: the recipe's.
        seeds: Number of runs of each arm at its chosen learning rate, with seeds run.seed, run.seed + 1, …
        budget: Length of every run, tokens=N or steps=N. Default: the recipe's.
        general: Text to measure forgetting on, in the forms of data.train.
        evaluate: Benchmark tasks for the base and each chosen run, TASKS or TASKS:limit=N, as in `lisatune
            evaluate --tasks`.
        evaluate_data: Folder with their questions. Default: the hub's.
        reference: Arm to compare the others to. Default: the first arm of method full.
        output: Folder. Default: run.output with "-compare" behind it, so runs/NAME-compare.
        keep_models: Keep the models of chosen runs.
        retry_failed: Repeat failed runs.
    """
    if recipe.is_dir() or recipe.name == "results.json":
        unused: dict[str, object] = {
            "--methods": methods,
            "--lr": lr,
            "--seeds": seeds,
            "--budget": budget,
            "--general": general,
        }
        unused |= {"--evaluate": evaluate, "--evaluate-data": evaluate_data, "--output": output}
        given = {name: value is not None for name, value in unused.items()}
        given |= {"--keep-models": keep_models, "--retry-failed": retry_failed}
        given |= dict.fromkeys(overrides, True)
        refuse_unused(given, f"with the folder {recipe}, which only shows results (its recipe continues it)")
        return _show(recipe, reference)

    from lisatune.cli.report import write_comparison_report
    from lisatune.compare.arms import read_comparison
    from lisatune.compare.stages import compare as run
    from lisatune.compare.tables import print_results

    comparison = read_comparison(
        recipe,
        overrides,
        methods=methods,
        lr=lr,
        seeds=seeds,
        budget=budget,
        general=general,
        evaluate=evaluate,
        evaluate_data=evaluate_data,
        reference=reference,
    )
    beside = Path(comparison.recipe.run.output or f"runs/{comparison.name}")
    output = output or Path(f"{beside}-compare")
    results = run(comparison, output, keep_models=keep_models, retry_failed=retry_failed)
    write_comparison_report(results, output)
    print_results(results, output)
    return 0 if any(arm["test_loss"] for arm in results["arms"]) else BAD_INPUT


def _show(path: Path, reference: str | None) -> int:
    """Print the results of a comparison again, compared to another arm if one is given."""
    from lisatune.compare.outcome import compare_to
    from lisatune.compare.results import read_results
    from lisatune.compare.tables import print_results

    results = read_results(path)
    compare_to(results, reference or results["reference"])
    print_results(results, path if path.is_dir() else path.parent)
    return 0
