"""Runs that are killed with SIGKILL again and again, and compared with one that nobody disturbed.

Every attempt is a process forked from this one, which has the imports behind it: a tiny run takes a fraction
of a second. An attempt is killed

    by the clock       after a random share of the time that an undisturbed run takes
    before a file      just before the n-th time that it makes, renames, deletes or opens for writing a file
                       in its run folder: checkpoints, metrics, recipe, model
    inside a file      after half of a safetensors file of a checkpoint or of the model was written

and then the command is given again as a user would: --resume where there is a checkpoint, else --overwrite.
"""

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the fork, here and below)
import peft  # noqa: F401
import safetensors.torch
import torch
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
from trl.chat_template_utils import get_training_chat_template  # noqa: F401

import lisatune.train
import tiny_run
from lisatune import cli
from lisatune.manifest import newest_checkpoint

KINDS = ("by the clock", "before a file", "inside a file")

VARIANTS: dict[str, tuple[str, list[str]]] = {
    "lisa": ("{active: 2, period: 2}", []),
    "lisa, state kept": ("{active: 1, period: 3, state: keep}", ["run.accumulation=2"]),
    "lisa, state in host memory": ("{active: 2, period: 3, state: cpu}", ["run.save_every=2"]),
    "lisa, exact bf16, 8-bit moments": (
        "{active: 2, period: 2}",
        ["run.precision=bf16", "optimizer.moments=8bit"],
    ),
    "lisa, stochastic rounding": (
        "{active: 2, period: 2}",
        ["run.precision=bf16", "optimizer.rounding=stochastic"],
    ),
    "lisa, packed, evaluated": ("{active: 2, period: 4}", ["data.packing=true", "run.eval_every=3"]),
    "full": ("{name: full}", ["run.eval_every=4", "run.save_every=3"]),
    "lora": ("{name: lora}", ["run.save_every=2"]),
}
"""Method and overrides. Where nothing else is said a checkpoint is saved after every step."""

STEPS = 8
TIMED = ("tokens_per_second", "seconds", "resident_bytes")

Killer = Callable[[Path], None]
"""Sets, inside the attempt, when it dies; takes the run folder."""


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    resumes: int = 0
    restarts: int = 0
    """Attempts that began again, for nothing was saved yet."""
    finished: int = 0
    """Runs that came to their end and were compared."""
    mismatches: list[str] = field(default_factory=list)
    """What was not bit-equal, and attempts that failed by themselves."""

    def add(self, other: "Tally") -> None:
        """Count another one in."""
        for kind, count in other.kills.items():
            self.kills[kind] += count
        self.resumes += other.resumes
        self.restarts += other.restarts
        self.finished += other.finished
        self.mismatches += other.mismatches


def prepare(folder: Path, variant: str) -> Path:
    """Write model, rows and recipe; return the recipe."""
    method, overrides = VARIANTS[variant]
    torch.manual_seed(0)
    model = tiny_run.write_model(folder / "tiny")
    rows = tiny_run.write_rows(folder / "rows.jsonl", 14)
    recipe = tiny_run.write_recipe(folder, model, rows, f"method: {method}\n")
    given = [
        f"run.steps={STEPS}",
        *([] if "save_every" in str(overrides) else ["run.save_every=1"]),
        *overrides,
    ]
    (folder / "overrides.json").write_text(json.dumps(given))
    return recipe


def attempt(recipe: Path, run: Path, *flags: str, killer: Killer | None = None) -> int:
    """Train in a forked process; return its process number."""
    overrides = json.loads((recipe.parent / "overrides.json").read_text())
    command = ["train", str(recipe), f"run.output={run}", *overrides, *flags]
    return forked(lambda: cli.main(command), run.with_name(run.name + ".log"), run, killer)


def train(recipe: Path, run: Path, *flags: str) -> int:
    """Train in this process; return the exit code."""
    overrides = json.loads((recipe.parent / "overrides.json").read_text())
    return cli.main(["train", str(recipe), f"run.output={run}", *overrides, *flags])


def forked(act: Callable[[], int], log: Path, run: Path, killer: Killer | None = None) -> int:
    """Call something in a forked process whose output goes to a file, and leave with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if killer is not None:
            killer(run)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, within: float | None = None) -> int | None:
    """Wait for a process; return its exit code, negative for a signal, or None where it still runs."""
    watched = os.pidfd_open(pid)
    try:
        if not select.select([watched], [], [], within)[0]:
            return None
    finally:
        os.close(watched)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """What the kernel does to a process that is killed: not another instruction."""
    os.kill(os.getpid(), signal.SIGKILL)


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


def at_steps(**act: Callable[[], Any]) -> None:
    """Call `_N` before step N + 1 of this process; for a forked one."""
    make_step = lisatune.train._step

    def step(parts: Any, done: Any, *rest: Any) -> Any:
        act.pop(f"_{done.step}", lambda: None)()
        return make_step(parts, done, *rest)

    lisatune.train._step = step


def before_step(number: int) -> Killer:
    """Die before step `number` + 1."""
    return lambda run: at_steps(**{f"_{number}": die})


def inside_file(number: int) -> Killer:
    """Die when half of the `number`-th safetensors file is written, from 1."""

    def set_up(run: Path) -> None:
        count, save_file = 0, safetensors.torch.save_file

        def half(tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
            nonlocal count
            count += 1
            save_file(tensors, path, *rest, **options)
            if count == number:
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

        safetensors.torch.save_file = half

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
        """Run with one kill of each kind in turn, then to the end, and compare all that is left behind."""
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
                break  # came to its end before the kill
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
        """What a finished run left behind that is not bit-equal to what the undisturbed one did."""
        now, was = outcome(run), self.straight
        different = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
        return [f"{name} was {was.get(name)!r:.200}, is {now.get(name)!r:.200}" for name in different]


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run left behind but what depends on the clock: weights, losses, draws, state."""
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = f"metrics of step {record['step']}{' (held out)' if 'held_out_loss' in record else ''}"
        found.setdefault(name, []).append({key: record[key] for key in record if key not in TIMED})
    for file in (run / "model").glob("*.safetensors"):
        found[f"model/{file.name}"] = file.read_bytes()
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    found["newest checkpoint"] = checkpoint.name
    for file in checkpoint.glob("*.safetensors"):
        found[f"checkpoint/{file.name}"] = safetensors.torch.load(file.read_bytes())
        found[f"checkpoint/{file.name}"] = {
            name: tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.item()
            for name, tensor in found[f"checkpoint/{file.name}"].items()
        }
    state = json.loads((checkpoint / "state.json").read_text())
    state["extra"].pop("train_seconds")
    for group in state["optimizer"]["param_groups"]:
        group.pop("differentiable", None)  # torch adds it, off, to a group that is loaded
    found["checkpoint/state.json"] = state
    found["left over"] = sorted(
        path.name for path in (*run.iterdir(), *(run / "checkpoints").iterdir()) if ".tmp" in path.name
    )
    return found


def assert_as_undisturbed(series: "Series", run: Path) -> None:
    """Compare all that a run left behind with the undisturbed one."""
    assert series.differences(run) == []
