"""Results of a comparison and folders of runs to report, small enough to write down."""

import json
from pathlib import Path
from typing import Any

from lisatune.compare.results import ArmResult, MemoryResult, Point, Results, RunResult, Spread
from lisatune.files import yaml

HOSTILE = "\"'><script>alert(1)</script><img src=https://x.example/ onerror=alert(2)>{{ 7 * 7 }}${x}$"
RECIPE = {"model": {"name": "some-model"}, "data": {"train": "rows.jsonl"}, "method": {"name": "lisa"}}


def write_run(folder: Path, *, periods: tuple[int, ...] = (0, 1)) -> Path:
    """Write a finished run of 4 steps without its model; of `periods` there are lines."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.dump(RECIPE))
    (folder / "environment.json").write_text('{"command": ["lisatune", "train", "recipe.yaml"]}')
    metrics: list[dict[str, Any]] = [{"step": 0, "held_out_loss": 3.0}]
    for step, period in enumerate(periods, 3):
        record = {"step": step, "tokens": 10 * step, "seconds": 0.5 * step, "loss": 2.5}
        metrics.append(record | {"period": period, "active_blocks": [period % 3]})
    metrics.append({"step": 4, "held_out_loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    summary = {"steps": 4, "held_out_loss_after": 2.0, "peak_bytes": 10**9, "visits": [1, 1, 0]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def results(text: str = "") -> Results:
    """A comparison of full fine-tuning and LISA; `text` stands for names and texts, if given."""
    return Results(
        schema=1,
        made="2026-01-01T00:00:00+0000",
        name="tiny",
        complete=True,
        problems=[text] if text else [],
        recipe=RECIPE | {"model": {"name": text or "some-model"}},
        budget={"steps": 4},
        seeds=[0],
        data={"train": 8, "validation": 2, "test": 2, "general": None, "sha256": {}},
        base={"test_loss": 3.0, "general_loss": None},
        reference="full",
        arms=[_arm("full", 2.0, 4 * 10**9, 100), _arm(text or "lisa", 2.2, 3 * 10**9, 150)],
        runs=[_run("full", 2.0, text), _run(text or "lisa", 2.2, text)],
        equal_time=[],
        environment={"command": ["lisatune", "compare", text]},
    )


def _spread(value: float) -> Spread:
    return Spread(mean=value, std=None, low=value, high=value, count=1)


def _arm(name: str, loss: float, peak: int, rate: float) -> ArmResult:
    return ArmResult(
        name=name,
        method="full",
        overrides=[],
        lrs=[1e-4],
        chosen_lr=1e-4,
        lr_at_edge=False,
        reason=None,
        test_loss=_spread(loss),
        validation_loss=_spread(loss),
        general_loss=None,
        forgetting=None,
        train_seconds=_spread(2.0),
        tokens_per_second=_spread(rate),
        peak_bytes=_spread(peak),
        touched=None,
        gain_share=None,
        trainable=5,
        export_bytes=5,
        delta_bytes=5,
        memory=MemoryResult(
            how="",
            peak_bytes=peak,
            phase="loss",
            at_peak={"weights": peak // 2, "loss": peak // 2},
            by_phase={},
            static_bytes=0,
            host_bytes=0,
        ),
        memory_reason=None,
    )


def _run(arm: str, loss: float, text: str) -> RunResult:
    return RunResult(
        arm=arm,
        lr=1e-4,
        seed=0,
        chosen=True,
        status="done",
        reason=None,
        folder="runs/full" if arm == "full" else "runs/lisa",
        steps=4,
        skipped_steps=0,
        tokens=40,
        train_seconds=2.0,
        tokens_per_second=20.0,
        validation_loss_before=3.0,
        validation_loss=loss,
        test_loss=loss,
        general_loss=None,
        peak_bytes=1,
        peak_state_bytes=1,
        trainable=5,
        touched=5,
        export_bytes=5,
        delta_bytes=5,
        held_out=[
            Point(step=0, tokens=0, seconds=0.0, loss=3.0),
            Point(step=4, tokens=40, seconds=2.0, loss=loss),
        ],
        train=[],
        visits=None if arm == "full" else [1, 1, 0],
        movement=[0.1, 0.2, 0.0],
        samples=[{"prompt": text, "reference": text, "before": text, "after": text}],
    )
