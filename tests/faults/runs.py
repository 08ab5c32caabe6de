"""Tiny runs in processes forked from this one, which has done the imports, and the files that they leave."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the fork, here and below)
import peft  # noqa: F401
import safetensors.torch
import torch
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
from trl.chat_template_utils import get_training_chat_template  # noqa: F401

import lisatune.train.loop
import tiny_run
from forks import forked
from lisatune.cli import app
from lisatune.runs.manifest import newest_checkpoint

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
    "lisa, codes, exact weights on disk": (
        "{active: 2, period: 2, frozen_weights: int8, ends: frozen, master: disk}",
        ["run.precision=bf16"],
    ),
    "lisa, saved while it trains": ("{active: 2, period: 3, state: cpu}", ["run.save_async=true"]),
    "lisa, packed, evaluated": ("{active: 2, period: 4}", ["data.packing=true", "run.eval_every=3"]),
    "full": ("{name: full}", ["run.eval_every=4", "run.save_every=3"]),
    "lora": ("{name: lora}", ["run.save_every=2"]),
}
"""Method and overrides. Unless an override says otherwise, a checkpoint is saved after every step."""

STEPS = 8

TIMED = ("tokens_per_second", "seconds", "resident_bytes")


Killer = Callable[[Path], None]
"""Called inside the attempt with the run folder, to set when the attempt dies."""


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

    def act() -> int:
        if killer is not None:
            killer(run)
        return app.main(command)

    return forked(act, run.with_name(run.name + ".log"))


def train(recipe: Path, run: Path, *flags: str) -> int:
    """Train in this process; return the exit code."""
    overrides = json.loads((recipe.parent / "overrides.json").read_text())
    return app.main(["train", str(recipe), f"run.output={run}", *overrides, *flags])


def die() -> None:
    """Die as a process does that the kernel kills: without another instruction."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_steps(**act: Callable[[], Any]) -> None:
    """Call `_N` before step N + 1 of this process; for a forked one."""
    make_step = lisatune.train.loop._step

    def step(parts: Any, done: Any, *rest: Any) -> Any:
        act.pop(f"_{done.step}", lambda: None)()
        return make_step(parts, done, *rest)

    lisatune.train.loop._step = step


def outcome(run: Path) -> dict[str, Any]:
    """Read all that a finished run left, except what depends on the clock: weights, losses, draws, state."""
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
        group.pop("differentiable", None)  # torch adds it, switched off, to every group that it loads
    found["checkpoint/state.json"] = state
    found["left over"] = sorted(
        path.name for path in (*run.iterdir(), *(run / "checkpoints").iterdir()) if ".tmp" in path.name
    )
    return found
