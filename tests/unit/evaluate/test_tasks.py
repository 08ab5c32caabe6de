"""Tasks open with the paper's settings, and what is missing or unknown is said before any model loads."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import tiny_tasks
from lisatune.evaluate import tasks
from lisatune.evaluate.tasks import PRESETS, open_tasks, split_tasks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_tasks.write_data(tmp_path / "data")


def prompt(task: Any, doc: int = 0) -> Any:
    return task.fewshot_context(task.eval_docs[doc], num_fewshot=task.config.num_fewshot)


def test_presets_have_the_shots_of_the_paper() -> None:
    shots = {name: preset.shots for name, preset in PRESETS.items()}
    assert shots == {"mmlu": 5, "agieval": 0, "winogrande": 5, "gsm8k": 8, "pubmedqa": 5, "arc_easy": 0}


def test_shots_stand_before_the_question_and_shots_0_needs_no_examples(data: Path) -> None:
    (data / "mmlu" / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"mmlu_anatomy needs dev\*, .* has only test\*.*shots to 0"):
        open_tasks(["mmlu"], data=data).__enter__()
    with open_tasks(["mmlu"], data=data, shots=0) as (task,):
        leaf = task.leaves["mmlu_world_religions"]
        assert prompt(leaf).count("Answer:") == 1
    with open_tasks(["arc_easy"], data=data, shots=2) as (task,):
        assert prompt(task.leaves["arc_easy"]).count("Answer:") == 3


def test_a_question_is_never_its_own_example(data: Path) -> None:
    (data / "arc_easy" / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"arc_easy needs train\*, .*shots to 0"):
        open_tasks(["arc_easy"], data=data, shots=2).__enter__()


def test_winogrande_without_train_takes_examples_from_other_questions_and_says_so(data: Path) -> None:
    with open_tasks(["winogrande"], data=data) as (task,):
        leaf = task.leaves["winogrande"]
        question = leaf.eval_docs[0]["sentence"].partition("_")[0]
        assert task.notes == ["examples from dev*, because there is no train*"]
        for context in prompt(leaf):
            assert context.count(question) == 1, "the question itself is no example"


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        ({"num_fewshot": 0, "training_split": "train"}, "is defined without examples, and the harness keeps"),
        ({"output_type": "loglikelihood_rolling", "training_split": "train"}, "scores texts that have no"),
        ({}, "has no rows for examples beside its questions"),
    ],
)
@pytest.mark.parametrize("is_local", [False, True])
def test_shots_are_refused_where_they_would_do_nothing_or_show_the_question_itself(
    definition: dict[str, Any], says: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, data = [{"text": f"q{i}?", "answer": f"a{i}"} for i in range(4)], tmp_path / "data"
    files = {split: str(data / "own" / f"{split}.jsonl") for split in ("train", "test")}
    for file in files.values():
        tiny_tasks.write_rows(Path(file), rows)
    kwargs = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    stock = {"task": "own", "dataset_path": "json", "dataset_kwargs": kwargs}
    stock |= {"test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
    stock |= {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"]}, "metric_list": []}
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "own.yaml").write_text(json.dumps(stock | definition))
    monkeypatch.setattr(tasks, "_all_tasks", lambda: tasks._manager([tmp_path / "stock"]))
    local = data if is_local else None
    with pytest.raises(ValueError, match=rf"^task own {says}.* with 2 examples; leave shots out"):
        open_tasks(["own"], data=local, shots=2).__enter__()
    for shots in (None, 0):
        with open_tasks(["own"], data=local, shots=shots) as (task,):
            assert task.leaves["own"].config.num_fewshot == 0


def test_a_group_asks_the_tasks_that_have_rows_and_says_which(data: Path) -> None:
    with open_tasks(["mmlu"], data=data) as (task,):
        assert {name: len(leaf.eval_docs) for name, leaf in task.leaves.items()} == {
            "mmlu_anatomy": 5,
            "mmlu_world_religions": 3,
        }
        assert task.notes == ["2 of 57 tasks: anatomy, world_religions"]
        assert task.group.version == "2"


def test_agieval_files_become_its_zero_shot_prompts(tmp_path: Path) -> None:
    row = {"passage": None, "question": "1 + 1?", "options": ["(A)1", "(B)2"], "label": "B"}
    folder = tmp_path / "agieval"
    folder.mkdir()
    with gzip.open(folder / "aqua-rat.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    tiny_tasks.write_rows(folder / "math.jsonl", [{"question": "2 + 2?", "answer": "4"}])
    with open_tasks(["agieval"], data=tmp_path) as (task,):
        choice, number = task.leaves["agieval_aqua_rat"], task.leaves["agieval_math"]
        assert prompt(choice) == "Q: 1 + 1? Answer Choices: (A)1 (B)2\nA: Among A through B, the answer is"
        assert choice.eval_docs[0]["gold"] == [1]
        assert prompt(number) == "Q: 2 + 2?\nA: The answer is"


def test_pubmedqa_and_gsm8k_take_simple_rows(tmp_path: Path) -> None:
    question = {"question": "Does it?", "contexts": ["One.", "Two."], "final_decision": "maybe"}
    tiny_tasks.write_rows(tmp_path / "pubmedqa" / "test.jsonl", [question])
    tiny_tasks.write_rows(tmp_path / "gsm8k" / "test.jsonl", [{"question": "1 + 1?", "answer": "So\n#### 2"}])
    with open_tasks(["pubmedqa"], data=tmp_path, shots=0) as (task,):
        assert prompt(task.leaves["pubmedqa"]) == "Abstract: One.\nTwo.\nQuestion: Does it?\nAnswer:"
    with open_tasks(["gsm8k"], data=tmp_path) as (task,):
        assert prompt(task.leaves["gsm8k_cot"]).count("Q: ") == 9


def test_lm_takes_the_settings_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Path(tasks.import_harness().__file__).parent / "tasks"
    monkeypatch.setattr(tasks, "_all_tasks", lambda: tasks._manager([stock / "winogrande", stock / "gsm8k"]))
    tiny_tasks.write_rows(tmp_path / "winogrande" / "dev.jsonl", tiny_tasks.winogrande(3))
    with open_tasks(["lm:winogrande"], data=tmp_path) as (task,):
        assert task.leaves["winogrande"].config.num_fewshot == 0


def test_an_unknown_task_is_refused_with_the_nearest_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Path(tasks.import_harness().__file__).parent / "tasks"
    monkeypatch.setattr(tasks, "_all_tasks", lambda: tasks._manager([stock / "winogrande", stock / "gsm8k"]))
    with pytest.raises(
        ValueError,
        match=r"unknown task 'winogrand'. Did you mean 'winogrande'(?! or 'winogrande'\b).*Presets: mmlu",
    ):
        open_tasks(["winogrand"]).__enter__()
    with pytest.raises(ValueError, match=r"unknown task 'arc'. Did you mean 'arc_easy'"):
        open_tasks(["arc"]).__enter__()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, r"no folder arc_easy \(it has other\)"),
        (lambda folder: (folder / "arc_easy").mkdir(), "has no rows of arc_easy"),
        (
            lambda folder: tiny_tasks.write_rows(folder / "arc_easy" / "train.jsonl", tiny_tasks.arc(1)),
            r"arc_easy needs test\*, .* has only train\*",
        ),
        (
            lambda folder: tiny_tasks.write_rows(folder / "arc_easy" / "test.jsonl", [{"question": "Who?"}]),
            r"test.jsonl:1: a row of arc_easy.*KeyError: 'choices'.*answerKey.*has question",
        ),
    ],
)
def test_missing_files_and_columns_of_a_task_are_named(tmp_path: Path, make: Any, says: str) -> None:
    (tmp_path / "other").mkdir()
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_tasks(["arc_easy"], data=tmp_path).__enter__()


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        (
            "arc_easy",
            {"question": "Q", "choices": ["a", "b"], "answer": -1},
            "answer is -1 and must be one of 0, 1",
        ),
        (
            "arc_easy",
            {"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "1"},
            "answerKey is '1' and must be one of 'A', 'B'",
        ),
        (
            "winogrande",
            {"sentence": "The _", "option1": "a", "option2": "b", "answer": 1},
            "answer is 1 and must be one of '1', '2'",
        ),
        (
            "winogrande",
            {"sentence": "The", "option1": "a", "option2": "b", "answer": "1"},
            "winogrande .*sentence has no _",
        ),
        (
            "pubmedqa",
            {"question": "Q", "contexts": ["c"], "final_decision": "Yes"},
            "final_decision is 'Yes' and must be one of 'yes', 'no', 'maybe'",
        ),
        (
            "mmlu",
            {"subject": "anatomy", "question": "Q", "choices": [*"abcd"], "answer": 4},
            "answer is 4 and must be one of 0, 1, 2, 3, 'A', 'B', 'C', 'D'",
        ),
        (
            "agieval",
            {"subject": "lsat-ar", "question": "Q", "options": ["(A)a", "(B)b"], "label": ""},
            "label is '' and must be one of 'A', 'B'",
        ),
    ],
)
def test_a_right_answer_that_is_no_answer_is_refused(
    task: str, row: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tiny_tasks.write_rows(tmp_path / task / "test.jsonl", [row])
    tiny_tasks.write_rows(tmp_path / task / "dev.jsonl", [row])
    with pytest.raises(ValueError, match=rf"(test|dev).jsonl:1: a row of .*{says}"):
        open_tasks([task], data=tmp_path, shots=0).__enter__()


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"test.jsonl cannot be read .*one JSON object per line"):
        open_tasks(["arc_easy"], data=tmp_path).__enter__()


def test_without_data_and_without_hub_the_task_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"questions of task arc_easy are not on this machine.*run.evaluate_data"
    ):
        open_tasks(["arc_easy"]).__enter__()


def test_names_are_split_and_a_limit_at_the_end_counts_for_all_without_their_own() -> None:
    assert split_tasks(" mmlu, lm:mmlu,") == {"mmlu": None, "lm:mmlu": None}
    assert split_tasks("arc_easy,winogrande:limit=200") == {"arc_easy": 200, "winogrande": 200}
    assert split_tasks("mmlu:limit=5,arc_easy") == {"mmlu": 5, "arc_easy": None}
    with pytest.raises(ValueError, match="names no task"):
        split_tasks(" ,")
    for text in (":limit=5", "mm\nlu"):
        with pytest.raises(ValueError, match="names no task"):
            split_tasks(text)
    with pytest.raises(ValueError, match=r"'mmlu:limt=5' sets .* write mmlu:limit=200"):
        split_tasks("mmlu:limt=5")
    with pytest.raises(ValueError, match="name mmlu twice"):
        split_tasks("mmlu,mmlu")
    with pytest.raises(ValueError, match=r"limit of 'mmlu:limit=0.5' must be a number >= 1"):
        split_tasks("mmlu:limit=0.5")
