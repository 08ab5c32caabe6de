"""`lisatune compare` accepts the comparisons in experiments/, and the scripts train what they say."""

import copy
import json
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from lisatune.compare.arms import read_comparison
from lisatune.nn.layers import find_layers

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
        match=r"name one of benchmarks, .*, gsm8k, pubmedqa, qlisa, table2, table6, table7, units",
    ):
        make_arguments(["table9"])


def test_smoke_asks_one_question_of_each_task() -> None:
    make_arguments = runpy.run_path(str(EXPERIMENTS / "compare.py"))["make_arguments"]
    tasks = "arc_easy:limit=1,winogrande:limit=1,mmlu:limit=1,agieval:limit=1"
    assert make_arguments(["benchmarks", "--smoke"])[-2:] == ["--evaluate", tasks]


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
