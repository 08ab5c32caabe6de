"""What becomes of a process that ends without a result."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from lisatune.compare import processes
from lisatune.compare.arms import read_comparison
from lisatune.compare.board import Board
from lisatune.compare.outcome import choose_lr
from lisatune.compare.stages import _Work


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (
            1,
            "Traceback (most recent call last):\nlisatune: KeyError: 3 (a defect)",
            r"KeyError: 3 \(a defect\); its log shows the traceback",
        ),
        (2, "noise\nlisatune: error: loss nan; lower it\nmore\n", "loss nan; lower it"),
        (-9, "", "its process was ended by SIGKILL, as the system does when memory runs out"),
        (-11, "", "its process was ended by SIGSEGV"),
        (1, "Traceback", "its process ended with exit code 1 and without a message"),
    ],
)
def test_the_reason_of_a_failure_is_the_processs_own(code: int, output: str, reason: str) -> None:
    with pytest.raises(processes.FailedError, match=reason):
        processes.check_exit(code, output)


@pytest.mark.parametrize("code", [130, 143])
def test_a_run_that_was_stopped_from_outside_has_not_failed(code: int) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3.*; give the same command to continue"):
        processes.check_exit(code, "lisatune: stopped after step 3, which is saved\n")


def test_a_diverged_run_that_ended_after_its_command_was_killed_has_failed(tmp_path: Path) -> None:
    model = tiny_run.write_model(tmp_path / "model")
    recipe = tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"))
    comparison = read_comparison(recipe, methods="full", lr="1e-4,1e-3")
    arm = comparison.arms[0]
    diverged, good = (processes.Run(arm, lr, 0, tmp_path) for lr in arm.lrs)
    for run, loss in ((diverged, None), (good, 2.0)):
        run.folder.mkdir()
        (run.folder / "summary.json").write_text(json.dumps({"held_out_loss_after": loss}))
    nothing: Any = None
    board = Board(comparison)
    work = _Work(comparison, tmp_path, tmp_path, nothing, {}, 0, board, nothing, False, False)
    for run in (diverged, good):
        work._train(run)
    assert diverged.read_failure() == processes.NOT_FINITE
    assert choose_lr(arm, 0, tmp_path) == 1e-3
