"""The records that all runs of a comparison share, and how many tokens each step trains on.

The recipe's held-out records are halved by a hash of their prompts (`split_records`, seed 0, share 0.5), so
that no prompt is in both halves. The validation slice chooses learning rates, the test slice gives the final
figures. Neither depends on the seeds of the runs. All slices are written once, and every run reads those
files.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path

from lisatune.compare.arms import Comparison
from lisatune.compare.results import Slices
from lisatune.console import plural
from lisatune.data.batches import Order
from lisatune.data.prepare import prepare_data
from lisatune.data.readers import read_data
from lisatune.data.records import Record, read_records
from lisatune.data.splitting import split_records
from lisatune.files.disk import sha256_of, write_aside
from lisatune.models.load import load_tokenizer
from lisatune.recipe import DataConfig, Recipe, SourceConfig

__all__ = ["Lengths", "read_slices", "use_slices", "write_slices"]

TEST_SHARE = 0.5


def write_slices(comparison: Comparison, folder: Path) -> None:
    """Read the recipe's data and write train.jsonl, validation.jsonl, test.jsonl and general.jsonl.

    Of a mixture, each source gets a file of its own, train-NUMBER-NAME.jsonl.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or too little is held out to halve it.
    """
    train, held_out = read_data(comparison.recipe)
    try:
        validation, test = split_records(held_out, TEST_SHARE, seed=0)
    except ValueError:
        raise ValueError(
            "held-out data must have 2 or more different prompts, one half to choose learning rates and one "
            f"to report; {held_out.source} has {plural(len(held_out.rows), 'record')}; hold out more"
        ) from None
    names = _name_slices(comparison.recipe.data)
    slices: dict[str, Iterable[Record]] = dict(zip(names, train, strict=True))
    slices |= {"validation": validation.rows, "test": test.rows}
    if comparison.general is not None:
        limit, text_only = comparison.general_limit, comparison.recipe.data.text_only
        slices["general"] = read_records(comparison.general, limit=limit, text_only=text_only).rows
    with write_aside(folder) as aside:
        for name, rows in slices.items():
            with (aside / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_slices(folder: Path) -> Slices:
    """Count the records of each slice, and hash the files."""
    paths = sorted(folder.glob("*.jsonl"))
    counts = {path.stem: _count_lines(path) for path in paths}
    return Slices(
        train=sum(count for name, count in counts.items() if re.fullmatch(r"train(-\d+-.*)?", name)),
        validation=counts["validation"],
        test=counts["test"],
        general=counts.get("general"),
        sha256={path.name: sha256_of(path) for path in paths},
    )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def use_slices(config: DataConfig, folder: Path) -> DataConfig:
    """Return the section `data` that every run gets: the recipe's, with the slices as its data."""
    files = [str(folder / f"{name}.jsonl") for name in _name_slices(config)]
    shares = zip(files, config.sources, strict=True)
    mixed = tuple(
        SourceConfig(path=file, weight=source.weight, epochs=source.epochs) for file, source in shares
    )
    return replace(
        config,
        train=files[0] if isinstance(config.train, str) else mixed,
        validation=str(folder / "validation.jsonl"),
        kind="auto",
        fields={},
        split="train",
        limit=None,
        validation_limit=None,
    )


def _name_slices(config: DataConfig) -> list[str]:
    """Name the slices of training records: train, or one for each source of a mixture."""
    if isinstance(config.train, str):
        return ["train"]
    stems = (re.sub(r"[^\w-]+", "-", Path(source.path).name.partition(".")[0]) for source in config.sources)
    return [f"train-{number}-{stem}" for number, stem in enumerate(stems, 1)]


class Lengths:
    """How many tokens each step of a run trains on, for any seed.

    Args:
        recipe: the comparison's recipe, with the slices as its data and the batch size of the runs.
        budget: `tokens` or `steps`. Empty: the recipe's length.

    Raises:
        ValueError: the data cannot be used with the recipe's tokenizer.
    """

    def __init__(self, recipe: Recipe, budget: dict[str, int]) -> None:
        tokenizer = load_tokenizer(**recipe.model.tokenizer)
        data = prepare_data(replace(recipe, run=replace(recipe.run, samples=0)), tokenizer)
        self._lengths, self._shares = data.train.rows.lengths, data.order.shares
        self._run = recipe.run
        self._steps, self._budget = data.steps, budget

    def count_tokens(self, seed: int) -> list[int]:
        """Count the tokens trained on up to each step of a run with this seed.

        The list is as long as the run. A budget of tokens ends with the step that reaches it.
        """
        order = Order(len(self._lengths), self._run.batch_size, seed, shares=self._shares)
        micro_steps = self._run.accumulation

        def step_tokens(step: int) -> int:
            micro = range(step * micro_steps, (step + 1) * micro_steps)
            return sum(int(self._lengths[order.batch(index)].sum()) for index in micro)

        steps = self._budget.get("steps", self._steps)
        totals = []
        for step, total in enumerate(accumulate(map(step_tokens, count())), 1):
            totals.append(total)
            if total >= self._budget["tokens"] if "tokens" in self._budget else step == steps:
                break
        return totals
