"""`lisatune generate`: prompts from everywhere, batches, JSON lines, two models, a conversation."""

import io
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from lisatune.cli.app import main
from lisatune.evaluate.held_out import generate_answers
from lisatune.models.load import load_model, load_tokenizer, save_model
from lisatune.runs.manifest import FILES
from tiny_run import write_model

SHORT = ("--max-new-tokens", "4", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it


def write(folder: Path, seed: int) -> Path:
    """Write a model with weights so large that its answers depend on the prompt."""
    write_model(folder)
    model = load_model(str(folder))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(generator=generator)
    save_model(model, load_tokenizer(str(folder)), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "mine", 1)


@pytest.fixture(scope="module")
def other(model: Path) -> Path:
    return write(model.parent / "other", 2)


def answer(model: Path, *texts: str, system: str | None = None) -> list[str]:
    """Answers as the library gives them."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    asked = [[*begin, {"role": "user", "content": text}] for text in texts]
    return generate_answers(load_model(str(model)), load_tokenizer(str(model)), asked, max_new_tokens=4)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_of_a_file_are_answered_in_batches_as_one_by_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["One.", "A longer prompt than the first.", "Two", "x", "And the last of all of them."]
    (tmp_path / "prompts.txt").write_text("\n\n".join(texts) + "\n")
    command = ["generate", str(model), "--file", str(tmp_path / "prompts.txt"), *SHORT]
    for batch in ("1", "2", "8"):
        assert main([*command, "--json", "--batch", batch]) == 0
        found = lines(capsys.readouterr().out)
        assert [each["answer"] for each in found] == answer(model, *texts)
    assert len({each["answer"] for each in found}) > 2
    assert found[0] == {
        "messages": [{"role": "user", "content": "One."}],
        "answer": answer(model, "One.")[0],
        "model": str(model),
    }


def test_a_prompt_may_hold_line_separators_of_unicode(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "One\u2028two\x85three"}, ensure_ascii=False), encoding="utf-8")
    assert main(["generate", str(model), "--file", str(file), "--json", *SHORT]) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert found["messages"][-1]["content"] == "One\u2028two\x85three"


def test_answers_go_into_a_new_file_of_json_lines(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "generate",
        str(model),
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--output",
        str(tmp_path / "new" / "x.jsonl"),
        *SHORT,
    ]
    assert main([*command, "--chat-template", "off"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'x.jsonl'}\n"
    assert [each["prompt"] for each in lines((tmp_path / "new" / "x.jsonl").read_text())] == ["a", "b"]
    assert main(command) == 2
    assert "exists; name a new file" in capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_prompts_of_standard_input(
    named: bool, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}]
    text = json.dumps({"messages": conversation}) + "\n" + json.dumps({"prompt": "One."}) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    more = ["--file", "-"] if named else []
    assert main(["generate", str(model), "--json", "--system", "T", *more, *SHORT]) == 0
    found = lines(capsys.readouterr().out)
    assert found[0]["messages"] == conversation  # its own system prompt stays
    assert found[1]["messages"] == [{"role": "system", "content": "T"}, {"role": "user", "content": "One."}]
    assert found[1]["answer"] == answer(model, "One.", system="T")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("plain text\n"))
    assert main(["generate", str(model), *SHORT]) == 0
    assert capsys.readouterr().out == answer(model, "plain text")[0] + "\n"


def test_two_models_answer_side_by_side(model: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "--prompt", "One.", "--against", str(other), *SHORT]
    assert main([*command, "--json"]) == 0
    (found,) = lines(capsys.readouterr().out)
    assert found["answer"] == answer(model, "One.")[0]
    assert (found["against"], found["against_answer"]) == (str(other), answer(other, "One.")[0])
    assert found["answer"] != found["against_answer"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("> One.\n")
    assert "mine" in out
    assert "other" in out


def test_a_conversation_keeps_its_turns_and_streams(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("One.\n\nTwo.\n/reset\nOne.\n" + "x" * 300 + "\n/exit\nmore\n")
    )
    seen: list[list[dict[str, str]]] = []

    def listen(
        unused: object, tokenizer: object, prompts: list[list[dict[str, str]]], **how: object
    ) -> list[str]:
        seen.append([dict(message) for message in prompts[0]])
        return generate_answers(load_model(str(model)), load_tokenizer(str(model)), prompts, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("lisatune.evaluate.held_out.generate_answers", listen)
    assert main(["generate", str(model), "--chat", "--system", "S", *SHORT]) == 0
    system = {"role": "system", "content": "S"}
    one, two = ({"role": "user", "content": text} for text in ("One.", "Two."))
    first = answer(model, "One.", system="S")[0]
    assert seen[:3] == [
        [system, one],
        [system, one, {"role": "assistant", "content": first}, two],
        [system, one],
    ]
    assert len(seen) == 4
    out = capsys.readouterr().out
    assert out.startswith(f"/reset begins a new conversation, /exit ends\n{first}\n")
    assert "tokens and the model reads at most 256; /reset begins a new conversation" in out


def test_two_models_in_one_conversation(
    model: Path, other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One.\n"))
    assert main(["generate", str(model), "--chat", "--against", str(other), *SHORT]) == 0
    out = capsys.readouterr().out
    assert f"[{model}]\n{answer(model, 'One.')[0]}\n[{other}]\n{answer(other, 'One.')[0]}\n" in out


def test_draws_depend_on_the_seed_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(seed: str) -> str:
        more = ("--temperature", "2", "--top-p", "0.9", "--seed", seed)
        assert main(["generate", str(model), "--prompt", "One.", *SHORT, *more]) == 0
        return capsys.readouterr().out

    assert draw("1") == draw("1")
    assert len({draw(seed) for seed in "1234"}) > 1


def test_streamed_pieces_are_the_answer(model: Path) -> None:
    pieces: list[str] = []
    loaded, tokenizer = load_model(str(model)), load_tokenizer(str(model))
    (found,) = generate_answers(loaded, tokenizer, ["One."], max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == found


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("", (), "prompts.jsonl is empty; write a prompt on each line"),
        (" \n\n", (), "is empty; write a prompt on each line"),
        ('{"prompt": "x"}\n{', (), "line 2 is not JSON"),
        ('{"text": "x"}', (), "line 1 has neither a text in `prompt` nor a list of role and content"),
        ('{"messages": [{"role": "user"}]}', (), "line 1 has neither"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', (), "ends with an answer of the assistant"),
        ('"x"', ("--prompt", "y"), "--prompt and --file both give prompts; use one of them"),
        ('"x"', ("--batch", "0"), "--batch must be >= 1, got 0"),
        ('"x"', ("--temperature", "-1"), "--temperature must be a number >= 0, got -1"),
        ('"x"', ("--top-p", "0"), "--top-p must be above 0 and at most 1, got 0"),
        ('"x"', ("--top-p", "0.9"), "--top-p does nothing without --temperature"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            ("--chat-template", "off"),
            "prompts.jsonl has `messages`, which go through the chat template; leave out --chat-template off",
        ),
        ('"x"', ("--chat", "--chat-template", "off"), "--chat-template off does nothing with --chat"),
        ('"x"', ("--chat",), "--chat is a conversation on the terminal; leave out"),
        ('"x"', ("--system", "S", "--chat-template", "off"), "--system needs the chat template"),
        ('"x"', ("--against", "./absent"), "there is no model folder ./absent"),
    ],
)
def test_bad_input_is_one_sentence(
    text: str,
    more: tuple[str, ...],
    says: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    assert main(["generate", str(model), "--file", str(tmp_path / "prompts.jsonl"), *more]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_closed_standard_input_is_an_empty_one(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", str(model)]) == 2
    assert "standard input is empty; write a prompt on each line" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", str(model), "--chat", *SHORT]) == 0
    assert capsys.readouterr().out == "/reset begins a new conversation, /exit ends\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_utf8_in_standard_input(
    errors: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def give() -> None:
        text = io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", text)

    give()
    assert main(["generate", str(model), *SHORT]) == 2
    assert re.search(r"standard input is not UTF-8 \(.+\); write it in UTF-8\n$", capsys.readouterr().err)
    give()
    assert main(["generate", str(model), "--chat", *SHORT]) == 0
    replaced = answer(model, "Gr\ufffd\ufffde")[0]
    assert capsys.readouterr().out.endswith(f"/exit ends\n{replaced}\n")


def test_missing_files_and_folders_that_are_no_models(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["generate", str(model), "--file", "absent.txt"]) == 2
    assert "there is no prompt file absent.txt" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert main(["generate", str(model), "--file", str(tmp_path / "latin.txt")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate", str(model)]) == 2
    assert "standard input is empty; write a prompt on each line" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["generate", str(model)]) == 2
    assert "give a prompt with --prompt, prompts with --file, or --chat" in capsys.readouterr().err
    for name in (*FILES, "manifest.json"):
        (tmp_path / name).touch()
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "is a checkpoint, from which training resumes, not a model" in capsys.readouterr().err
