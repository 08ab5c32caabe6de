"""The live table of a comparison's runs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lisatune.compare.arms import Comparison, read_comparison
from lisatune.compare.processes import Run
from lisatune.compare.stages import Board


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: smollm2-135m}\ndata: {train: python-docs}\n")
    return read_comparison(path, methods="full,lisa", lr="1e-4")


def board_of(comparison: Comparison, *, terminal: bool) -> tuple[Board, io.StringIO]:
    output = io.StringIO()
    return Board(comparison, console=Console(file=output, force_terminal=terminal, width=90)), output


def begin(comparison: Comparison, folder: Path, board: Board) -> Run:
    run = Run(comparison.arms[0], 1e-4, 0, folder)
    board.start(run, 6)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n{"st')
    board.refresh()
    return run


def test_a_terminal_shows_steps_then_losses_of_every_arm(comparison: Comparison, tmp_path: Path) -> None:
    board, output = board_of(comparison, terminal=True)
    with board:
        run = begin(comparison, tmp_path, board)
        board.draw()
        assert "3/6" in output.getvalue()
        (run.folder / "summary.json").write_text(json.dumps({"held_out_loss_after": 1.23456}))
        board.end(run)
    last = output.getvalue().split("validation loss")[-1]
    assert "1.2346" in last
    assert "lisa" in last
    assert "lr 0.0001, seed 0" in last


def test_a_failure_is_said_with_its_reason(comparison: Comparison, tmp_path: Path) -> None:
    board, output = board_of(comparison, terminal=True)
    with board:
        run = begin(comparison, tmp_path, board)
        run.fail("loss nan")
        board.end(run)
    assert "failed: loss nan" in output.getvalue()


def test_without_a_terminal_there_is_a_line_for_each_change(comparison: Comparison, tmp_path: Path) -> None:
    board, output = board_of(comparison, terminal=False)
    with board:
        run = begin(comparison, tmp_path, board)
        (run.folder / "summary.json").write_text(json.dumps({"held_out_loss_after": 1.23456}))
        board.end(run)
    assert output.getvalue().splitlines() == [
        "full, lr 0.0001, seed 0: 6 steps",
        "full, lr 0.0001, seed 0: validation loss 1.2346",
    ]


def test_finished_runs_of_before_are_on_the_board_too(comparison: Comparison, tmp_path: Path) -> None:
    run = Run(comparison.arms[0], 1e-4, 0, tmp_path)
    run.folder.mkdir()
    (run.folder / "summary.json").write_text(json.dumps({"held_out_loss_after": 1.23456}))
    board, output = board_of(comparison, terminal=True)
    with board:
        board.end(run)
    assert "1.2346" in output.getvalue()
