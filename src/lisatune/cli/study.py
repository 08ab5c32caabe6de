"""The command `lisatune study`: what training does to each layer, and files that samplers read."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from lisatune.console import print_line

__all__ = ["norms", "outliers"]


def norms(
    recipe: Path,
    /,
    *overrides: str,
    rank: int = 128,
    lora_lr: float | None = None,
    every: int = 1,
    unit: Literal["block", "module"] = "block",
    output: Path | None = None,
) -> int:
    """Measure how far LoRA and full fine-tuning move each layer (Fig. 2 of the LISA paper).

    Trains both with the recipe's data, and writes a JSON file that `method.sampler: weight-norm` reads, and a
    page with charts beside it:

        lisatune study norms recipe.yaml run.steps=100
        lisatune train recipe.yaml method.sampler=weight-norm method.sampler_file=runs/recipe-norms.json

    Args:
        recipe: YAML file.
        overrides: `section.key=value`; wins over the file.
        rank: Rank of the adapters.
        lora_lr: Learning rate of LoRA. Default: optimizer.lr, as for full fine-tuning.
        every: Steps between two measurements.
        unit: What gets a probability: blocks, or modules of blocks.
        output: JSON file. Default: run.output with "-norms.json" behind it, so runs/NAME-norms.json.
    """
    from lisatune.study.norms import describe_skew, study_norms
    from lisatune.train.recipe_file import load_recipe

    config = load_recipe(recipe, overrides)
    path = _check_output(output or Path(f"{Path(config.run.output or '')}-norms.json"))
    study = study_norms(
        config,
        rank=rank,
        lora_lr=lora_lr,
        every=every,
        unit=unit,
        print_line=lambda line: print_line(line, sys.stderr),
    )
    _write(study, path)
    for sentence in describe_skew(study):
        print_line(sentence)
    print_line(str(path))
    try:
        from lisatune.report.norms_page import make_norms_page
        from lisatune.report.page import write_page

        write_page(make_norms_page(study), path.with_suffix(".html"))
        print_line(str(path.with_suffix(".html")))
    except ImportError as error:
        warnings.warn(f"there is no page with charts: {error}", stacklevel=2)
    return 0


def outliers(
    recipe: Path,
    /,
    *overrides: str,
    rows: int = 128,
    threshold: float = 13.0,
    unit: Literal["block", "module"] = "block",
    output: Path | None = None,
) -> int:
    """Measure the share of outliers in the weights of each block (OwLore), in one pass over a few rows.

    Writes a JSON file that `method.sampler: outlier` reads:

        lisatune study outliers recipe.yaml
        lisatune train recipe.yaml method.sampler=outlier method.sampler_file=runs/recipe-outliers.json

    Args:
        recipe: YAML file.
        overrides: `section.key=value`; wins over the file.
        rows: Calibration rows, the first ones of the training data.
        threshold: An entry is an outlier above so many times the mean of its layer.
        unit: What gets a probability: blocks, or modules of blocks.
        output: JSON file. Default: run.output with "-outliers.json" behind it, so runs/NAME-outliers.json.
    """
    from lisatune.study.outliers import study_outliers
    from lisatune.train.recipe_file import load_recipe

    config = load_recipe(recipe, overrides)
    path = _check_output(output or Path(f"{Path(config.run.output or '')}-outliers.json"))
    study = study_outliers(config, rows=rows, threshold=threshold, unit=unit)
    _write(study, path)
    print_line(str(path))
    return 0


def _check_output(path: Path) -> Path:
    """Refuse a file that cannot be written, before anything trains."""
    if path.is_dir() or path.suffix != ".json":
        raise ValueError(f"--output {path} must be a file that ends in .json")
    from lisatune.files.disk import check_writable

    check_writable(path, "--output")
    return path


def _write(study: dict[str, Any], path: Path) -> None:
    from lisatune.files.disk import explain_write_errors, replace_file

    with explain_write_errors(path, "--output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
