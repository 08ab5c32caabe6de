"""Runs that are killed with SIGKILL again and again, and compared with an undisturbed run.

Every attempt is a process forked from this one, which has done the imports: a tiny run takes a fraction of a
second. An attempt is killed

    by the clock       after a random share of the time that an undisturbed run takes
    before a file      just before the n-th time that it makes, renames, deletes or opens for writing a file
                       in its run folder: checkpoints, metrics, recipe, model
    inside a file      after half of a safetensors file of a checkpoint or of the model was written

and then the command is given again as a user would: with --resume if there is a checkpoint, else --overwrite.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch

import lisatune.files.parts
from faults.runs import STEPS, Killer, at_steps, attempt, die, outcome, prepare
from forks import ended
from lisatune.runs.manifest import newest_checkpoint

KINDS = ("by the clock", "before a file", "inside a file")


@dataclass
class Tally:
    """Results of a series of kills."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    resumes: int = 0
    restarts: int = 0
    """Attempts that started over because nothing was saved yet."""
    finished: int = 0
    """Runs that reached their end and were compared."""
    mismatches: list[str] = field(default_factory=list)
    """Files that were not bit-equal, and attempts that failed without a kill."""

    def add(self, other: "Tally") -> None:
        """Add the results of another series."""
        for kind, count in other.kills.items():
            self.kills[kind] += count
        self.resumes += other.resumes
        self.restarts += other.restarts
        self.finished += other.finished
        self.mismatches += other.mismatches


def before_file(number: int) -> Killer:
    """Die just before the run folder is changed for the `number`-th time, from 1."""

    def set_up(run: Path) -> None:
        count, inside = 0, str(run)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if changes(event, arguments, inside):
                count += 1
                if count == number:
                    die()

        sys.addaudithook(hook)

    return set_up


def changes(event: str, arguments: tuple[Any, ...], inside: str) -> bool:
    """Whether an audit event is about to change a file or folder below `inside`."""
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
        return False
    if event == "open" and not (isinstance(arguments[1], str) and set("wax+") & set(arguments[1])):
        return False
    return isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(inside)


def before_step(number: int) -> Killer:
    """Die before step `number` + 1."""
    return lambda run: at_steps(**{f"_{number}": die})


def inside_file(number: int) -> Killer:
    """Die when half of the `number`-th safetensors file is written, from 1."""

    def set_up(run: Path) -> None:
        count, save_file, write_stream = 0, safetensors.torch.save_file, lisatune.files.parts.write_stream

        def die_in(path: Path) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.truncate(path, path.stat().st_size // 2)
                die()

        def save(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
            save_file(tensors, path, *rest, **options)
            die_in(Path(path))

        def stream(path: Path, *rest: Any) -> None:
            write_stream(path, *rest)
            die_in(path)

        safetensors.torch.save_file, lisatune.files.parts.write_stream = save, stream

    return set_up


def count_changes(recipe: Path, run: Path) -> int:
    """Train undisturbed, and count how often the run folder was changed."""
    counted = run.with_name("changes")

    def count(run: Path) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if changes(event, arguments, str(run)):
                os.write(file, b".")

        file = os.open(counted, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(hook)

    code = ended(attempt(recipe, run, killer=count))
    assert code == 0, f"the undisturbed run failed: {run.with_name(run.name + '.log').read_text()}"
    return counted.stat().st_size


class Series:
    """One recipe, its undisturbed run, and as many runs with kills as are wanted."""

    def __init__(self, folder: Path, variant: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.variant, self.folder = variant, folder
        self.recipe = prepare(folder, variant)
        self.num_changes = count_changes(self.recipe, folder / "straight")
        shutil.rmtree(folder / "straight")
        started = time.monotonic()
        assert ended(attempt(self.recipe, folder / "straight")) == 0
        self.seconds = time.monotonic() - started
        self.straight = outcome(folder / "straight")

    def kill_and_compare(self, generator: random.Random, kinds: list[str]) -> Tally:
        """Run with one kill of each kind in turn, then to the end, and compare all files."""
        tally, run = Tally(), self.folder / "killed"
        for kind in (*kinds, None):
            flags = self._flags(run, tally)
            killer, delay = self._killer(generator, kind)
            pid = attempt(self.recipe, run, *flags, killer=killer)
            code = ended(pid, delay)
            if code is None:
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            if code == -signal.SIGKILL and kind is not None:
                tally.kills[kind] += 1
            elif code == 0:
                break  # reached its end before the kill
            else:
                log = run.with_name(run.name + ".log").read_text()[-2000:]
                tally.mismatches.append(f"{self.variant}: attempt {flags} ended with {code}: {log}")
                break
        else:
            raise AssertionError("the last attempt is not killed")
        if not tally.mismatches:
            tally.finished += 1
            tally.mismatches += [f"{self.variant}: {what}" for what in self.differences(run)]
        shutil.rmtree(run, ignore_errors=True)
        return tally

    def _flags(self, run: Path, tally: Tally) -> list[str]:
        if not run.exists():
            return []
        if newest_checkpoint(run / "checkpoints"):
            tally.resumes += 1
            return ["--resume"]
        tally.restarts += 1
        return ["--overwrite"]

    def _killer(self, generator: random.Random, kind: str | None) -> tuple[Killer | None, float | None]:
        if kind == "by the clock":
            return None, generator.uniform(0, self.seconds)
        if kind == "before a file":
            return before_file(generator.randint(1, self.num_changes)), None
        if kind == "inside a file":
            return inside_file(generator.randint(1, 3 * STEPS)), None
        return None, None

    def differences(self, run: Path) -> list[str]:
        """List the files of a finished run that are not bit-equal to those of the undisturbed run."""
        now, was = outcome(run), self.straight
        different = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
        return [f"{name} was {was.get(name)!r:.200}, is {now.get(name)!r:.200}" for name in different]


def assert_as_undisturbed(series: "Series", run: Path) -> None:
    """Compare all files of a run with those of the undisturbed run."""
    assert series.differences(run) == []
