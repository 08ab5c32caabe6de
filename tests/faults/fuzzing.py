"""Changed inputs, from a seed: recipes, overrides, records of every format, checkpoints, model files.

A case takes a good input, changes it in one to four places, by its structure or by its bytes, and gives it to
the code that reads such input. The code may accept it, or refuse it in one sentence (`USER_ERRORS`). Anything
else, a process that hangs, or a new file is a failure.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.lr_scheduler import LambdaLR

import tiny
import tiny_run
from faults import changing
from faults.formats import FORMS, ROWS
from lisatune import LISA, AdamW
from lisatune.cli import app
from lisatune.console import USER_ERRORS
from lisatune.data import shard_reader
from lisatune.data.records import read_records
from lisatune.data.streaming import Stream
from lisatune.data.tokens import is_chat, tokenize
from lisatune.files import yaml
from lisatune.models.load import load_model, load_tokenizer
from lisatune.recipe import DataConfig
from lisatune.runs.checkpoint import load_checkpoint, save_checkpoint
from lisatune.runs.manifest import FILES, newest_checkpoint, write_manifest
from lisatune.train.recipe_file import load_recipe
from lisatune.train.resume import RunState, read_state
from pair_runs import read_pairs, tokenize_pairs

SECONDS = 20
"""Seconds after which a case counts as hanging."""


class Hangs(BaseException):
    """A case took too long."""


@dataclass
class Outcome:
    """Results of the cases of one kind."""

    cases: int = 0
    taken: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


# ---- the inputs


class Fuzz:
    """Good inputs in a folder, and how each kind of case is made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = tiny_run.write_model(folder / "model")
        self.rows = tiny_run.write_rows(folder / "rows.jsonl")
        self.recipe = tiny_run.write_recipe(folder, self.model, self.rows, plans=True)
        self.tokenizer = load_tokenizer(str(self.model))
        self.checkpoint = self._save()
        self.work = folder / "work"
        self.kinds: dict[str, Callable[[random.Random], None]] = {
            "recipe": self.feed_recipe,
            "override": self.feed_override,
            "mixture": self.feed_mixture,
            **{f"records, {form}": self._records(form) for form in FORMS},
            "stream": self.feed_stream,
            "manifest.json": self.feed_manifest,
            "state.json": self.feed_state,
            "checkpoint, safetensors": self.feed_checkpoint_tensors,
            "model, safetensors": self.feed_model,
        }

    def run(self, kind: str, seed: int, outcome: Outcome) -> None:
        """Make and feed one case; its kind and seed are enough to make it again."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        outcome.cases += 1
        before = self._names()
        here = os.getcwd()  # noqa: PTH109
        handler = signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        os.chdir(self.work)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                self.kinds[kind](random.Random(f"{kind} {seed}"))
            outcome.taken += 1
        except USER_ERRORS as error:
            outcome.refused += 1
            if not str(error).strip():
                outcome.failures.append(f"{kind} {seed}: {type(error).__name__} without a word")
        except (Exception, Hangs) as error:
            outcome.failures.append(f"{kind} {seed}: {type(error).__name__}: {error}"[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            os.chdir(here)
        if new := self._names() - before:
            outcome.failures.append(f"{kind} {seed}: left {sorted(new)}")

    def _names(self) -> set[str]:
        return {str(path) for path in self.folder.rglob("*") if self.work not in (path, *path.parents)}

    # -- recipes

    def feed_recipe(self, generator: random.Random) -> None:
        path = self.work / "recipe.yaml"
        text = self.recipe.read_text()
        if generator.random() < 0.5:
            path.write_bytes(changing.mutate(text.encode(), generator))
        else:
            path.write_text(yaml.dump(changing.mutate_value(yaml.load(text), generator)))
        self._check(path)

    def feed_mixture(self, generator: random.Random) -> None:
        """Check a recipe with a changed list of sources."""
        recipe = yaml.load(self.recipe.read_text())
        sources = [
            {"path": str(self.rows), "weight": 2, "limit": 8, "fields": {"system": "input"}},
            {"path": str(self.rows), "split": "other", "weight": 0.5, "kind": "alpaca"},
        ]
        recipe["data"]["train"] = changing.mutate_value(sources, generator)
        path = self.work / "recipe.yaml"
        path.write_text(yaml.dump(recipe))
        self._check(path)

    def feed_override(self, generator: random.Random) -> None:
        full = load_recipe(self.recipe).as_dict()
        section = generator.choice(list(full))
        key = generator.choice(list(full[section]))
        if (section, key) in (
            ("data", "train"),
            ("data", "validation"),
            ("model", "name"),
            ("run", "output"),
        ):
            key = "revision" if section == "model" else "split" if section == "data" else "seed"
        override = f"{section}.{key}={generator.choice(changing.VALUES)}"
        if generator.random() < 0.3:
            override = changing.mutate(override.encode(errors="replace"), generator).decode(errors="replace")
        self._check(self.recipe, override)

    def _check(self, path: Path, *overrides: str) -> None:
        """Run `lisatune check` in this process; it loads model and data if it can read the recipe."""
        load_recipe(path, overrides)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = app.main(["check", str(path), *overrides])
        if code not in (0, 2):
            raise AssertionError(f"exit code {code}: {said.getvalue()}")

    # -- records

    def _records(self, form: str) -> Callable[[random.Random], None]:
        def feed(generator: random.Random) -> None:
            kind = generator.choice(list(ROWS))
            path = FORMS[form](self.work, ROWS[kind], generator)
            on_bad_row = generator.choice(["error", "skip"])
            text_only = kind == "images" or generator.random() < 0.5
            if kind == "pairs":
                pairs = read_pairs(str(path), on_bad_row=on_bad_row, text_only=text_only)
                tokenize_pairs(pairs.rows, self.tokenizer, max_length=64)
                return
            records = read_records(str(path), on_bad_row=on_bad_row, text_only=text_only)  # type: ignore[arg-type]
            loss_on: Any = "auto"
            if is_chat(records.rows[0]):
                loss_on = generator.choice(["auto", "all", ("user",), ("assistant", "tool")])
            tokenize(records, self.tokenizer, max_length=64, loss_on=loss_on)

        return feed

    def feed_stream(self, generator: random.Random) -> None:
        """Stream from one to three files of changed records."""
        kind = generator.choice([kind for kind in ROWS if kind != "pairs"])
        for number in range(generator.randint(1, 3)):
            folder = self.work / str(number)
            folder.mkdir()
            generator.choice(list(FORMS.values()))(folder, ROWS[kind], generator)
        on_bad_row: Any = generator.choice(["error", "skip"])
        data = DataConfig(train=str(self.work), streaming=True, window=4, on_bad_row=on_bad_row)
        stream = Stream(data, self.tokenizer, seed=0, batch_size=2, cache=self.work / "cache")
        # Else a damaged file would be read again after some seconds.
        with patch.object(shard_reader, "WAITS", ()), contextlib.closing(stream):
            stream.seek([])
            for micro_step in range(5):
                stream.batch(micro_step)

    # -- checkpoints

    def _save(self) -> Path:
        parts = self._parts()
        return save_checkpoint(self.folder / "checkpoints", step=3, extra=vars(RunState(step=3)), **parts)

    def _parts(self) -> dict[str, Any]:
        model = tiny.llama(blocks=2, hidden=8)
        optimizer = AdamW(model.parameters(), lr=1e-3)
        LISA(model, optimizer, active=1, period=2)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        tiny.fit(model, optimizer, 3, after=lambda step: scheduler.step())
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def _load(self, path: Path) -> None:
        """Find and load a checkpoint, then train two steps with it."""
        newest_checkpoint(path.parent)
        parts = self._parts()
        read_state(path, load_checkpoint(path, **parts))
        after = lambda step: parts["scheduler"].step()  # noqa: E731
        tiny.fit(parts["model"], parts["optimizer"], range(3, 5), after=after)

    def _changed(self, generator: random.Random, name: str, change: Callable[..., bytes]) -> None:
        shutil.rmtree(self.work / self.checkpoint.name, ignore_errors=True)
        path = shutil.copytree(self.checkpoint, self.work / self.checkpoint.name)
        (path / name).write_bytes(change((path / name).read_bytes(), generator))
        if name != "manifest.json" and generator.random() < 0.8:
            write_manifest(path, 3)  # as an attacker would
        self._load(path)

    def feed_manifest(self, generator: random.Random) -> None:
        self._changed(generator, "manifest.json", changing.mutate_json)

    def feed_state(self, generator: random.Random) -> None:
        self._changed(generator, "state.json", changing.mutate_json)

    def feed_checkpoint_tensors(self, generator: random.Random) -> None:
        self._changed(generator, generator.choice(FILES[:3]), changing.mutate_safetensors)

    # -- models

    def feed_model(self, generator: random.Random) -> None:
        folder = shutil.copytree(self.model, self.work / "model")
        file = folder / "model.safetensors"
        file.write_bytes(changing.mutate_safetensors(file.read_bytes(), generator))
        load_model(str(folder))


def _hang(*_: Any) -> None:
    raise Hangs(f"took more than {SECONDS} s")
