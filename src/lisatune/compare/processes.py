"""The runs of a comparison, each in a process of its own, and what is on disk of them.

    runs/ARM_lr=LR_seed=SEED.yaml            its recipe: `lisatune train` of it is the run
    runs/ARM_lr=LR_seed=SEED/                its run folder
    runs/ARM_lr=LR_seed=SEED.log             what its processes printed
    runs/ARM_lr=LR_seed=SEED.measured.json   what was measured of the model it wrote
    runs/ARM_lr=LR_seed=SEED.failed.json     why it failed

A process gets no Ctrl-C from the terminal. It is passed on, so that a run saves a checkpoint and ends first.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.compare.arms import Arm, with_seed
from lisatune.compare.measure import Job, Measured
from lisatune.files import yaml
from lisatune.files.disk import replace_file
from lisatune.recipe import DataConfig

__all__ = ["FailedError", "Run", "call", "check_exit", "measure_base", "measure_run", "train_run"]

POLL_SECONDS = 0.5


class FailedError(Exception):
    """A process ended without a result; the message is one sentence."""


@dataclass(frozen=True)
class Run:
    """An arm with a learning rate and a seed, and where it lies."""

    arm: Arm
    lr: float
    seed: int
    runs: Path
    """Folder of all runs."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.runs / f"{self.arm.folder}_lr={self.lr!r}_seed={self.seed}"

    def beside(self, ending: str) -> Path:
        """File beside the run folder."""
        return self.folder.with_name(self.folder.name + ending)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run ended with; None until it has."""
        return _read(self.folder / "summary.json")

    @property
    def measured(self) -> Measured | None:
        """What was measured of it; None until it was."""
        values: Any = _read(self.beside(".measured.json"))
        measured: Measured | None = values
        return measured

    @property
    def failed(self) -> str | None:
        """Why it failed; None if it has not."""
        values = _read(self.beside(".failed.json"))
        return None if values is None else str(values["reason"])

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, without one that is being written."""
        lines = []
        with suppress(FileNotFoundError, ValueError):  # the last line may be half written
            for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        return lines

    def fail(self, reason: str) -> None:
        """Note that it failed, and drop what only a run that goes on would need."""
        replace_file(self.beside(".failed.json"), json.dumps({"reason": reason}))
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.drop_model()

    def forget(self) -> None:
        """Delete all there is of it, so that it starts anew."""
        for ending in (".failed.json", ".measured.json"):
            self.beside(ending).unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def drop_model(self) -> None:
        """Delete the model it wrote."""
        shutil.rmtree(self.folder / "model", ignore_errors=True)

    def write_recipe(self, data: DataConfig, *, base_seed: int, steps: int, evaluations: int) -> Path:
        """Write the recipe `lisatune train` gets."""
        recipe = self.arm.recipe
        run = dataclasses.replace(
            recipe.run,
            output=str(self.folder),
            seed=self.seed,
            steps=steps,
            eval_every=recipe.run.eval_every or max(1, -(-steps // evaluations)),
            log_every=1,
        )
        recipe = dataclasses.replace(
            recipe,
            data=data,
            method=with_seed(recipe.method, self.seed - base_seed),
            optimizer=dataclasses.replace(recipe.optimizer, lr=self.lr),
            run=run,
        )
        path = self.beside(".yaml")
        replace_file(path, yaml.dump(recipe.as_dict()))
        return path


def train_run(run: Run, recipe: Path, poll: Callable[[], None], lock: int) -> None:
    """Train, from the run's newest checkpoint if there is one.

    Args:
        run: which.
        recipe: its file.
        poll: called a few times a second.
        lock: open file whose lock the process keeps, should this one be killed.

    Raises:
        FailedError: with the reason.
        KeyboardInterrupt: Ctrl-C, after the process has ended.
    """
    resume = any((run.folder / "checkpoints").glob("step-*"))  # has its name once it is complete
    if not resume:
        run.forget()
    command = ["lisatune", "train", str(recipe), "--debug", *(["--resume"] if resume else [])]
    call(command, run.beside(".log"), poll, lock)
    summary = run.summary
    if summary is None:
        raise FailedError("it ended without a summary")
    if summary["held_out_loss_after"] is None:
        raise FailedError("validation loss after training is not finite; lower the learning rate")
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def measure_run(
    run: Run, recipe: Path, slices: dict[str, str], poll: Callable[[], None], lock: int, *, with_memory: bool
) -> None:
    """Measure the model that a run wrote; raises as `train_run`."""
    job = Job(
        recipe=str(recipe),
        model=str(run.folder / "model"),
        slices=slices,
        with_memory=with_memory,
        output=str(run.beside(".measured.json")),
    )
    _measure(job, run.beside(""), poll, lock)


def measure_base(recipe: Path, slices: dict[str, str], poll: Callable[[], None], lock: int) -> Measured:
    """Measure the model before training; raises as `train_run`."""
    output = recipe.with_name("base.measured.json")
    if not output.exists():
        job = Job(recipe=str(recipe), model=None, slices=slices, with_memory=False, output=str(output))
        _measure(job, recipe.with_name("base"), poll, lock)
    values: Measured = json.loads(output.read_text(encoding="utf-8"))
    return values


def _measure(job: Job, stem: Path, poll: Callable[[], None], lock: int) -> None:
    file = stem.with_name(stem.name + ".job.json")
    replace_file(file, json.dumps(job, indent=1))
    call(["lisatune.compare.measure", str(file)], stem.with_name(stem.name + ".log"), poll, lock)
    file.unlink()


def call(command: Sequence[str], log: Path, poll: Callable[[], None], lock: int) -> None:
    """Run a module of ours, its output into `log`, to its end; raises as `check_exit`."""
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_SECONDS)
                    break
                poll()
        except BaseException:
            _stop(process)
            raise
    check_exit(code, log.read_bytes()[start:].decode(errors="replace"))


def check_exit(code: int, output: str) -> None:
    """Raise, unless the exit code of a process is 0, with the sentence it wrote last.

    Raises:
        FailedError: it failed.
        KeyboardInterrupt: someone else stopped it.
    """
    if code == 0:
        return
    said = [line for line in output.splitlines() if line.startswith("lisatune: ")]
    words = said[-1].removeprefix("lisatune: ").removeprefix("error: ") if said else ""
    words = words.replace("--debug shows", "its log shows")
    if code in (130, 143):
        raise KeyboardInterrupt(f"a run was stopped from outside ({words}); give the same command to go on")
    if code < 0:
        name = signal.Signals(-code).name
        cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        words = f"its process was ended by {name}{cause}"
    raise FailedError(words or f"its process ended with exit code {code} and without a word")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Pass Ctrl-C on and wait; another one stops at once, a third kills."""
    for signum in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        process.send_signal(signum)
        try:
            process.wait()
            return
        except KeyboardInterrupt:
            continue
    process.wait()


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return None
