"""How long training stands still at a checkpoint, without and with `run.save_async`.

    python benchmarks/saving.py --out /path/on/the/disk
    python benchmarks/saving.py --tiny

Trains SmolLM2-135M in full (float32 weights, two moments in float32) and saves after every second step. For
each way it prints what `Saver` took of the loop's time at each checkpoint, and the time of a step.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

from lisatune.train.loop import train
from lisatune.train.recipe_file import recipe_without_file
from lisatune.train.saving import Saver

COMMON = [
    "data.train=python-docs",
    "data.limit=32",
    "data.max_length=256",
    "data.validation_share=0",
    "method.name=full",
    "run.batch_size=1",
    "run.samples=0",
    "run.save_every=2",
    "run.check_memory=false",
]


class TimedSaver(Saver):
    """Notes how long the loop waits for it."""

    waits: dict[int, float]

    def save(self, **options: Any) -> bool:
        """Save as `Saver` does."""
        with self._timed():
            return super().save(**options)

    def collect(self, **options: Any) -> bool:
        """Collect as `Saver` does."""
        if self._begun is None:
            return True
        with self._timed():
            return super().collect(**options)

    @contextlib.contextmanager
    def _timed(self) -> Any:
        step = self._begun.step if self._begun is not None else self._state.step
        began, before = time.perf_counter(), sum(self.waits.values())
        yield
        inside = sum(self.waits.values()) - before  # of a call in this one
        self.waits[step] = self.waits.get(step, 0.0) + time.perf_counter() - began - inside


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="folder for the checkpoints; default: the system's for temporary files")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="train LoRA instead, to try the script")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    steps = 2 * arguments.saves
    keys = [*COMMON, f"run.steps={steps}", "model.name=smollm2-135m"]
    keys += ["method.name=lora"] if arguments.tiny else []
    print("| run.save_async | seconds of each checkpoint that training stood still | median | median step |")
    print("| --- | --- | --: | --: |")
    for is_async in ("false", "true"):
        TimedSaver.waits = {}
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            recipe = recipe_without_file([*keys, f"run.output={folder}/run", f"run.save_async={is_async}"])
            with (
                mock.patch("lisatune.train.loop.Saver", TimedSaver),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                train(recipe)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            newest = Path(folder) / "run" / "checkpoints" / f"step-{steps:06d}"
            size = sum(file.stat().st_size for file in newest.iterdir())
        ends = [json.loads(line)["seconds"] for line in lines if "seconds" in json.loads(line)]
        step = statistics.median(b - a for a, b in itertools.pairwise(ends))
        waits = list(TimedSaver.waits.values())
        shown = ", ".join(f"{each:.2f}" for each in waits)
        print(f"| {is_async} | {shown} | {statistics.median(waits):.2f} | {step:.2f} |", flush=True)
    print(f"\nEach checkpoint has {size / 2**20:,.0f} MiB.")


if __name__ == "__main__":
    main()
