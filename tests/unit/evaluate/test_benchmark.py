"""Scores are those of the harness's own command line, and asking leaves no trace in the model."""

import json
import math
import random
import socket
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

import tiny_tasks
from lisatune.evaluate import evaluate_tasks
from lisatune.evaluate.benchmark import Progress
from lisatune.evaluate.local_tasks import write_local_task
from lisatune.evaluate.scores import TaskScore, difference
from lisatune.evaluate.tasks import OpenTask

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Heard(Progress):
    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.answered = 0.0

    def begin(self, task: OpenTask, *, done: int, questions: int) -> None:
        self.asked.append((task.name, done, questions))

    def advance(self, questions: float) -> None:
        self.answered += questions


def run_harness(folder: Path, include: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the harness's command line in this process."""
    from lm_eval import evaluator
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    build = TaskManager.__init__

    def without_stock_tasks(
        self: Any, *arguments: Any, **options: Any
    ) -> None:  # reading them takes 10 seconds
        build(self, *arguments, **options | {"include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", without_stock_tasks)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # it runs pip
    monkeypatch.chdir(output)  # it asks git for a commit
    line = f"lm-eval run --model hf --model_args pretrained={folder},dtype=float32,attn_implementation=eager"
    line += f" --tasks arc_easy,winogrande,mmlu --num_fewshot 2 --include_path {include} --device cpu"
    line += f" --batch_size 1 --output_path {output / 'results'}"
    monkeypatch.setattr(sys, "argv", line.split())
    cli_evaluate()
    (file,) = (output / "results").rglob("results_*.json")
    result: dict[str, Any] = json.loads(file.read_text())["results"]
    return result


def write_definitions(data: Path, where: Path) -> None:
    stock = files("lm_eval") / "tasks"
    single = {"arc_easy": "arc/arc_easy.yaml", "winogrande": "winogrande/default.yaml"}
    for name, path in single.items():
        write_local_task(name, {name: Path(str(stock / path))}, data, where / name, shots=2)
    default = Path(str(stock / "mmlu" / "default"))
    leaves = {
        f"mmlu_{subject}": default / f"mmlu_{subject}.yaml" for subject in ("anatomy", "world_religions")
    }
    averages = [{"metric": "acc", "weight_by_size": True}]
    (where / "mmlu").mkdir()
    group = {"group": "mmlu", "aggregate_metric_list": averages}
    write_local_task("mmlu", leaves, data, where / "mmlu", shots=2, group=group)


def as_harness(score: TaskScore) -> dict[str, float]:
    found = {}
    for name, metric in score["metrics"].items():
        found[f"{name},none"] = metric["value"]
        found[f"{name}_stderr,none"] = metric["stderr"]
    return found  # type: ignore[return-value]


def test_scores_equal_those_of_the_harness_command_line(
    folder: Path, data: Path, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = evaluate_tasks(model, tokenizer, "arc_easy,winogrande,mmlu", shots=2, data=data, batch=1)
    where = tmp_path / "definitions"
    where.mkdir()
    write_definitions(data, where)
    theirs = run_harness(folder, where, tmp_path, monkeypatch)
    ours = {name: as_harness(score) for name, score in scores.items()}
    ours |= {name: as_harness(leaf) for name, leaf in scores["mmlu"]["subtasks"].items()}
    assert ours.keys() == theirs.keys()
    for name, figures in ours.items():
        assert figures == {key: theirs[name][key] for key in figures}, name
    assert len({figures["acc,none"] for figures in ours.values()}) > 2, "the tiny model answers differently"


def test_no_network_is_used_with_local_data(
    data: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*unused: Any) -> None:
        raise AssertionError("the network is used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    score = evaluate_tasks(model, tokenizer, "arc_easy", data=data)["arc_easy"]
    assert score["items"] == 8
    assert len(score["per_item"]["acc"]) == 8


def test_the_model_keeps_its_mode_and_random_numbers_go_on(data: Path, model: Any, tokenizer: Any) -> None:
    model.train()
    model.lm_head.eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore
    evaluate_tasks(model, tokenizer, "winogrande", data=data)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore


def test_a_stopped_evaluation_goes_on_with_the_tasks_that_are_left(
    data: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    class Stopped(Heard):
        def advance(self, questions: float) -> None:
            super().advance(questions)
            if self.answered > 6:  # in the second subject
                raise KeyboardInterrupt

    first, second, third = Stopped(), Heard(), Heard()
    keep = {"data": data, "output": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, tokenizer, "mmlu", progress=first, **keep)
    resumed = evaluate_tasks(model, tokenizer, "mmlu", progress=second, **keep)
    assert second.asked == [("mmlu", 5, 8)]
    assert second.answered == pytest.approx(3)
    assert (
        resumed["mmlu"]["metrics"] == evaluate_tasks(model, tokenizer, "mmlu", data=data)["mmlu"]["metrics"]
    )
    evaluate_tasks(model, tokenizer, "mmlu", progress=third, limit=2, **keep)
    assert third.asked == [("mmlu", 0, 4)], "another limit asks again"


def test_a_damaged_score_is_asked_again(data: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = evaluate_tasks(model, tokenizer, "arc_easy", data=data, output=tmp_path)
    (tmp_path / "tasks" / "arc_easy" / "arc_easy.json").write_text('{"settings": 3')
    after = evaluate_tasks(model, tokenizer, "arc_easy", data=data, output=tmp_path)
    assert after["arc_easy"]["metrics"] == before["arc_easy"]["metrics"]


def test_changed_questions_are_asked_again(data: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    own = tmp_path / "data"
    tiny_tasks.write_rows(own / "arc_easy" / "test.jsonl", tiny_tasks.arc(4))
    evaluate_tasks(model, tokenizer, "arc_easy", data=own, output=tmp_path / "out")
    tiny_tasks.write_rows(own / "arc_easy" / "test.jsonl", tiny_tasks.arc(4, 1))
    heard = Heard()
    evaluate_tasks(model, tokenizer, "arc_easy", data=own, output=tmp_path / "out", progress=heard)
    assert heard.asked == [("arc_easy", 0, 4)]


def test_prompts_that_lose_their_beginning_are_counted(data: Path, tmp_path: Path) -> None:
    short = tiny_tasks.write_model(tmp_path / "short", positions=40)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(short), AutoTokenizer.from_pretrained(short)
    score = evaluate_tasks(model, tokenizer, "arc_easy", shots=2, data=data, limit=1)["arc_easy"]
    assert score["settings"]["cut"] == 4, "one for each choice"


def test_more_examples_than_there_are_is_one_sentence(data: Path, model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"task arc_easy cannot be asked with 50 examples: "):
        evaluate_tasks(model, tokenizer, "arc_easy", shots=50, data=data)


def test_a_chat_template_changes_what_is_asked(data: Path, model: Any, tokenizer: Any) -> None:
    scores = [
        evaluate_tasks(model, tokenizer, "arc_easy", data=data, chat_template=chat, limit=3)["arc_easy"]
        for chat in (False, True)
    ]
    assert [score["settings"]["chat_template"] for score in scores] == [False, True]


def score_of(*results: float) -> TaskScore:
    mean = sum(results) / len(results)
    metrics: Any = {"acc": {"value": mean, "stderr": 0.2, "higher_is_better": True}}
    return {"items": len(results), "metrics": metrics, "per_item": {"acc": list(results)}}


def test_a_difference_has_the_error_of_paired_questions() -> None:
    gain = difference(score_of(1, 1, 1, 0), score_of(1, 1, 0, 0), "acc")
    assert gain is not None
    assert gain["value"] == pytest.approx(0.25)
    assert gain["stderr"] == pytest.approx(0.25)  # sd of 0 0 1 0 is 1/2, over √4
    same = difference(score_of(1, 0), score_of(1, 0), "acc")
    assert same is not None
    assert same["stderr"] == 0
    assert difference(score_of(1, 0), score_of(1, 0, 1), "acc") is None, "other questions"


def test_a_score_that_is_no_mean_over_questions_has_no_paired_error() -> None:
    mine, base = score_of(-1.0, -2.0), score_of(-1.5, -3.0)
    for score in (mine, base):  # a perplexity, whose results per question are log-likelihoods
        score["metrics"]["acc"]["value"] = math.exp(-score["metrics"]["acc"]["value"])
    gain = difference(mine, base, "acc")
    assert gain is not None
    assert gain["value"] == pytest.approx(math.exp(1.5) - math.exp(2.25))
    assert gain["stderr"] is None
