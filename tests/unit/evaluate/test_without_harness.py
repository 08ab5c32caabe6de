"""Without lm-eval everything but the benchmarks works, and those say what to install."""

import sys
from pathlib import Path

import pytest

import tiny_tasks
from lisatune.cli.app import main


@pytest.fixture(autouse=True)
def _no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed


def test_the_missing_package_is_named_with_its_install_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_tasks.write_model(tmp_path / "model")
    assert main(["evaluate", str(model), "--tasks", "arc_easy", "--output", str(tmp_path / "out")]) == 2
    assert 'benchmarks need a package: pip install "lisatune[eval]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mt_bench_needs_no_harness(tmp_path: Path) -> None:
    model = tiny_tasks.write_model(tmp_path / "model", positions=4096)
    line = ["evaluate", str(model), "--mt-bench", "answers", "--limit", "1", "--max-new-tokens", "2"]
    assert main([*line, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "mt_bench" / "answers.jsonl").read_text().count("\n") == 1
