"""`lisatune evaluate`: a table and JSON, before and after, and refusals before weights load."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import tiny_tasks
from lisatune.cli.app import main
from lisatune.evaluate import tasks
from lisatune.evaluate.printing import print_scores
from lisatune.evaluate.scores import average
from lisatune.evaluate.tasks import OpenTask
from lisatune.memory import process
from lisatune.models import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.write_model(tmp_path_factory.mktemp("models") / "tuned")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.write_data(tmp_path_factory.mktemp("data"))


def evaluate(model: Path, data: Path, output: Path, *more: str) -> int:
    return main(
        ["evaluate", str(model), "--tasks", "arc_easy", "--data", str(data), "--output", str(output), *more]
    )


def test_the_table_says_how_the_scores_were_made(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, data, tmp_path / "out", "--limit", "5", "--shots", "1", "--batch", "2") == 0
    out = capsys.readouterr().out
    for text in (
        "arc_easy",
        "acc_norm",
        "±",
        "lm-evaluation-harness 0.",
        "float32 on cpu",
        "no chat template",
    ):
        assert text in out
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    settings = written["tasks"]["arc_easy"]["settings"]
    assert (settings["shots"], settings["limit"], settings["version"], settings["batch"]) == (1, 5, 1.0, 2)
    assert written["tasks"]["arc_easy"]["metrics"]["acc"]["stderr"] > 0


def test_against_shows_paired_differences(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_tasks.write_model(tmp_path / "base", seed=1)
    assert evaluate(model, data, tmp_path / "out", "--against", str(base), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    theirs = json.loads((tmp_path / "out" / "against" / "tasks" / "arc_easy" / "arc_easy.json").read_text())
    mine = printed["tasks"]["arc_easy"]["metrics"]["acc"]["value"]
    gain = printed["differences"]["arc_easy"]["acc"]
    assert gain["value"] == pytest.approx(mine - theirs["metrics"]["acc"]["value"])
    assert printed["against"]["name"] == str(base)


def test_perplexities_are_no_percentages_and_their_errors_print_nothing(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stock = Path(tasks.import_harness().__file__).parent / "tasks"
    monkeypatch.setattr(tasks, "_all_tasks", lambda: tasks._manager([stock / "lambada"]))
    rows = [{"text": f"The {word} met the fox"} for word in tiny_tasks.WORDS]
    tiny_tasks.write_rows(tmp_path / "data" / "lambada_openai" / "test.jsonl", rows)
    command = ["evaluate", str(model), "--tasks", "lambada_openai", "--data", str(tmp_path / "data")]
    command += ["--output", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    printed = capfd.readouterr()
    metric = json.loads(printed.out)["tasks"]["lambada_openai"]["metrics"]["perplexity"]
    assert metric["stderr"] > 0
    assert "Traceback" not in printed.err
    assert "bootstrap" not in printed.err
    assert main(command) == 0
    shown = capfd.readouterr().out
    assert f"{metric['value']:.4g} ± {metric['stderr']:.2g}" in shown
    assert "perplexity as they are" in shown


def test_a_tag_of_the_harness_which_has_no_average_shows_its_tasks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"shots": 0, "chat_template": False, "version": 1, "cut": 0, "questions": 2, "seconds": 1.0}
    metrics: Any = {"acc": {"value": 0.25, "stderr": 0.1, "higher_is_better": True}}
    leaves: Any = {
        name: {"items": 2, "settings": settings, "metrics": metrics, "per_item": {}}
        for name in ("one", "two")
    }
    score = average(OpenTask("tag", dict.fromkeys(leaves)), leaves)
    model = {"dtype": "float32", "device": "cpu"}
    print_scores({"tasks": {"tag": score}, "model": model, "harness": "h"})
    shown = capsys.readouterr().out
    assert shown.count("25.0 ± 10.0") == 2
    assert "one" in shown
    assert "two" in shown


def test_a_file_as_output_is_refused_before_the_model_loads(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert evaluate(model, data, tmp_path / "file") == 2
    said = capsys.readouterr()
    assert f"--output {tmp_path / 'file'} is a file; name a folder" in said.err
    assert said.out == ""


def test_a_model_in_the_current_folder_names_its_scores(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    command = ["evaluate", ".", "--tasks", "arc_easy", "--limit", "1", "--data", str(data)]
    assert main(command) == 0
    assert "runs/tuned-evaluation/evaluation.json" in capsys.readouterr().out


def test_a_model_without_a_chat_template_is_told_to_do_without(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_tasks.write_model(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    assert evaluate(plain, data, tmp_path / "out", "--chat-template", "on") == 2
    assert "has no chat template; give --chat-template off" in capsys.readouterr().err


def test_scores_of_another_model_in_the_folder_are_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_tasks.write_model(tmp_path / "other", seed=1)
    assert evaluate(model, data, tmp_path / "out") == 0
    assert evaluate(other, data, tmp_path / "out") == 2
    assert f"holds results of {model}" in capsys.readouterr().err
    tiny_tasks.write_model(model.parent / "changed")
    assert evaluate(model.parent / "changed", data, tmp_path / "own") == 0
    tiny_tasks.write_model(model.parent / "changed", seed=2)
    assert evaluate(model.parent / "changed", data, tmp_path / "own") == 2
    assert "as it was before its weights changed" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_it_loads(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*unused: Any, **options: Any) -> None:
        raise AssertionError("weights load")

    monkeypatch.setattr(process, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(load, "load_model", refuse)
    assert evaluate(model, data, tmp_path / "out") == 2
    assert "by its plan" in capsys.readouterr().err


def test_adapters_are_evaluated_with_their_model_and_refused_without(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_tasks.write_model(tmp_path / "base")
    tuned = get_peft_model(
        load.load_model(str(base)), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    load.save_model(tuned, load.load_tokenizer(str(base)), tmp_path / "adapters")
    assert evaluate(tmp_path / "adapters", data, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["arc_easy"]["items"] == 8
    base.rename(tmp_path / "moved")
    assert evaluate(tmp_path / "adapters", data, tmp_path / "again") == 2
    assert f"the adapters in {tmp_path / 'adapters'} belong to {base}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--batch", "many"), "--batch must be auto or a number >= 1, got 'many'"),
        (("--shots", "-1"), "shots must be >= 0"),
        (("--limit", "0"), "--limit must be >= 1"),
        (("--device", "tpu"), "unknown --device 'tpu'"),
        (("--data", "nowhere"), "there is no folder nowhere"),
        (("--judge-url", "http://x"), "--judge-url does nothing without --mt-bench; leave it out"),
        (("--max-new-tokens", "9"), "--max-new-tokens does nothing without --mt-bench"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    model: Path,
    data: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rest = [] if "--data" in more else ["--data", str(data)]
    assert main(["evaluate", str(model), "--tasks", "arc_easy", *rest, "--output", str(tmp_path), *more]) == 2
    assert says in capsys.readouterr().err
