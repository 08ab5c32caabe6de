"""The runs of a comparison: their files, and the processes that train and measure them.

    runs/ARM_lr=LR_seed=SEED.yaml            the recipe that `lisatune train` gets
    runs/ARM_lr=LR_seed=SEED/                the run folder
    runs/ARM_lr=LR_seed=SEED.log             the output of the run's processes
    runs/ARM_lr=LR_seed=SEED.measured.json   measurements of the model that the run wrote
    runs/ARM_lr=LR_seed=SEED.failed.json     why the run failed

A process gets no Ctrl-C from the terminal: Ctrl-C is passed on to it, so that it can save a checkpoint first.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.compare.arms import Arm, shift_seed
from lisatune.compare.measure import Job, Measured
from lisatune.console import DEFECT, INTERRUPTED, TERMINATED
from lisatune.files import yaml
from lisatune.files.disk import replace_file
from lisatune.recipe import DataConfig

__all__ = [
    "CONTINUE_HINT",
    "NOT_FINITE",
    "FailedError",
    "Run",
    "call",
    "check_exit",
    "measure_base",
    "measure_run",
    "train_run",
]

CONTINUE_HINT = "give the same command to continue"

NOT_FINITE = "validation loss after training is not finite; lower the learning rate"
"""Why a run failed that came to its end."""

POLL_SECONDS = 0.5

Tasks = tuple[str | None, str | None]
"""Benchmark tasks, as `run.evaluate`, and the folder of their questions."""

TAIL_BYTES = 2**16
"""Read this much of the end of metrics.jsonl to find its last line."""


class FailedError(Exception):
    """A process ended without a result. The message is one sentence."""


@dataclass(frozen=True)
class Run:
    """An arm with a learning rate and a seed, and its files."""

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
        """Return the file beside the run folder with this ending."""
        return self.folder.with_name(self.folder.name + ending)

    def read_summary(self) -> dict[str, Any] | None:
        """Read summary.json. None if the run has not finished."""
        return _read(self.folder / "summary.json")

    def read_measured(self) -> Measured | None:
        """Read the measurements of the run's model. None if there are none."""
        values: Any = _read(self.beside(".measured.json"))
        measured: Measured | None = values
        return measured

    def read_failure(self) -> str | None:
        """Read why the run failed. None if it has not failed."""
        values = _read(self.beside(".failed.json"))
        return None if values is None else str(values["reason"])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the complete lines of metrics.jsonl."""
        lines = []
        with suppress(FileNotFoundError, ValueError):  # the last line may be half written
            for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        return lines

    def read_last_step(self) -> int:
        """Read the step of the last complete line of metrics.jsonl, from its end. 0 if there is none."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - TAIL_BYTES))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            with suppress(ValueError):  # half written, or cut where reading began
                return int(json.loads(line)["step"])
        return 0

    def fail(self, reason: str) -> None:
        """Record the failure, and delete checkpoints and model, which nothing will use."""
        replace_file(self.beside(".failed.json"), json.dumps({"reason": reason}))
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.drop_model()

    def forget(self) -> None:
        """Delete the run's results, so that it starts over."""
        for ending in (".failed.json", ".measured.json"):
            self.beside(ending).unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def drop_model(self) -> None:
        """Delete the model that the run wrote."""
        shutil.rmtree(self.folder / "model", ignore_errors=True)

    def write_recipe(self, data: DataConfig, *, base_seed: int, steps: int, evaluations: int) -> Path:
        """Write the recipe that `lisatune train` gets."""
        recipe = self.arm.recipe
        run = dataclasses.replace(
            recipe.run,
            output=str(self.folder),
            seed=self.seed,
            steps=steps,
            eval_every=recipe.run.eval_every or max(1, -(-steps // evaluations)),
            log_every=1,
            evaluate=None,  # chosen runs are asked when they are measured
            evaluate_data=None,
        )
        recipe = dataclasses.replace(
            recipe,
            data=data,
            method=shift_seed(recipe.method, self.seed - base_seed),
            optimizer=dataclasses.replace(recipe.optimizer, lr=self.lr),
            run=run,
        )
        path = self.beside(".yaml")
        replace_file(path, yaml.dump(recipe.as_dict()))
        return path


def train_run(run: Run, recipe: Path, poll: Callable[[], None], lock: int) -> None:
    """Train, from the run's newest checkpoint if there is one.

    Args:
        run: the run.
        recipe: its recipe file.
        poll: is called about twice a second.
        lock: descriptor of a locked file. The process inherits it, and keeps the lock if this one is killed.

    Raises:
        FailedError: the run failed; the message is the reason.
        KeyboardInterrupt: Ctrl-C, after the process has ended.
    """
    resume = any((run.folder / "checkpoints").glob("step-*"))  # only a complete one has this name
    if not resume:
        run.forget()
    command = ["lisatune", "train", str(recipe), "--debug", *(["--resume"] if resume else [])]
    call(command, run.beside(".log"), poll, lock)
    summary = run.read_summary()
    if summary is None:
        raise FailedError("it ended without a summary")
    if summary["held_out_loss_after"] is None:
        raise FailedError(NOT_FINITE)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)


def measure_run(
    run: Run,
    recipe: Path,
    slices: dict[str, str],
    tasks: Tasks,
    poll: Callable[[], None],
    lock: int,
    *,
    with_memory: bool,
) -> None:
    """Measure the model that a run wrote; errors as in `train_run`."""
    job = Job(
        recipe=str(recipe),
        model=str(run.folder / "model"),
        slices=slices,
        evaluate=tasks[0],
        evaluate_data=tasks[1],
        with_memory=with_memory,
        output=str(run.beside(".measured.json")),
    )
    _measure(job, run.beside(""), poll, lock)


def measure_base(
    recipe: Path, slices: dict[str, str], tasks: Tasks, poll: Callable[[], None], lock: int
) -> Measured:
    """Measure the model before training; errors as in `train_run`."""
    output = recipe.with_name("base.measured.json")
    if not output.exists():
        job = Job(
            recipe=str(recipe),
            model=None,
            slices=slices,
            evaluate=tasks[0],
            evaluate_data=tasks[1],
            with_memory=False,
            output=str(output),
        )
        _measure(job, recipe.with_name("base"), poll, lock)
    values: Measured = json.loads(output.read_text(encoding="utf-8"))
    return values


def _measure(job: Job, stem: Path, poll: Callable[[], None], lock: int) -> None:
    file = stem.with_name(stem.name + ".job.json")
    replace_file(file, json.dumps(job, indent=1))
    call(["lisatune.compare.measure", str(file)], stem.with_name(stem.name + ".log"), poll, lock)
    file.unlink()


def call(command: Sequence[str], log: Path, poll: Callable[[], None], lock: int) -> None:
    """Run a module of this package as a process, append its output to `log`; errors as in `check_exit`."""
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
    """Raise an error with the last sentence of a process, unless its exit code is 0.

    Raises:
        FailedError: the process failed.
        KeyboardInterrupt: the process was stopped from outside.
    """
    if code == 0:
        return
    said = [line for line in output.splitlines() if line.startswith("lisatune: ")]
    words = said[-1].removeprefix("lisatune: ").removeprefix("error: ") if said else ""
    if code == DEFECT and words:
        words += "; its log shows the traceback"
    if code in (INTERRUPTED, TERMINATED):
        raise KeyboardInterrupt(f"a run was stopped from outside ({words}); {CONTINUE_HINT}")
    if code < 0:
        name = signal.Signals(-code).name
        cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        words = f"its process was ended by {name}{cause}"
    raise FailedError(words or f"its process ended with exit code {code} and without a message")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Pass Ctrl-C on and wait for the end. A second Ctrl-C stops the process at once, a third kills it."""
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
