"""`benchmarks/gpu_all.sh` without a GPU: sections are written down, skipped when complete, and may fail."""

import argparse
import json
import os
import runpy
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_all.sh"


def run(
    out: Path, *options: str, python: str = sys.executable, data: Path | str = "", tiny: bool = True
) -> tuple[int, list[str]]:
    """The exit code, and the lines of stdout and stderr."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--device", "cpu", *["--tiny"] * tiny, *options, str(out)],
        env=os.environ | {"PYTHON": python, "COMMIT": "abc", "DATA": str(data)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_section_runs_once_and_is_written_down_with_what_it_ran_on(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "--only", "gpu-tests")
    assert code == 0, lines
    kept = json.loads((tmp_path / "gpu_all.json").read_text())
    section = kept["sections"]["gpu-tests"]
    assert (section["status"], section["commit"], kept["torch"]) == ("complete", "abc", version("torch"))
    assert "skipped" in section["log"][-1]
    assert run(tmp_path, "--only", "gpu-tests") == (0, ["gpu-tests: complete before"])


def test_a_section_that_fails_is_written_down_and_the_next_one_runs(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/bash
case "$1 $2" in
  "-m pytest") echo broken; exit 3 ;;
  "experiments/compare.py ground") [ "$3" != --list-arms ] && echo "$*" >>{tmp_path}/cells || echo full ;;
  experiments/gather.py*) echo '["gathered"]' ;;
  benchmarks/*) echo '{{"arms": 1}}' >"${{!#}}" ;;
  *) exec {sys.executable} "$@" ;;
esac
""")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    data, out = tmp_path / "my data", tmp_path / "my results"
    data.mkdir()
    for name in ("math.jsonl", "math-val.jsonl", "general.jsonl"):
        (data / name).touch()
    code, _ = run(out, python=str(stub), data=data)
    sections = json.loads((out / "gpu_all.json").read_text())["sections"]
    assert code == 1
    assert {name: each["status"] for name, each in sections.items()} == {
        "gpu-tests": "failed",
        "optimizer": "complete",
        "conformance": "failed",
        "plans": "complete",
        "qlisa-8b": "complete",
        "steps-8b": "complete",
        "corrections-8b": "complete",
        "compiled-8b": "complete",
        "batch-4-8b": "complete",
        "compiled-batch-4-8b": "complete",
        "ground": "complete",
    }
    assert sections["gpu-tests"]["log"] == ["broken"]
    assert sections["plans"]["figures"] == {"arms": 1}
    assert sections["ground"]["figures"] == ["gathered"]
    assert "--methods full" in (tmp_path / "cells").read_text()
    plans = ("--only", "plans")
    two = run(out, "--only", "plans,optimizer", python=str(stub))
    assert two == (0, ["optimizer: complete before", "plans: complete before"])
    for key, other in (("tiny", False), ("device", "cuda")):
        kept = json.loads((out / "gpu_all.json").read_text())
        kept["sections"]["plans"][key] = other
        (out / "gpu_all.json").write_text(json.dumps(kept))
        code, lines = run(out, *plans, python=str(stub))
        assert (code, [line.split(" in ")[0] for line in lines]) == (0, ["plans: complete"])


def test_each_half_fits_a_command_of_ten_minutes_and_both_together_are_all_sections(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/bash
case "$1 $2" in "-c "*find_spec* | "- "*) exec {sys.executable} "$@" ;; esac
""")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    sections = []
    for options in (("--half", "1"), ("--half", "2"), ()):
        out = tmp_path / "-".join(["out", *options])
        assert run(out, *options, python=str(stub), tiny=False)[0] == 0
        sections.append(json.loads((out / "gpu_all.json").read_text())["sections"])
    first, second, all_of_them = sections
    assert (list(first) + list(second), first.keys() & second.keys()) == (list(all_of_them), set())
    assert max(sum(each["limit"] for each in half.values()) for half in (first, second)) <= 395
    for name, section in all_of_them.items():
        if name.endswith("-8b"):
            assert "--arms LoRA r=16;" in section["command"], "a ratio to LoRA needs LoRA in the same run"
    assert run(tmp_path, "--half", "3") == (2, ["gpu_all.sh: --half must be 1 or 2, got 3"])


def test_a_section_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "plan") == (2, ["gpu_all.sh: no section plan"])


def test_a_step_on_a_gpu_is_timed_with_draws_as_rare_as_by_default() -> None:
    gpu = runpy.run_path(str(SCRIPT.with_name("gpu.py")))
    seconds = [1.0, 3.0] * 5  # a draw at the end of every second step
    spread = {method: gpu["spread_draws"](seconds, method) for method in ("lisa", "badam", "lora")}
    assert spread == {"lisa": pytest.approx(1.2), "badam": pytest.approx(1.04), "lora": pytest.approx(2)}
    assert gpu["spread_draws"]([1.0], "lisa") == 1
    given = {"shape": "smollm2-135m", "length": 16, "batch": 1, "device": "cpu", "checkpointing": "none"}
    options = argparse.Namespace(**given, compile=False)
    methods = [gpu["make_recipe"](options, keys).method for keys in gpu["ARMS"].values()]
    assert {each.period for each in methods if each.name == "lisa"} == {2}
    assert {(each.switch_every, each.switch_mode) for each in methods if each.name == "badam"} == {
        (2, "random")
    }
