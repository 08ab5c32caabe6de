"""MT-Bench's judge is a real server, llama.cpp inside xllamacpp, with a model that is too small to judge."""

import json
from pathlib import Path

import pytest

from lisatune.cli.app import main
from lisatune.evaluate.mt_bench import load_questions

xllamacpp = pytest.importorskip("xllamacpp")


@pytest.mark.smollm2
def test_a_server_of_llama_cpp_judges_two_turns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lisatune.models.gguf import find_smollm2

    params = xllamacpp.CommonParams()
    params.model.path = str(find_smollm2())
    params.n_ctx, params.n_parallel, params.port, params.n_predict = 768, 1, 0, 24
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    question = load_questions(1)[0]["question_id"]
    answer = {"question_id": question, "model_id": "m", "choices": [{"index": 0, "turns": ["Aloha.", "A."]}]}
    (tmp_path / "mt_bench").mkdir()
    (tmp_path / "mt_bench" / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    url = f"{server.listening_address}/v1"
    line = ["evaluate", "m", "--mt-bench", "judge", "--judge-url", url, "--judge-model", "smollm2"]
    assert main([*line, "--limit", "1", "--output", str(tmp_path)]) == 0
    del server
    scores = json.loads((tmp_path / "mt_bench" / "scores-smollm2.json").read_text())
    lines = (tmp_path / "mt_bench" / "judgments-smollm2.jsonl").read_text().splitlines()
    kept = [json.loads(text) for text in lines]
    assert [line["turn"] for line in kept] == [1, 2]
    assert all(line["judgment"] and line["usage"]["prompt_tokens"] > 100 for line in kept)
    assert scores["questions"] == 1
    assert "judge" in capfd.readouterr().out
