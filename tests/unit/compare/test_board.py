"""The live table of a comparison's runs, and how far a run has come."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lisatune.compare.arms import Comparison, read_comparison
from lisatune.compare.board import Board
from lisatune.compare.processes import TAIL_BYTES, Run


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
        assert "3/6" in output.getvalue()
        (run.folder / "summary.json").write_text(json.dumps({"held_out_loss_after": 1.23456}))
        board.end(run)
    last = output.getvalue().split("validation loss")[-1]
    assert "1.2346" in last
    assert "lisa" in last
    assert "lr 0.0001, seed 0" in last


def test_a_name_with_a_list_is_shown_whole(tmp_path: Path) -> None:
    path, name = tmp_path / "recipe.yaml", "lora:targets=[q_proj]"
    path.write_text("model: {name: smollm2-135m}\ndata: {train: python-docs}\n")
    comparison = read_comparison(path, methods=name, lr="1e-4")
    board, output = board_of(comparison, terminal=True)
    with board:
        begin(comparison, tmp_path, board)
    assert output.getvalue().count(name) >= 2  # in the title and in its row


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


def test_the_last_step_is_that_of_the_last_complete_line(comparison: Comparison, tmp_path: Path) -> None:
    run = Run(comparison.arms[0], 1e-4, 0, tmp_path)
    assert run.read_last_step() == 0
    run.folder.mkdir()
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("")
    assert run.read_last_step() == 0
    metrics.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(9_000)))
    assert metrics.stat().st_size > 2 * TAIL_BYTES
    assert run.read_last_step() == 8_999
    with metrics.open("a") as file:
        file.write('{"step": 9000, "lo')
    assert run.read_last_step() == 8_999
    assert run.read_metrics()[-1]["step"] == 8_999
