"""Compare schedules of γ: many blocks early or late in a run, against as many visits spread evenly.

python experiments/schedules.py [section.key=value …] [--seeds 0 1 2] [--arms …] [--smoke]

Model, budget of tokens and held-out slices are those of gap.yaml; the learning rate is 1e-4. Every arm trains
8 of 30 blocks on average, for 5 steps at a time, each block at lr / √(8/30). The arms differ only in when the
blocks train. The sampler is defined in this file, because `LISA` takes any object that draws.

Runs are made as `lisatune train` makes them, and measured as `lisatune compare` measures them. Each run
appends its figures as a line to FOLDER/runs.jsonl, and a run with a line is not repeated. Two calls with
different seeds and folders may run side by side.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lisatune.compare.arms import read_comparison
from lisatune.compare.measure import Job, measure_model
from lisatune.compare.slices import Lengths, use_slices, write_slices
from lisatune.files import yaml
from lisatune.lisa.samplers import Sampler, Uniform
from lisatune.methods import Lisa
from lisatune.recipe import Recipe
from lisatune.train.loop import train

NUM_BLOCKS = 30
LR = 1e-4
PERIOD = 5
ARMS: dict[str, tuple[tuple[float, int], ...]] = {
    "8": ((1, 8),),
    "14, then 2": ((0.5, 14), (0.5, 2)),
    "2, then 14": ((0.5, 2), (0.5, 14)),
    "20, then 2": ((1 / 3, 20), (2 / 3, 2)),
    "2, then 20": ((2 / 3, 2), (1 / 3, 20)),
}
"""The parts of each schedule: share of the run, and γ in that part."""


@dataclass(frozen=True)
class Scheduled(Sampler):
    """`Uniform` with a γ for every period. After the last period its γ stays."""

    num_blocks: int
    active: tuple[int, ...]

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return as many different blocks as the schedule has in that period."""
        active = self.active[min(period, len(self.active) - 1)]
        return Uniform(self.num_blocks, active).draw(period, seed=seed)

    def inclusion(self) -> tuple[float, ...]:
        """Return the mean of γ/N over the periods, for every block."""
        return (sum(self.active) / len(self.active) / self.num_blocks,) * self.num_blocks


@dataclass(frozen=True, kw_only=True)
class ScheduledLisa(Lisa):  # type: ignore[misc]  # the experiment alone adds a key to it
    """LISA with a γ for every period."""

    schedule: tuple[int, ...]

    def _sampler(self, model: Any, layers: Any) -> Any:
        return Scheduled(NUM_BLOCKS, self.schedule)


def main() -> None:
    """Make and measure the runs that are missing."""
    parser = argparse.ArgumentParser(description="Compare schedules of the number of active blocks.")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in the comparisons")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of two arms, to see that it runs")
    args = parser.parse_args()
    budget = {"tokens": 100_000}
    if args.smoke:
        args.arms, args.seeds, budget = ["8", "2, then 20"], [0], {"steps": 3 * PERIOD}
        args.folder = args.folder.with_name(args.folder.name + "-smoke")
        args.overrides += ["data.max_length=64", "data.limit=64", "data.validation_limit=16"]

    gap = Path(__file__).with_name("gap.yaml")
    comparison = read_comparison(gap, [*args.overrides, f"optimizer.lr={LR}"])
    asked, slices = args.folder / "recipe.yaml", args.folder / "data"
    text = yaml.dump(comparison.recipe.as_dict())
    if not asked.exists():
        write_slices(comparison, slices)
        asked.write_text(text, encoding="utf-8")
    elif asked.read_text(encoding="utf-8") != text:
        sys.exit(f"{args.folder} has runs of another recipe; give another --folder")
    recipe = replace(comparison.recipe, data=use_slices(comparison.recipe.data, slices))
    figures, lengths = args.folder / "runs.jsonl", Lengths(recipe, budget)
    lines = figures.read_text(encoding="utf-8").splitlines() if figures.exists() else []
    done = {(line["arm"], line["seed"]) for line in map(json.loads, lines)}
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) not in done:
                steps = len(lengths.count_tokens(seed))
                line = {"arm": arm, "seed": seed} | run(recipe, arm, seed, steps, args.folder)
                with figures.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line))


def run(recipe: Recipe, arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train and measure one arm with one seed, then delete the model."""
    output = folder / f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    method = ScheduledLisa(period=PERIOD, seed=seed, schedule=make_schedule(arm, -(-steps // PERIOD)))
    settings = replace(recipe.run, seed=seed, steps=steps, output=str(output), log_every=10)
    summary = train(replace(recipe, method=method, run=settings), overwrite=True)
    job = Job(
        recipe=str(folder / "recipe.yaml"),  # its model, data section and precision are used
        model=str(summary["model"]),
        slices={"test": str(folder / "data" / "test.jsonl")},
        with_memory=False,
        output="",
    )
    measured = measure_model(job)
    shutil.rmtree(summary["model"])
    return {
        "schedule": method.schedule,
        "tokens": summary["tokens"],
        "validation_loss": summary["held_out_loss_after"],
        "test_loss": measured["test_loss"],
        "train_seconds": summary["train_seconds"],
    }


def make_schedule(arm: str, periods: int) -> tuple[int, ...]:
    """Return the γ of every period."""
    active: list[int] = []
    end = 0.0
    for share, count in ARMS[arm]:
        end += share
        active += [count] * (round(end * periods) - len(active))
    return tuple(active)


if __name__ == "__main__":
    main()
