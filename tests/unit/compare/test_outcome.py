"""What results say: losses at equal wall time, gains against a reference, tables."""

from pathlib import Path
from typing import Any

import pytest

from lisatune.cli.app import main
from lisatune.compare.outcome import compare_at_equal_time, compare_to
from lisatune.compare.results import read_results
from lisatune.compare.tables import format_markdown, make_overview


def spread(value: float, std: float | None = None) -> dict[str, Any]:
    return {"mean": value, "std": std, "low": value, "high": value, "count": 1}


def arm(name: str, loss: float | None, seconds: float = 10.0) -> dict[str, Any]:
    keys = "validation_loss general_loss forgetting tokens_per_second peak_bytes touched gain_share trainable"
    keys += " export_bytes delta_bytes memory memory_reason reason"
    return dict.fromkeys(keys.split()) | {
        "name": name,
        "method": name,
        "overrides": [],
        "lrs": [1e-5],
        "chosen_lr": None if loss is None else 1e-5,
        "lr_at_edge": False,
        "test_loss": None if loss is None else spread(loss, 0.01),
        "train_seconds": None if loss is None else spread(seconds),
    }


def run(name: str, seed: int, *points: tuple[float, float], chosen: bool = True) -> dict[str, Any]:
    curve = [
        {"step": i, "tokens": i, "seconds": seconds, "loss": loss} for i, (seconds, loss) in enumerate(points)
    ]
    return {
        "arm": name,
        "lr": 1e-5,
        "seed": seed,
        "chosen": chosen,
        "status": "done",
        "reason": None,
        "tokens": 100,
        "validation_loss": points[-1][1],
        "test_loss": 2.0,
        "held_out": curve,
    }


def results(arms: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Any:
    return {
        "name": "recipe",
        "recipe": {"model": {"name": "m"}, "data": {"train": "d"}},
        "seeds": [0, 1],
        "data": {"validation": 4, "test": 5},
        "base": {"test_loss": 3.0, "general_loss": None},
        "reference": None,
        "arms": arms,
        "runs": runs,
        "equal_time": [],
        "problems": ["full, lr 1, seed 0 failed: loss nan"],
    }


def test_losses_at_equal_time_lie_between_evaluations_and_average_over_seeds() -> None:
    runs = [
        run("fast", 0, (0, 3.0), (4, 2.0)),
        run("slow", 0, (0, 3.0), (2, 2.8), (10, 2.0)),
        run("slow", 1, (0, 3.0), (2, 2.6), (10, 2.0)),
        run("slow", 0, (0, 3.0), (10, 9.0), chosen=False),
    ]
    both = results([arm("fast", 2.0, 4), arm("slow", 2.0, 10)], runs)
    found = compare_at_equal_time(both, "fast")
    assert found is not None
    assert found["seconds"] == 4
    assert found["losses"] == {"fast": 2.0, "slow": pytest.approx((2.6 + 2.45) / 2)}
    late = compare_at_equal_time(both, "slow")
    assert late is not None
    assert late["losses"] == {"fast": None, "slow": 2.0}


def test_equal_time_asks_for_an_arm_that_is_there() -> None:
    with pytest.raises(ValueError, match=r"no arm 'ful'; arms: full"):
        compare_at_equal_time(results([arm("full", 2.0)], []), "ful")
    assert compare_at_equal_time(results([arm("full", None)], []), "full") is None


def test_gains_are_shares_of_the_references() -> None:
    both = results([arm("full", 2.0), arm("lora", 2.5), arm("ia3", None)], [])
    compare_to(both, "full")
    assert [each["gain_share"] for each in both["arms"]] == [1.0, 0.5, None]
    compare_to(both, "lora")
    assert [each["gain_share"] for each in both["arms"]] == [2.0, 1.0, None]
    both["arms"][0]["test_loss"] = spread(3.5)
    compare_to(both, "full")  # learned nothing: shares of nothing
    assert [each["gain_share"] for each in both["arms"]] == [None, None, None]


def test_tables_show_mean_and_deviation_failures_and_no_empty_columns() -> None:
    both = results([arm("full", 2.0), arm("a|b", None)], [run("full", 0, (0, 3.0), (10, 2.0))])
    both["arms"][1]["reason"] = "loss nan"
    compare_to(both, "full")
    heads, rows = make_overview(both)
    assert heads == ["arm", "lr", "test loss", "gain", "training time"]
    assert rows == [["full", "1e-05", "2.0000 ± 0.0100", "100 %", "10 s"], ["a|b", "failed", "", "", ""]]
    text = format_markdown(both)
    assert "| a\\|b | failed |" in text
    assert "full, lr 1, seed 0 failed: loss nan" in text
    assert "every run has 100 tokens" in text


def test_options_that_a_folder_of_results_does_not_read_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tmp_path), "--lr", "1e-4", "run.steps=2", "--keep-models"]) == 2
    says = f"--lr, --keep-models and run.steps=2 do nothing with the folder {tmp_path}, which only shows"
    assert says in capsys.readouterr().err


def test_results_that_cant_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make them with `lisatune compare`"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="has schema 99, and this lisatune reads 1"):
        read_results(tmp_path / "results.json")
