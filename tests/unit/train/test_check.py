"""`lisatune check`: all problems in one go, without weights and without a trace."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import trl
from rich.console import Console
from transformers import AutoTokenizer

import tiny_run
from lisatune.models import load_model, load_tokenizer, save_model
from lisatune.train.check import CheckReport, check, print_report
from lisatune.train.recipe_file import load_recipe
from tiny_text import CHATML

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text("utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"), plans=True)


def report_on(recipe: Path, *overrides: str, overwrite: bool = False) -> CheckReport:
    return check(load_recipe(recipe, overrides), overwrite=overwrite)


def test_a_good_recipe_has_an_outline_and_no_problem(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisatune.models.load.load_model", None)  # weights must not be loaded
    before = sorted(recipe.parent.iterdir())
    report = report_on(recipe)
    assert (report.problems, report.warnings) == ([], [])
    assert report.outline is not None
    assert (report.outline.num_blocks, report.outline.steps, report.outline.visits) == (4, 4, (1, 1, 1, 1))
    assert report.outline.train_rows + report.outline.validation_rows == 12
    assert sorted(recipe.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        (
            {"prompt": "{}", "completion": "b"},
            CHATML,
            "prompt-completion, without a template; loss on the answers",
        ),
        ({"text": "{} b"}, CHATML, "text, without a template; loss on all tokens"),
        (
            {"instruction": "{}", "output": "b"},
            CHATML,
            "alpaca, written by the tokenizer's chat template; loss on",
        ),
        (
            {"instruction": "{}", "output": "b"},
            None,
            "alpaca, written by lisatune's plain chat template; loss on",
        ),
        (
            {"instruction": "{}", "output": "b"},
            QWEN3,
            "the tokenizer's chat template in TRL's form for training;",
        ),
    ],
)
def test_the_outline_says_what_the_records_are_and_how_they_are_written(
    row: dict[str, str], template: str | None, says: str, recipe: Path, model: Path, tmp_path: Path
) -> None:
    rows = [{key: value.format(i) for key, value in row.items()} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    outline = report_on(recipe, f"model.name={folder}").outline
    assert outline is not None
    assert says in outline.records


def test_roles_with_loss_are_shown(recipe: Path) -> None:
    report = check(load_recipe(recipe, ["data.loss_on=[user]"]), show=1)
    assert report.outline is not None
    assert report.outline.records.endswith("; loss on messages of user")
    learned = [text for text, has_loss in report.shown[0] if has_loss]
    assert len(learned) == 1
    assert re.fullmatch(r"Count to \d+\.<eos>", learned[0])


def test_all_problems_are_found_in_one_go(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    rows = tiny_run.write_rows(tmp_path / "bad.jsonl", bad=(3, 7, 8))
    report = report_on(
        recipe,
        f"data.train={rows}",
        f"data.validation={tmp_path / 'absent.jsonl'}",
        "method.active=9",
        "run.report_to=[tensorbord]",
        "run.device=cuba",
    )
    assert len(report.problems) == 6, report.problems
    for part in (
        "--resume",
        "'tensorbord'",
        "cuba",
        "bad.jsonl, line 4",
        "absent.jsonl",
        "active must be between 0 and the model's 4 blocks, got 9",
    ):
        assert any(part in problem for problem in report.problems), (part, report.problems)
    assert any("(and 2 more like it); fix it, or set data.on_bad_row=skip" in p for p in report.problems)
    assert report.outline is None


def test_rows_are_read_even_when_the_model_is_missing(recipe: Path, tmp_path: Path) -> None:
    rows = tiny_run.write_rows(tmp_path / "bad.jsonl", bad=(0,))
    report = report_on(recipe, f"model.name={tmp_path}/nowhere", f"data.train={rows}")
    assert any("bad.jsonl, line 1" in problem for problem in report.problems)
    assert sum("nowhere" in problem for problem in report.problems) == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("method.active=-1", "got -1"),
        ("method.period=0", "got 0"),
        ("method.warmup=2", "warmup"),
        ("model.attention=flash", "flash"),
        ("data.max_length=4", "answer"),
        ("data.kind=messages", "messages"),
    ],
)
def test_a_value_the_model_or_data_do_not_allow_is_a_problem(recipe: Path, override: str, part: str) -> None:
    (problem,) = report_on(recipe, override).problems
    assert part in problem
    assert "\n" not in problem


@pytest.mark.parametrize("numbers", ["[1, 1]", "[1, 1, 1, -1]", "[1, 1, 1, .nan]", "[1, 0, 0, 0]"])
def test_probabilities_must_fit_the_model(recipe: Path, numbers: str) -> None:
    report = report_on(recipe, "method.sampler=weighted", f"method.probabilities={numbers}")
    assert len(report.problems) == 1, report.problems
    assert "probabilit" in report.problems[0]


@pytest.mark.filterwarnings("ignore:the chat template asks for an answer with")
def test_a_token_that_only_prompts_hold_must_have_an_embedding_too(
    recipe: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<far>"])
    tokenizer.chat_template = CHATML.replace("assistant\n' }}", "assistant\n<far>' }}")
    tokenizer.save_pretrained(folder)
    problems = report_on(recipe, f"model.name={folder}").problems
    assert [f"the tokenizer makes token {len(tokenizer) - 1}, " in problem for problem in problems] == [True]
    assert report_on(recipe, f"model.name={folder}", "run.samples=0").problems == []


def test_what_may_not_be_meant_is_a_warning(recipe: Path) -> None:
    report = report_on(recipe, "data.max_length=40", "method.active=1", "method.period=2")
    assert report.problems == []
    assert any("2 of 4 blocks will never train in 4 steps" in warning for warning in report.warnings)
    assert any("of more than data.max_length=40 tokens will be cut" in warning for warning in report.warnings)


def test_training_data_as_held_out_data_is_a_warning(recipe: Path, tmp_path: Path) -> None:
    report = report_on(recipe, f"data.validation={tmp_path / 'rows.jsonl'}")
    assert any("data.validation is data.train" in warning for warning in report.warnings)


def test_skipped_rows_are_counted_and_no_problem(recipe: Path, tmp_path: Path) -> None:
    rows = tiny_run.write_rows(tmp_path / "bad.jsonl", bad=(3, 7))
    report = report_on(recipe, f"data.train={rows}", "data.on_bad_row=skip")
    assert report.problems == []
    assert report.outline is not None
    assert report.outline.skipped == 2


def test_the_report_is_printed_outline_first_and_ends_in_a_verdict(recipe: Path) -> None:
    good, bad = report_on(recipe), report_on(recipe, "method.active=9")
    outs = []
    for report in (good, bad):
        console = Console(file=io.StringIO(), width=100, highlight=False)
        print_report(report, console)
        assert isinstance(console.file, io.StringIO)
        outs.append(console.file.getvalue())
    assert "╭─ run" in outs[0]
    assert outs[0].endswith("no problems found\n")
    assert outs[1].startswith("problem: active must be between")
    assert outs[1].endswith("1 problem; no run was begun\n")


def test_rows_are_shown_with_what_carries_loss(recipe: Path) -> None:
    report = check(load_recipe(recipe), show=2)
    assert len(report.shown) == 2
    console = Console(file=io.StringIO(), width=100)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    for number, parts in enumerate(report.shown, 1):
        learned = "".join(text for text, has_loss in parts if has_loss)
        assert learned
        assert f"row {number}, loss on what stands in" in out
        assert f"⟦{learned}⟧" in out


def test_resume_auto_is_no_problem_where_there_is_no_run(recipe: Path) -> None:
    assert not check(load_recipe(recipe), resume="auto").problems
    (problem,) = check(load_recipe(recipe), resume=True).problems
    assert "there is no run to resume in" in problem


@pytest.mark.parametrize(("instructions", "warned"), [("AVX2", 1), ("AVX512", 0)])
def test_a_cpu_that_multiplies_bf16_slowly_is_warned_of(
    instructions: str, warned: int, recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: instructions)
    for precision in ("bf16", "bf16-mixed"):
        slow = [
            text for text in report_on(recipe, f"run.precision={precision}").warnings if "no AVX-512" in text
        ]
        assert len(slow) == warned
    assert not report_on(recipe, "run.precision=fp32").warnings
    # Nor is bf16 advised there, to a model whose files are in bf16.
    save_model(load_model(str(model), dtype=torch.bfloat16), load_tokenizer(str(model)), tmp_path / "bf16")
    advised = report_on(recipe, f"model.name={tmp_path / 'bf16'}").warnings
    assert len(advised) == 1 - warned
