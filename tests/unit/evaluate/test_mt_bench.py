"""MT-Bench: FastChat's prompts and temperatures, and a judge that is slow, busy, wrong or refuses."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import tiny_tasks
from lisatune.cli.app import main
from lisatune.evaluate.judge import Judge, find_key, judge_answers, read_rating, write_prompt
from lisatune.evaluate.mt_bench import TEMPERATURES, answer_questions, load_questions, read_answers

Reply = Callable[[int, dict[str, Any]], tuple[int, Any, dict[str, str]]]


def say(text: str | None, **more: Any) -> tuple[int, Any, dict[str, str]]:
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return 200, {"choices": [{"message": {"content": text}}], "usage": usage, **more}, {}


class Server:
    """A server that answers as `reply(number of the request, body)` says."""

    def __init__(self, reply: Reply) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.hold = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                outer.paths.append(self.path)
                status, answer, headers = reply(len(outer.bodies) - 1, body)
                if status == 0:  # never answers
                    outer.hold.wait(20)
                    return
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:  # what a redirect of a POST ends in
                outer.keys.append(self.headers.get("Authorization"))
                self.send_error(404)

            def log_message(self, *unused: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LISATUNE_JUDGE_KEY",
        "OPENAI_API_KEY",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A folder with made-up answers to the first questions of three categories."""
    (tmp_path / "mt_bench").mkdir()
    lines = [
        {
            "question_id": question["question_id"],
            "model_id": "tiny",
            "choices": [{"index": 0, "turns": ["A1", "A2"]}],
        }
        for question in load_questions()
    ]
    (tmp_path / "mt_bench" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def judge(server: Server, **options: Any) -> Judge:
    return Judge(server.url, "judge", **{"sleep": lambda seconds: None} | options)


def chosen(*categories: str, each: int = 1) -> list[Any]:
    questions = load_questions()
    return [q for name in categories for q in [q for q in questions if q["category"] == name][:each]]


def test_fastchat_has_80_questions_of_two_turns_and_8_categories() -> None:
    questions = load_questions()
    assert len(questions) == 80
    assert {len(question["turns"]) for question in questions} == {2}
    assert {question["category"] for question in questions} == TEMPERATURES.keys()


def test_prompts_have_references_for_math_reasoning_and_coding_alone() -> None:
    names = {}
    for question in chosen(*TEMPERATURES):
        answer: Any = {"choices": [{"turns": ["FIRST {x}", "SECOND"]}]}
        for turn in (1, 2):
            name, system, prompt = write_prompt(question, answer, turn)
            names[question["category"], turn] = name
            assert "FIRST {x}" in prompt
            assert ("SECOND" in prompt) == (turn == 2)
            assert (system == "You are a helpful assistant.") == (turn == 1)
            assert ("Reference" in prompt) == ("math" in name)
    assert names["writing", 1] == "single-v1"
    assert names["writing", 2] == "single-v1-multi-turn"
    with_reference = {category for (category, turn), name in names.items() if "math" in name}
    assert with_reference == {"math", "reasoning", "coding"}


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[8]]", 8),
        ("[[7.5]] or [[2]]", 7.5),
        ("Rating: [6]", 6),
        ("ten", -1),
        ("[[A]]", -1),
        ("", -1),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(text: str, rating: float) -> None:
    assert read_rating(text) == rating


def test_answers_have_two_turns_and_go_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_tasks.write_model(tmp_path / "model", positions=4096)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).train(),
        AutoTokenizer.from_pretrained(folder),
    )
    seen: list[tuple[bool, float | None, int]] = []
    generate = LlamaForCausalLM.generate

    def listen(self: Any, prompt: Any, *, generation_config: Any, **options: Any) -> Any:
        seen.append((generation_config.do_sample, generation_config.temperature, prompt.shape[1]))
        return generate(self, prompt, generation_config=generation_config, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", listen)
    state = torch.get_rng_state()
    options = {"identity": {"name": "tiny", "sha256": {}}, "max_new_tokens": 3}
    questions = chosen("writing", "math", "stem")
    first = answer_questions(model, tokenizer, tmp_path, questions[:2], **options)
    assert [each[:2] for each in seen[:4]] == [(True, 0.7), (True, 0.7), (False, None), (False, None)]
    assert seen[1][2] > seen[0][2], "the second turn has the first in front of it"
    answers = tmp_path / "mt_bench" / "answers.jsonl"
    answers.write_text(answers.read_text() + '{"question_id": 1')  # killed here
    second = answer_questions(model, tokenizer, tmp_path, questions, **options)
    assert len(seen) == 6
    assert seen[-1][:2] == (True, 0.1)
    assert second[:2] == first
    assert [len(answer["choices"][0]["turns"]) for answer in read_answers(tmp_path)] == [2, 2, 2]
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"were written with max_new_tokens 3, and it is 4 now"):
        answer_questions(model, tokenizer, tmp_path, questions, **options | {"max_new_tokens": 4})
    with pytest.raises(ValueError, match=r"were written with dtype float32, and it is bfloat16 now"):
        answer_questions(model.bfloat16(), tokenizer, tmp_path, questions, **options)
    other = {"name": "other", "sha256": {}}
    with pytest.raises(ValueError, match="holds results of tiny, and this is other"):
        answer_questions(model, tokenizer, tmp_path, questions, **options | {"identity": other})


def test_the_judge_is_asked_by_the_protocol_and_scores_are_means_of_turns(answered: Path) -> None:
    ratings = iter([4, 6, 8, 10])
    with Server(lambda number, body: say(f"Rating: [[{next(ratings)}]]")) as server:
        scores = judge_answers(answered, chosen("writing", "math"), judge(server))
    assert set(server.paths) == {"/v1/chat/completions"}
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 2048, "judge")
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert scores["score"] == {"turn_1": 5, "turn_2": 9, "mean": 7}
    assert scores["categories"]["math"] == {"turn_1": 6, "turn_2": 10, "mean": 8}
    assert (scores["read_tokens"], scores["written_tokens"]) == (40, 12)
    assert scores["judge"]["model"] == "judge"
    assert scores["judge"]["first_day"] <= scores["judge"]["last_day"]
    kept = [
        json.loads(line)
        for line in (answered / "mt_bench" / "judgments-judge.jsonl").read_text().splitlines()
    ]
    assert [line["score"] for line in kept] == [4, 6, 8, 10]


def test_unparsable_and_empty_judgements_are_kept_and_left_out_of_the_mean(answered: Path) -> None:
    replies = ["[[8]]", "I cannot judge this.", None, "[[6]]"]
    with Server(lambda number, body: say(replies[number])) as server:
        scores = judge_answers(answered, chosen("writing", "stem"), judge(server))
    assert scores["without_rating"] == 2
    assert scores["score"]["mean"] == 7
    assert scores["categories"]["stem"]["turn_1"] is None
    assert len((answered / "mt_bench" / "judgments-judge.jsonl").read_text().splitlines()) == 4


def test_a_busy_or_broken_server_is_asked_again_after_the_wait_that_it_wants(answered: Path) -> None:
    troubles: list[tuple[int, Any, dict[str, str]]] = [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "17"}),
        (503, b"<html>", {}),
        (200, b"not json", {}),
        (200, {"choices": []}, {}),
        (200, b"cut", {"Content-Length": "99"}),
        say("[[5]]"),
        say("[[5]]"),
    ]
    waits: list[float] = []
    with Server(lambda number, body: troubles[number]) as server:
        scores = judge_answers(answered, chosen("writing"), judge(server, sleep=waits.append))
    assert waits == [17, 2, 4, 8, 16]
    assert scores["score"]["mean"] == 5


def test_a_judge_that_never_answers_is_given_up_and_what_is_done_is_kept(answered: Path) -> None:
    with (
        Server(lambda number, body: say("[[9]]") if number == 0 else (0, None, {})) as server,
        pytest.raises(RuntimeError, match=r"failed 2 times \(.*[Tt]ime.*\); give the command again"),
    ):
        judge_answers(answered, chosen("writing"), judge(server, timeout=0.1, tries=2))
    with Server(lambda number, body: say("[[3]]")) as server:
        scores = judge_answers(answered, chosen("writing"), judge(server))
        assert len(server.bodies) == 1, "the first judgement was kept"
    assert scores["score"] == {"turn_1": 9, "turn_2": 3, "mean": 6}


def test_a_judge_that_refuses_is_not_asked_again_and_the_key_is_nowhere(
    answered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISATUNE_JUDGE_KEY", "sk-very-secret")

    def refuse(number: int, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        return (401, {"error": {"message": "wrong key sk-very-secret"}}, {}) if number == 0 else say("[[5]]")

    line = ["evaluate", "tiny", "--mt-bench", "judge", "--output", str(answered), "--judge-model", "a/judge"]
    with Server(refuse) as server:
        assert main([*line, "--judge-url", server.url, "--limit", "1"]) == 2
        said = capsys.readouterr()
        assert len(server.bodies) == 1
        assert main([*line, "--judge-url", server.url, "--limit", "1", "--judge-price", "2,10"]) == 0
        said_then = capsys.readouterr()
        assert server.keys == ["Bearer sk-very-secret"] * 3
    assert "refuses: 401 wrong key ***" in said.err
    assert "will judge 2 answers: about" in said_then.out
    assert "at most 0.04 by --judge-price" in said_then.out
    assert "a/judge at 127.0.0.1" in said_then.out
    written = "".join(file.read_text() for file in answered.rglob("*") if file.is_file())
    assert "very-secret" not in written + said.out + said.err + said_then.out + said_then.err
    assert "very-secret" not in repr(Judge(server.url, "judge", "sk-very-secret"))


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    answered: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_key("http://x/v1", {"LISATUNE_JUDGE_KEY": "sk-secret\r\n"}) == "sk-secret"
    monkeypatch.setenv("LISATUNE_JUDGE_KEY", "sk-secret\nsk-secret")
    command = ["evaluate", "tiny", "--mt-bench", "judge", "--output", str(answered), "--judge-model", "m"]
    assert main([*command, "--judge-url", "http://127.0.0.1:9/v1"]) == 2
    said = capsys.readouterr().err
    assert "set LISATUNE_JUDGE_KEY to the key alone" in said
    assert "secret" not in said


def test_judges_whose_files_have_one_name_do_not_share_judgements(answered: Path) -> None:
    with Server(lambda number, body: say("[[5]]")) as server:
        for name in ("a/b", "a-b"):
            scores = judge_answers(answered, chosen("writing"), Judge(server.url, name))
            assert scores["judge"]["model"] == name
    assert [body["model"] for body in server.bodies] == ["a/b", "a/b", "a-b", "a-b"]


def test_the_key_does_not_follow_a_redirect(answered: Path) -> None:
    with (
        Server(lambda number, body: say("[[5]]")) as elsewhere,
        Server(lambda number, body: (302, {}, {"Location": elsewhere.url})) as server,
        pytest.raises(ValueError, match="refuses: 302"),
    ):
        judge_answers(answered, chosen("writing"), judge(server, key="sk"))
    assert elsewhere.keys == []


def test_the_key_of_openai_goes_to_openai_alone() -> None:
    both = {"OPENAI_API_KEY": "openai"}
    assert find_key("https://api.openai.com/v1", both) == "openai"
    assert find_key("https://judge.example/v1", both) is None
    assert find_key("https://judge.example/v1", both | {"LISATUNE_JUDGE_KEY": "own"}) == "own"


def test_answers_and_judgements_may_hold_line_separators_of_unicode(answered: Path) -> None:
    file = answered / "mt_bench" / "answers.jsonl"
    before = json.loads(file.read_text(encoding="utf-8").partition("\n")[0])
    before["choices"][0]["turns"][0] = "one\u2028two\x85three"
    file.write_text(json.dumps(before, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(answered) == [before]
    with Server(lambda number, body: say("fine\u2029[[5]]")) as server:
        question = chosen("writing")
        first = judge_answers(answered, question, judge(server))
        assert judge_answers(answered, question, judge(server)) == first
    assert len(server.bodies) == 2
    assert "one\u2028two" in server.bodies[0]["messages"][1]["content"]


def test_changed_answers_are_judged_again(answered: Path) -> None:
    with Server(lambda number, body: say("[[5]]")) as server:
        judge_answers(answered, chosen("writing"), judge(server))
        file = answered / "mt_bench" / "answers.jsonl"
        file.write_text(file.read_text().replace("A2", "B2"))
        judge_answers(answered, chosen("writing"), judge(server))
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "give --judge-url and --judge-model"),
        (("--judge-url", "localhost", "--judge-model", "m"), "the judge's url must be a server's address"),
        (("--judge-url", "http://x:80a/v1", "--judge-model", "m"), "must be a server's address"),
        (("--judge-url", "http://x/a b", "--judge-model", "m"), "must be a server's address"),
        (("--judge-url", "http://[x/v1", "--judge-model", "m"), "must be a server's address"),
        (
            ("--judge-url", "http://x/v1", "--judge-model", "m", "--judge-timeout", "inf"),
            "timeout must be seconds > 0 and at most 1,000,000, got inf",
        ),
        (("--judge-url", "http://x/v1", "--judge-model", "m"), "has no answers to 80 of 80 questions"),
        (
            ("--judge-url", "http://x/v1", "--judge-model", "m", "--judge-price", "2"),
            "--judge-price must be two",
        ),
        (("--tasks", "mmlu"), "--tasks and --mt-bench are two evaluations"),
        (("--against", "x", "--shots", "1"), "--shots and --against do nothing with --mt-bench"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(
    tmp_path: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "tiny", "--mt-bench", "judge", "--output", str(tmp_path), *more]) == 2
    assert says in capsys.readouterr().err
