"""The comparisons in experiments/ are ones that `lisatune compare` takes."""

import runpy
from pathlib import Path

import pytest

from lisatune.compare.arms import read_comparison

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipe_is_one_that_compare_takes(path: Path) -> None:
    comparison = read_comparison(path)
    assert len({arm.folder for arm in comparison.arms}) == len(comparison.arms) >= 5
    assert comparison.budget["tokens"] >= 100_000
    assert comparison.reference in [arm.name for arm in comparison.arms]
    assert f"experiments/compare.py {path.stem}" in path.read_text()


def test_smoke_shortens_the_runs_and_keeps_the_rest() -> None:
    arguments = runpy.run_path(str(EXPERIMENTS / "compare.py"))["arguments"]
    given = arguments(["draws", "--smoke", "data.train=rows.jsonl"])
    assert given[:3] == ["compare", str(EXPERIMENTS / "draws.yaml"), "data.train=rows.jsonl"]
    assert given[-4:] == ["--lr", "1e-4", "--output", "runs/draws-smoke"]
    assert arguments(["draws"]) == ["compare", str(EXPERIMENTS / "draws.yaml")]
    with pytest.raises(SystemExit, match="name one of draws, epoch, gap, table2, table6, table7"):
        arguments(["table9"])
