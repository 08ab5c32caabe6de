"""Turn the run folders of a comparison into results: chosen learning rates, spreads, losses at equal time."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lisatune.compare.arms import Arm, Comparison
from lisatune.compare.gains import gains, mean_gains
from lisatune.compare.measure import Measured
from lisatune.compare.processes import CONTINUE_HINT, Run
from lisatune.compare.results import (
    SCHEMA,
    ArmResult,
    BaseResult,
    EqualTime,
    Point,
    Results,
    RunResult,
    Slices,
    Spread,
)
from lisatune.runs.summary import describe_environment

__all__ = [
    "build_results",
    "choose_lr",
    "compare_at_equal_time",
    "compare_to",
    "extract_held_out_curve",
    "list_runs",
]

TRAIN_POINTS = 200
"""Most points of a training curve."""


def list_runs(arm: Arm, seed: int, runs: Path) -> list[Run]:
    """List the arm's runs with one seed, one for each learning rate."""
    return [Run(arm, lr, seed, runs) for lr in arm.lrs]


def choose_lr(arm: Arm, first_seed: int, runs: Path) -> float | None:
    """Choose the learning rate with the lowest validation loss at the first seed.

    Of equal ones the lowest is chosen. None if no run with that seed is done.
    """
    candidates = list_runs(arm, first_seed, runs)
    done = [(run.read_summary(), run.lr) for run in candidates if run.read_failure() is None]
    losses = [(summary["held_out_loss_after"], lr) for summary, lr in done if summary is not None]
    return min(losses)[1] if losses else None


def build_results(comparison: Comparison, runs: Path, slices: Slices, base: Measured) -> Results:
    """Collect the results of all runs on disk.

    Args:
        comparison: what was asked for.
        runs: folder of the run folders.
        slices: the records that all runs read.
        base: losses of the model before training.
    """
    seeds = comparison.seeds
    all_runs: list[RunResult] = []
    arms: list[ArmResult] = []
    base_result = BaseResult(
        test_loss=base.get("test_loss"), general_loss=base.get("general_loss"), scores=gains(base, Measured())
    )
    for arm in comparison.arms:
        chosen = choose_lr(arm, seeds[0], runs)
        mine = [
            _build_run(Run(arm, lr, seed, runs), lr == chosen, base)
            for lr in arm.lrs
            for seed in (seeds if lr == chosen else seeds[:1])
        ]
        all_runs += mine
        arms.append(_build_arm(arm, chosen, mine, base_result, Run(arm, chosen or 0, seeds[0], runs)))
    results = Results(
        schema=SCHEMA,
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        name=comparison.name,
        complete=_is_complete(arms, all_runs),
        problems=_list_problems(arms, all_runs),
        recipe=comparison.recipe.as_dict(),
        budget=comparison.budget,
        seeds=list(seeds),
        data=slices,
        base=base_result,
        reference=None,
        arms=arms,
        runs=all_runs,
        equal_time=[],
        environment=describe_environment(),
    )
    full = next((arm["name"] for arm in arms if arm["method"] == "full"), None)
    compare_to(results, comparison.reference or full)
    return results


def compare_to(results: Results, reference: str | None) -> None:
    """Set the arm that the others are compared to: update `gain_share` and `equal_time` in place.

    Raises:
        ValueError: no arm has that name.
    """
    arms = results["arms"]
    results["reference"] = reference
    losses = {arm["name"]: arm["test_loss"]["mean"] for arm in arms if arm["test_loss"] is not None}
    before = results["base"]["test_loss"]
    gain = before - losses[reference] if reference in losses and before is not None else 0.0
    for arm in arms:
        known = gain > 0 and before is not None and arm["name"] in losses
        arm["gain_share"] = (before - losses[arm["name"]]) / gain if known and before is not None else None
    seconds = {arm["name"]: arm["train_seconds"]["mean"] for arm in arms if arm["train_seconds"] is not None}
    fastest = min(seconds, key=lambda name: seconds[name], default=None)
    names = dict.fromkeys(name for name in (fastest, reference) if name is not None)
    times = [compare_at_equal_time(results, name) for name in names]
    results["equal_time"] = [each for each in times if each is not None]


def compare_at_equal_time(results: Results, reference: str) -> EqualTime | None:
    """Compare validation losses at the training time at which the reference's runs end, a mean over seeds.

    Between two evaluations the loss is taken as linear in time. A run whose learning rate had not yet fallen
    at that time would have done better if it had been planned to end there. None if no run of the reference
    is done.

    Raises:
        ValueError: no arm has that name.
    """
    names = [arm["name"] for arm in results["arms"]]
    if reference not in names:
        raise ValueError(f"there is no arm {reference!r}; arms: {', '.join(names)}")
    curves = {
        name: [run["held_out"] for run in results["runs"] if run["arm"] == name and _counts(run)]
        for name in names
    }
    if not curves[reference]:
        return None
    seconds = mean(curve[-1]["seconds"] for curve in curves[reference])
    losses: dict[str, float | None] = {}
    for name in names:
        at = [_interpolate(curve, seconds) for curve in curves[name]]
        known = [loss for loss in at if loss is not None]
        # The reference's own seeds end before and after their mean.
        losses[name] = mean(known) if known and (len(known) == len(at) or name == reference) else None
    return EqualTime(reference=reference, seconds=seconds, losses=losses)


def _interpolate(curve: Sequence[Point], seconds: float) -> float | None:
    if seconds > 1.01 * curve[-1]["seconds"]:
        return None
    for before, after in pairwise(curve):
        if before["loss"] is not None and after["loss"] is not None and seconds <= after["seconds"]:
            way = (seconds - before["seconds"]) / max(after["seconds"] - before["seconds"], 1e-9)
            return before["loss"] + way * (after["loss"] - before["loss"])
    return curve[-1]["loss"]


def _counts(run: RunResult) -> bool:
    """Whether the run counts for the figures of its arm."""
    return run["chosen"] and run["status"] == "done" and len(run["held_out"]) > 1


def _build_run(run: Run, chosen: bool, base: Measured) -> RunResult:
    summary: dict[str, Any] = run.read_summary() or {}
    failed = run.read_failure()
    status: Any = "failed" if failed is not None else "done" if summary else "missing"
    metrics = run.read_metrics()
    measured = (run.read_measured() if chosen and status == "done" else None) or Measured()
    return RunResult(
        arm=run.arm.name,
        lr=run.lr,
        seed=run.seed,
        chosen=chosen,
        status=status,
        reason=failed,
        folder=f"{run.runs.name}/{run.folder.name}",
        steps=summary.get("steps"),
        skipped_steps=summary.get("skipped_steps"),
        tokens=summary.get("tokens"),
        train_seconds=summary.get("train_seconds"),
        tokens_per_second=summary.get("tokens_per_second"),
        validation_loss_before=summary.get("held_out_loss_before"),
        validation_loss=summary.get("held_out_loss_after"),
        test_loss=measured.get("test_loss"),
        general_loss=measured.get("general_loss"),
        scores=gains(measured, base),
        peak_bytes=summary.get("peak_bytes"),
        peak_state_bytes=summary.get("peak_state_bytes"),
        trainable=summary.get("peak_trainable"),
        touched=measured.get("touched"),
        export_bytes=measured.get("export_bytes"),
        delta_bytes=measured.get("delta_bytes"),
        held_out=extract_held_out_curve(metrics),
        train=_average_train_loss(metrics),
        visits=summary.get("visits"),
        movement=measured.get("movement"),
        samples=summary.get("samples", []),
    )


def extract_held_out_curve(metrics: Sequence[dict[str, Any]]) -> list[Point]:
    """Pick the held-out losses out of the lines of metrics.jsonl, with tokens and seconds up to each."""
    curve, tokens, seconds = [], 0, 0.0
    for line in metrics:
        tokens, seconds = line.get("tokens", tokens), line.get("seconds", seconds)
        if "held_out_loss" in line:
            curve.append(Point(step=line["step"], tokens=tokens, seconds=seconds, loss=line["held_out_loss"]))
    return curve


def _average_train_loss(metrics: Sequence[dict[str, Any]]) -> list[Point]:
    lines = [line for line in metrics if "tokens" in line]
    size = max(1, -(-len(lines) // TRAIN_POINTS))
    curve = []
    for start in range(0, len(lines), size):
        stretch = lines[start : start + size]
        losses = [line["loss"] for line in stretch if line["loss"] is not None]
        end = stretch[-1]
        loss = mean(losses) if losses else None
        curve.append(Point(step=end["step"], tokens=end["tokens"], seconds=end["seconds"], loss=loss))
    return curve


def _build_arm(
    arm: Arm, chosen: float | None, runs: list[RunResult], base: BaseResult, first: Run
) -> ArmResult:
    mine = [run for run in runs if run["chosen"] and run["status"] == "done"]
    reasons = [run["reason"] for run in runs if run["reason"] is not None]

    def over_seeds(figure: Callable[[RunResult], float | None]) -> Spread | None:
        values = [value for value in map(figure, mine) if value is not None]
        if not values:
            return None
        return Spread(
            mean=mean(values),
            std=stdev(values) if len(values) > 1 else None,
            low=min(values),
            high=max(values),
            count=len(values),
        )

    def forgotten(run: RunResult) -> float | None:
        before, after = base["general_loss"], run["general_loss"]
        return None if before is None or after is None else after - before

    def largest(key: str) -> int | None:
        values: list[Any] = [run[key] for run in mine if run[key] is not None]  # type: ignore[literal-required]
        return max(values, default=None)

    measured = (first.read_measured() if mine else None) or Measured()
    return ArmResult(
        name=arm.name,
        method=arm.recipe.method.name,
        overrides=list(arm.overrides),
        lrs=list(arm.lrs),
        chosen_lr=chosen,
        lr_at_edge=len(arm.lrs) > 1 and chosen in (arm.lrs[0], arm.lrs[-1]),
        reason="; ".join(dict.fromkeys(reasons)) if reasons and not mine else None,
        test_loss=over_seeds(lambda run: run["test_loss"]),
        validation_loss=over_seeds(lambda run: run["validation_loss"]),
        general_loss=over_seeds(lambda run: run["general_loss"]),
        scores=mean_gains([run["scores"] for run in mine]),
        forgetting=over_seeds(forgotten),
        train_seconds=over_seeds(lambda run: run["train_seconds"]),
        tokens_per_second=over_seeds(lambda run: run["tokens_per_second"]),
        peak_bytes=over_seeds(lambda run: run["peak_bytes"]),
        touched=over_seeds(lambda run: run["touched"]),
        gain_share=None,
        trainable=largest("trainable"),
        export_bytes=largest("export_bytes"),
        delta_bytes=largest("delta_bytes"),
        memory=measured.get("memory"),
        memory_reason=measured.get("memory_reason"),
    )


def _is_complete(arms: list[ArmResult], runs: list[RunResult]) -> bool:
    if any(run["status"] == "missing" for run in runs):
        return False
    unmeasured = [run for run in runs if run["chosen"] and run["status"] == "done" and not run["test_loss"]]
    return not unmeasured and all(arm["chosen_lr"] is not None or arm["reason"] for arm in arms)


def _list_problems(arms: list[ArmResult], runs: list[RunResult]) -> list[str]:
    problems = [
        f"{run['arm']}, lr {run['lr']:g}, seed {run['seed']} failed: {run['reason']}"
        for run in runs
        if run["status"] == "failed"
    ]
    for arm in arms:
        if arm["lr_at_edge"]:
            rates = ", ".join(f"{lr:g}" for lr in arm["lrs"])
            problems.append(
                f"{arm['name']} did best at lr {arm['chosen_lr']:g}, at the edge of {rates}; a better one "
                "may lie outside"
            )
        if arm["memory_reason"] is not None:
            problems.append(f"{arm['name']}: memory by category was not measured: {arm['memory_reason']}")
    missing = sum(run["status"] == "missing" for run in runs)
    if missing:
        problems.append(f"{missing} of {len(runs)} runs are missing; {CONTINUE_HINT}")
    return problems
