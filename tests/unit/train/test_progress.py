"""What is printed: readable in 100 columns, honest on a pipe, safe with what a model says.

`python tests/unit/test_progress.py` shows it all to the eye.
"""

import io

import pytest
from rich.console import Console
from rich.text import Text

from lisatune.console import byte_text, count_text, ranges_text
from lisatune.runs.summary import Summary
from lisatune.train.progress import Bar, print_summary

SUMMARY: Summary = {
    "steps": 120,
    "skipped_steps": 1,
    "train_seconds": 412.2,
    "tokens_per_second": 512.3,
    "held_out_loss_before": 2.3111,
    "held_out_loss_after": 1.9022,
    "peak_bytes": 1_700_000_000,
    "peak_state_bytes": 283 * 2**20,
    "peak_state_elements": 70_784_640,
    "peak_trainable": 35_392_320,
    "proof": "30 periods: drawn blocks moved, 28 others bit-identical",
    "samples": [
        {
            "prompt": "What does the Python function textwrap.dedent(text) do?",
            "reference": "Remove common leading whitespace.",
            "before": "The function [bold]dedent[/bold] \x1b[31mis " + "a function of text " * 40,
            "after": "Remove any common leading whitespace from every line in `text`.",
        }
    ],
    "model": "runs/demo/model",
}


def console(*, terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def train_a_little(bar: Bar) -> None:
    with bar:
        bar.update(
            101,
            loss=1.5951,
            lr=1.7e-5,
            tokens_per_second=512.3,
            active_blocks=(3, 11, 12, 13),
            resident_bytes=int(1.7e9),
            grad_norm=1.0,
        )
        bar.print("step 101: held-out loss 1.812")
        bar.update(120, loss=1.5, lr=0.0, tokens_per_second=5e4, resident_bytes=2**20)


def test_on_a_pipe_every_update_is_one_plain_line() -> None:
    shown = console()
    train_a_little(Bar(120, 100, console=shown))
    lines = text_of(shown).splitlines()
    assert lines[0].startswith("step 101/120  loss 1.595  lr 1.7e-05  512 tok/s  blocks 3 11–13  1.58 GiB  ")
    assert lines[1] == "step 101: held-out loss 1.812"
    assert lines[2].startswith("step 120/120  loss 1.500  lr 0.0e+00  50,000 tok/s  1 MiB  0:00 left")
    assert len(lines) == 3
    assert "\x1b" not in text_of(shown)


def test_on_a_terminal_the_bar_moves_and_lines_stay() -> None:
    shown = console(terminal=True)
    train_a_little(Bar(120, 100, console=shown))
    assert "120/120 · 0:00 left · loss 1.500" in text_of(shown)
    assert "step 101: held-out loss 1.812" in text_of(shown)


@pytest.mark.parametrize("seconds", [1, 40])
def test_a_long_evaluation_says_on_a_pipe_how_far_it_is(
    seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, seconds))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    shown = console()
    with Bar(120, console=shown) as bar, bar.follow("held-out loss", 3) as advance:
        for _ in range(3):
            advance()
    lines = [
        "held-out loss: 1 of 3 batches, 1:20 left",
        "held-out loss: 2 of 3 batches, 0:40 left",
        "held-out loss: 3 of 3 batches, 0:00 left",
    ]
    assert text_of(shown).splitlines() == (lines if seconds == 40 else [])


def test_an_evaluation_has_a_bar_on_a_terminal_while_it_lasts() -> None:
    shown = console(terminal=True)
    with Bar(120, console=shown) as bar:
        with bar.follow("held-out loss", 3) as advance:
            advance()
            bar._progress.refresh()
            assert "1/3 · held-out loss" in Text.from_ansi(text_of(shown)).plain
        shown.file = io.StringIO()
        bar._progress.refresh()
        assert "held-out loss" not in text_of(shown)


def test_a_terminal_of_60_columns_shows_the_time_left() -> None:
    shown = console(terminal=True, width=60)
    bar = Bar(12_000, 100, console=shown)
    with bar:
        bar.update(
            11_900,
            loss=1.5,
            lr=1e-5,
            tokens_per_second=512.0,
            active_blocks=range(0, 30, 2),
            resident_bytes=2**30,
        )
    assert "11900/12000 · 0:00 left · loss 1.500" in text_of(shown)


def test_the_summary_says_what_came_out() -> None:
    shown = console()
    print_summary(SUMMARY, shown)
    out = text_of(shown)
    for part in (
        "2.311 → 1.902 (-0.409)",
        "10.1 → 6.7",
        "6:52 for 120 steps, 512 tokens/s",
        "1 step: loss or gradients not finite",
        "1.58 GiB",
        "283 MiB at most: 70,784,640 numbers for 35,392,320 parameters",
        "30 periods: drawn blocks moved, 28 others bit-identical",
        "runs/demo/model",
        "textwrap.dedent",
        "reference  Remove common leading whitespace.",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


def test_what_a_model_says_is_shown_and_not_obeyed() -> None:
    shown = console(terminal=True)
    print_summary({"samples": SUMMARY["samples"]}, shown)
    assert "[bold]dedent[/bold]" in text_of(shown)
    assert "\x1b[31mis" not in text_of(shown)
    assert text_of(shown).count("a function of text") < 25


def test_a_loss_without_bound_is_no_crash() -> None:
    shown = console()
    print_summary({"held_out_loss_before": 1e4, "held_out_loss_after": float("nan")}, shown)
    assert "∞ → nan" in text_of(shown)


def test_counts_are_short() -> None:
    assert [count_text(n) for n in (0, 999, 1000, 134_515_008, 999_999, 7e9)] == [
        *("0", "999", "1.0k", "134.5M", "1.0M", "7.0B")
    ]
    assert [byte_text(n) for n in (0, 2**14, 2**29, 3 * 2**29)] == ["0 KiB", "16 KiB", "512 MiB", "1.50 GiB"]
    assert [ranges_text(b) for b in ((), (4,), (4, 5), (0, 1, 2, 7))] == ["none", "4", "4 5", "0–2 7"]


if __name__ == "__main__":
    train_a_little(Bar(120, 100))
    print_summary(SUMMARY)
