"""`lisatune compare` accepts the comparisons in experiments/, and the scripts train what they say."""

import copy
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from lisatune.compare.arms import read_comparison
from lisatune.nn.layers import find_layers

ROWS = "1/15 of the rows with frozen ends"
EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipe_is_one_that_compare_takes(path: Path) -> None:
    comparison = read_comparison(path)
    assert len({arm.folder for arm in comparison.arms}) == len(comparison.arms) >= 5
    assert comparison.budget["tokens"] >= 100_000
    assert comparison.reference in [arm.name for arm in comparison.arms]
    assert f"experiments/compare.py {path.stem}" in path.read_text()


def test_smoke_shortens_the_runs_and_keeps_the_rest() -> None:
    make_arguments = runpy.run_path(str(EXPERIMENTS / "compare.py"))["make_arguments"]
    given = make_arguments(["draws", "--smoke", "data.train=rows.jsonl"])
    assert given[:3] == ["compare", str(EXPERIMENTS / "draws.yaml"), "data.train=rows.jsonl"]
    assert given[-4:] == ["--lr", "1e-4", "--output", "runs/draws-smoke"]
    assert make_arguments(["draws"]) == ["compare", str(EXPERIMENTS / "draws.yaml")]
    with pytest.raises(
        SystemExit,
        match=r"name one of benchmarks, .*, ground, gsm8k, methods, optimizers, .*, table7, units",
    ):
        make_arguments(["table9"])


def test_smoke_asks_one_question_of_each_task() -> None:
    make_arguments = runpy.run_path(str(EXPERIMENTS / "compare.py"))["make_arguments"]
    tasks = "arc_easy:limit=1,winogrande:limit=1,mmlu:limit=1,agieval:limit=1"
    assert make_arguments(["benchmarks", "--smoke"])[-2:] == ["--evaluate", tasks]


def test_rates_are_widened_beyond_the_best_one_and_others_stay(tmp_path: Path) -> None:
    script = runpy.run_path(str(EXPERIMENTS / "compare.py"))
    assert script["widen"]([1e-4, 3e-4, 1e-3], 1e-3) == [1e-4, 3e-4, 1e-3, pytest.approx(1e-2 / 3, rel=1e-2)]
    assert script["widen"]([1e-4, 2e-4], 1e-4) == [5e-5, 1e-4, 2e-4]
    assert script["widen"]([1e-3], 1e-3) == [5e-4, 1e-3, 2e-3]
    ground = EXPERIMENTS / "ground.yaml"
    other = script["set_rates"](ground, {"LoRA r=16": [2e-3]}, tmp_path / "ground.yaml")
    before, after = ({arm.name: arm for arm in read_comparison(each).arms} for each in (ground, other))
    assert after["LoRA r=16"].lrs == (2e-3,)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "LoRA r=16")


def test_every_cell_of_learning_sh_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, calls = tmp_path / "my data", tmp_path / "my results", tmp_path / "calls"
    data.mkdir()
    for name in ("math", "code", "gsm8k", "alpaca", "dolly"):
        for file in (f"{name}.jsonl", f"{name}-val.jsonl", "general.jsonl"):
            (data / file).touch()
    arms = {
        path.stem: [arm.name for arm in read_comparison(path).arms]
        for path in sorted(EXPERIMENTS.glob("*.yaml"))
    }
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!{sys.executable} -S
import json, sys
arms = {json.dumps(arms)}
if "--list-arms" in sys.argv:
    print(*arms.get(sys.argv[2], [{ROWS!r}])[:2], sep="\\n")
else:
    with open({str(calls)!r}, "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
    )
    stub.chmod(0o755)
    for smoke in ("", "1"):
        done = subprocess.run(
            [EXPERIMENTS / "learning.sh", data, out],
            env=os.environ | {"PYTHON": str(stub), "JOBS": "1", "SMOKE": smoke},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("ended with 0") >= 30

    begun: list[Any] = []

    def begin(comparison: Any, *_: Any, **__: Any) -> None:
        begun.append(comparison)
        raise ValueError("begun")

    monkeypatch.setattr("lisatune.compare.stages.compare", begin)
    monkeypatch.setattr("lisatune.compare.read_results", lambda folder: {"arms": []})
    run = runpy.run_path(str(EXPERIMENTS / "compare.py"))["run"]
    given = [json.loads(line) for line in calls.read_text().splitlines()]
    assert sum(path.endswith("row_slices.py") for path, *_ in given) == 4
    parse = runpy.run_path(str(EXPERIMENTS / "row_slices.py"))["parse"]
    for path, *arguments in given:
        if path.endswith("row_slices.py"):
            asked = parse(arguments)
            assert f"run.device={os.environ.get('DEVICE', 'cuda')}" in asked.overrides
            assert (asked.seeds, asked.arms, asked.smoke) == ([0], [ROWS], "--smoke" in arguments)
        if path.endswith("compare.py"):
            if "--rates-of" in arguments:
                found = Path(arguments[arguments.index("--rates-of") + 1])
                assert found.is_relative_to(out)
                found.mkdir(parents=True, exist_ok=True)
                (found / "results.json").touch()
            assert run(arguments) == 2
            assert [arm.name for arm in begun[-1].arms] == [arguments[arguments.index("--methods") + 1]]
            assert ("--smoke" in arguments) == (begun[-1].budget == {"steps": 2})
    assert len(begun) == len(given) - 4


def test_learning_sh_trains_long_once_the_rate_is_chosen_and_names_a_cell_that_is_none(
    tmp_path: Path,
) -> None:
    data, out, calls = tmp_path / "my data", tmp_path / "my results", tmp_path / "calls"
    data.mkdir()
    for name in ("math", "math-val", "general"):
        (data / f"{name}.jsonl").touch()
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\n[[ "$*" == *--list-arms ]] && echo full || echo "$*" >>{calls}\n')
    stub.chmod(0o755)

    def call(*cells: str) -> tuple[int, str, int]:
        done = subprocess.run(
            [EXPERIMENTS / "learning.sh", data, out, *cells],
            env=os.environ | {"PYTHON": str(stub), "JOBS": "1", "SMOKE": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        made = len(calls.read_text().splitlines()) if calls.exists() else 0
        return done.returncode, done.stdout + done.stderr, made

    code, said, made = call("ground-math-long/full")
    assert (code, made) == (123, 0)
    assert "ground-math-long/full: its rate is not chosen yet" in said
    assert call("ground-math/full")[::2] == (0, 1)
    assert call("ground-math-long")[::2] == (0, 2)
    for wrong in ("ground-maths", "ground-math/fulll", "ground-code"):
        code, said, made = call("ground-math", wrong)
        assert (code, made) == (2, 2)
        assert f"learning.sh: no cell {wrong}, or no data for it" in said


def test_the_chosen_runs_of_a_comparison_become_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"arm": "full", "lr": 1e-4, "seed": 0, "tokens": 9, "validation_loss": 2.0, "test_loss": 1.5}
    run |= {"general_loss": 3.0, "trainable": 7, "train_seconds": 1.0, "chosen": True}
    arm = {"name": "full", "overrides": ["method.name=full"], "memory": {"peak_bytes": 5}}
    results = {"runs": [run | {"lr": 3e-4, "chosen": False}, run], "arms": [arm]}
    monkeypatch.setattr("lisatune.compare.read_results", lambda folder: results)
    gather = runpy.run_path(str(EXPERIMENTS / "gather.py"))["gather"]
    kept = json.loads((EXPERIMENTS / "runs.jsonl").read_text().splitlines()[0])
    (line,) = gather("math", tmp_path)
    assert list(line) == list(kept)
    assert (line["data"], line["lr"], line["step_peak_bytes"]) == ("math", 1e-4, 5)


def test_rows_are_asked_as_the_benchmarks_ask() -> None:
    convert = runpy.run_path(str(EXPERIMENTS / "benchmark_rows.py"))["CONVERT"]
    problem = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\nSo\n#### 2"}
    assert convert["gsm8k"](problem) == {
        "prompt": "Q: 1 + 1?\nA:",
        "completion": " It is 2. So The answer is 2.",
    }
    question = {"question": "Does it?", "contexts": ["One.", "Two."], "final_decision": "yes"}
    assert convert["pubmedqa"](question) == {
        "prompt": "Abstract: One.\nTwo.\nQuestion: Does it?\nAnswer:",
        "completion": " yes",
    }


def test_schedules_train_as_many_blocks_on_average_as_the_constant_one() -> None:
    script = runpy.run_path(str(EXPERIMENTS / "schedules.py"))
    schedules = {arm: script["make_schedule"](arm, 40) for arm in script["ARMS"]}
    assert schedules["8"] == (8,) * 40
    assert schedules["2, then 14"] == (2,) * 20 + (14,) * 20
    for active in schedules.values():
        assert len(active) == 40
        assert sum(active) / 40 == pytest.approx(8, abs=0.3)
        sampler = script["Scheduled"](30, active)
        assert [len(set(sampler.draw(period, seed=0))) for period in range(40)] == list(active)
        assert sum(sampler.inclusion()) == pytest.approx(sum(active) / 40)


def train_rows_slowly(
    model: nn.Module, drawn: Sequence[int], *, slices: int, period: int, steps: int, lr: float
) -> None:
    """Train as row slices do: every gradient in full, a new AdamW over copies of the rows of each draw."""
    blocks = {name: p for name, p in model.named_parameters() if ".layers." in name}
    matrices = [p for p in blocks.values() if p.ndim == 2]
    always = torch.optim.AdamW(set(model.parameters()) - set(blocks.values()), lr=lr, weight_decay=0)
    for index, chosen in enumerate(drawn):
        places = [(p, chosen * len(p) // slices, (chosen + 1) * len(p) // slices) for p in matrices]
        copies = [nn.Parameter(p.detach()[i:j].clone()) for p, i, j in places]
        norms = [p for p in blocks.values() if p.ndim == 1] if chosen == 0 else []
        some = torch.optim.AdamW([*copies, *norms], lr=lr * slices**0.5, weight_decay=0)
        for step in range(index * period, min((index + 1) * period, steps)):
            tiny.backward(model, step)
            for rows, (p, i, j) in zip(copies, places, strict=True):
                assert p.grad is not None
                rows.grad = p.grad[i:j]
            some.step()
            always.step()
            with torch.no_grad():
                for rows, (p, i, j) in zip(copies, places, strict=True):
                    p[i:j] = rows
            model.zero_grad()


@pytest.mark.parametrize("ends", ["train", "frozen"])
def test_slices_of_rows_train_as_their_slow_twin_and_no_other_row_moves(ends: str) -> None:
    script = runpy.run_path(str(EXPERIMENTS / "row_slices.py"))
    slices, period, steps, lr = 3, 2, 11, 1e-3
    model = tiny.llama(blocks=2).double()
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    layers = find_layers(model)
    script["cut_rows"](model, slices)
    drawn = script["map_slices"](model, find_layers(model))
    assert drawn.ends == layers.ends
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    lisa = script["SlicedLISA"](
        model, optimizer, active=1, period=period, ends=ends, layers=drawn, verify="full"
    )
    chosen: list[int] = []
    whole = {name: each for name, each in model.named_modules() if type(each) is script["RowLinear"]}
    for step in range(steps):
        (now,) = lisa.active_blocks
        if step % period == 0:
            chosen.append(now)
        before = {name: each.weight.clone() for name, each in whole.items()}
        tiny.backward(model, step)
        graded = [p for p in model.parameters() if p.grad is not None]
        assert sum(p.numel() for p in graded) == sum(p.numel() for p in lisa.trainable_parameters())
        optimizer.step()
        optimizer.zero_grad()
        for name, each in whole.items():
            rows = len(each.weight)
            i, j = now * rows // slices, (now + 1) * rows // slices
            moved = (each.weight != before[name]).any(dim=1)
            assert moved[i:j].all()
            assert not moved[:i].any()
            assert not moved[j:].any()
    assert len(set(chosen[:slices])) == slices
    kept = sum(p.numel() for p in lisa.trainable_parameters())
    held = {p for p, state in optimizer.state.items() if state}
    assert sum(p.numel() for p in held) <= kept
    lisa.check()
    lisa.settle()
    lisa.detach()
    if ends == "frozen":
        for name, p in twin.named_parameters():
            p.requires_grad_(".layers." in name)
    train_rows_slowly(twin, chosen, slices=slices, period=period, steps=steps, lr=lr)
    trained = dict(model.named_parameters())
    assert list(trained) == list(dict(plain.named_parameters()))
    for name, p in twin.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=1e-9, atol=1e-9)
        assert not torch.equal(p, plain.get_parameter(name)) or (ends == "frozen" and ".layers." not in name)


def test_the_drop_in_chooses_a_rate_on_one_half_and_reports_the_other() -> None:
    script = runpy.run_path(str(EXPERIMENTS / "drop_in.py"))
    runs = [
        {"lr_scaling": "sqrt", "lr": lr, "seed": seed, "validation_after": chosen + seed, "test_after": test}
        for lr, chosen, test in ((1e-4, 3.0, 2.0), (3e-4, 2.5, 4.0))
        for seed in (0, 1)
    ]
    assert script["choose"](runs) == {"sqrt": {"lr": 3e-4, "validation_loss": 3.0, "test_loss": 4.0}}
    recipe = script["load_recipe"](EXPERIMENTS.parent / "recipes" / "demo.yaml", script["DATA"])
    first, second = ({str(row["prompt"]) for row in each.rows} for each in script["halve_held_out"](recipe))
    assert (len(first), len(second)) == (32, 32)
    assert not first & second


def test_digits_that_choose_a_rate_are_not_those_that_report_it() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    script = runpy.run_path(str(EXPERIMENTS / "lcm_digits.py"))
    parts = [{image.numpy().tobytes() for image in images} for images, _ in script["load_digits"]()]
    assert [len(part) for part in parts] == [1437, 180, 180]
    assert len(set.union(*parts)) == 1797


def test_source_code_is_held_out_by_its_path_and_tests_stay_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"package/module{i}.py" for i in range(60)]
    for path in (*paths, "test/test_it.py", "package/tests/case.py", "site-packages/other.py"):
        (tmp_path / "lib" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / path).write_text(f"# {path}\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr("sys.argv", ["code_data.py", str(tmp_path / "data")])
    runpy.run_path(str(EXPERIMENTS / "code_data.py"), run_name="__main__")
    train, held_out = (
        {json.loads(line)["path"] for line in (tmp_path / "data" / name).read_text().splitlines()}
        for name in ("code.jsonl", "code-val.jsonl")
    )
    assert train | held_out == set(paths)
    assert not train & held_out
    assert 0 < len(held_out) < 10
    assert "Python 3" in capsys.readouterr().out


def test_average_regret_on_the_convex_problem_falls_as_the_theorem_says() -> None:
    pytest.importorskip("sklearn")
    script = runpy.run_path(str(EXPERIMENTS / "theorem1.py"))
    images, labels = script["load_digits"]()
    assert images.shape == (1797, 64)
    curve = script["average_regret"]("uniform, moments kept", 400, 0, 0.1567, images, labels)
    assert 0 < float(curve[-1]) < float(curve[19]) / 2
    times = torch.arange(1, 401, dtype=torch.float64)
    assert script["fit_slope"](3 * times**-0.5) == pytest.approx(-0.5, abs=1e-6)
    assert "<svg" in script["draw"]({"all blocks": curve}, 5.0)
