"""The command `lisatune report`, and the report that `lisatune compare` writes."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lisatune.console import print_line

if TYPE_CHECKING:
    from lisatune.compare.results import Results

__all__ = ["report", "write_comparison_report"]


def report(
    *runs: Path, output: Path | None = None, gpu: str | None = None, without_weights: bool = False
) -> int:
    """Make a page with charts, report.html, of runs or of a comparison.

    If a run is missing or unfinished, the page says what is missing:

        lisatune report runs/demo
        lisatune report runs/lisa runs/full --gpu 24GB --output report.html
        lisatune report runs/recipe-compare

    Args:
        runs: Run folders, or the folder of one comparison.
        output: File. Default: report.html in the folder; for several runs, in the current folder.
        gpu: Memory of a card to compare with, such as 24GB. Default: the smallest that fits.
        without_weights: Do not load models to see how far their weights moved.
    """
    from lisatune.files.disk import check_writable
    from lisatune.memory.fit import parse_memory_size
    from lisatune.report.page import write_page

    if not runs:
        raise ValueError("give the folder of a run or of a comparison, such as runs/demo")
    card_bytes = None if gpu is None else parse_memory_size(gpu)
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it")
    comparisons = [run for run in runs if run.name == "results.json" or (run / "compare.json").exists()]
    if comparisons and len(runs) > 1:
        raise ValueError(f"{comparisons[0]} is a comparison; give it alone, or run folders only")
    output = output or (Path("report.html") if len(runs) > 1 else first / "report.html")
    check_writable(output, "--output")
    if comparisons:
        from lisatune.compare.results import read_results
        from lisatune.report.comparison_page import make_comparison_page

        page = make_comparison_page(read_results(runs[0]), first, card_bytes=card_bytes)
    else:
        from lisatune.report.run_page import make_runs_page

        page = make_runs_page(runs, card_bytes=card_bytes, weights=not without_weights)
    write_page(page, output)
    for problem in page.problems:
        print_line(f"lisatune: {problem}", sys.stderr)
    print_line(str(output))
    return 0


def write_comparison_report(results: "Results", output: Path) -> None:
    """Write report.html. If its packages are missing, warn: the results themselves are on disk."""
    from lisatune.report.comparison_page import make_comparison_page
    from lisatune.report.page import write_page

    try:
        write_page(make_comparison_page(results, output), output / "report.html")
    except ImportError as error:
        warnings.warn(f"there is no report.html: {error}", stacklevel=2)
