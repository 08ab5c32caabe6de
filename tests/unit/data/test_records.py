import json
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisatune.data.records import Records, read_records
from lisatune.data.splitting import split_records

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def save(folder: Path, *rows: Any) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ASKED = {"prompt": [USER], "completion": [BOT]}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
KINDS: list[tuple[str, Any, Any]] = [
    (
        "alpaca",
        ALPACA | {"text": "Below is an instruction"},
        {
            "prompt": [{"role": "user", "content": "Add.\n\n1 2"}],
            "completion": [{"role": "assistant", "content": "3"}],
        },
    ),
    ("prompt-completion", {"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
    (
        "prompt-completion",
        {"prompt": [USER], "completion": [BOT], "id": 7},
        {"prompt": [USER], "completion": [BOT]},
    ),
    ("messages", {"messages": [USER | {"name": None}, BOT]}, {"messages": [USER, BOT]}),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        {"messages": [{"role": "system", "content": "Be brief."}, USER, BOT]},
    ),
    ("sharegpt", {"conversations": [USER, BOT]}, {"messages": [USER, BOT]}),
    ("question-answer", {"question": "Hi", "answer": "Hello", "context": ""}, ASKED),
    ("query-response", {"query": "Hi", "response": "Hello"}, ASKED),
    ("instruction", {"instruction": "Hi", "response": "Hello", "context": None}, ASKED),
    (
        "instruction",
        {"instruction": "Add.", "context": "1 2", "response": "3"},
        {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}], "completion": [BOT | {"content": "3"}]},
    ),
    ("text", {"text": "Once upon"}, {"text": "Once upon"}),
    ("text", {"text": "Once upon", "messages": None}, {"text": "Once upon"}),
    ("question-answer", {"question": "Hi", "answer": "Hello", "prompt": None, "completion": None}, ASKED),
    ("query-response", {"query": "Hi", "response": "Hello", "system": "null"}, ASKED),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "history": "[]"}, ASKED),
]


@pytest.mark.parametrize(("kind", "row", "normalised"), KINDS)
def test_the_kind_is_told_from_the_fields_of_the_first_row(
    tmp_path: Path, kind: str, row: Any, normalised: Any
) -> None:
    unused = tuple(name for name in row if name in ("text", "id") and kind != "text")
    expected = (
        pytest.warns(UserWarning, match=f"nothing reads the field {unused[0]}") if unused else nullcontext()
    )
    with expected:
        records = read_records(save(tmp_path, row, row))
        assert read_records(save(tmp_path, row), kind=kind).rows == [normalised]
    source = str(tmp_path / "data.jsonl")
    assert records == Records([normalised, normalised], kind, 0, source, unused=unused)


SYSTEM = {"role": "system", "content": "Be rude."}
CALL = {"name": "add", "arguments": {"a": 1}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "3", "name": "add"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT_OF_TOOLS = {"messages": [USER, CALLS, RESULT, BOT], "tools": [TOOL]}
MARKED = BOT | {"train": False}


@pytest.mark.parametrize(
    ("row", "normalised"),
    [
        (
            ALPACA | {"system": "Be rude.", "history": [["Hi", "Hello"]]},
            {
                "prompt": [SYSTEM, USER, BOT, {"role": "user", "content": "Add.\n\n1 2"}],
                "completion": [{"role": "assistant", "content": "3"}],
            },
        ),
        ({"conversations": [USER, BOT], "system": "Be rude."}, {"messages": [SYSTEM, USER, BOT]}),
        ({"messages": [USER, BOT], "system": ""}, {"messages": [USER, BOT]}),
        (
            {"prompt": [USER], "completion": [BOT], "system": "Be rude."},
            {"prompt": [SYSTEM, USER], "completion": [BOT]},
        ),
        ({"messages": [USER, BOT | {"weight": 0}, USER, BOT]}, {"messages": [USER, MARKED, USER, BOT]}),
        ({"messages": [USER, MARKED, USER, BOT | {"weight": 1}]}, {"messages": [USER, MARKED, USER, BOT]}),
        ({"prompt": "1+1=", "completion": "2", "label": True}, {"prompt": "1+1=", "completion": "2"}),
        ({"messages": [USER, BOT | {"tool_calls": []}], "tools": "[]"}, {"messages": [USER, BOT]}),
        (CHAT_OF_TOOLS, CHAT_OF_TOOLS),
        (  # OpenAI's: arguments as JSON in text, no content beside a call, fields that are null
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "c1", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
                        ],
                    },
                    RESULT | {"tool_call_id": "c1"},
                    BOT | {"refusal": None},
                ],
                "functions": json.dumps([TOOL["function"]]),
            },
            {
                "messages": [
                    USER,
                    CALLS | {"tool_calls": [{"type": "function", "id": "c1", "function": CALL}]},
                    RESULT | {"tool_call_id": "c1"},
                    BOT,
                ],
                "tools": [TOOL],
            },
        ),
        (  # ShareGPT's
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "3", "name": "add"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "tools": json.dumps([TOOL]),
            },
            CHAT_OF_TOOLS,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, BOT]},
            {"messages": [USER, BOT]},
        ),
        (
            {"conversations": [{"speaker": "prompter", "text": "Hi"}, {"speaker": "model", "text": "Hello"}]},
            {"messages": [USER, BOT]},
        ),
    ],
)
def test_fields_that_carry_meaning_are_honoured(tmp_path: Path, row: Any, normalised: Any) -> None:
    assert read_records(save(tmp_path, row)).rows == [normalised]
    assert read_records(save(tmp_path, normalised)).rows == [normalised]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER, BOT | {"function_call": {}}, BOT | {"tool_calls": [{"id": "1"}]}]}, "without a"),
        ({"messages": [USER, BOT | {"reasoning_content": "hm"}]}, "message 2 has 'reasoning_content'"),
        ({"messages": [USER, BOT], "tools": [{"nome": "f"}]}, "'tools', entry 1 must be a function with a"),
        ({"messages": [USER, BOT], "tools": "[{"}, "'tools' holds JSON that cannot be read"),
        (
            {"messages": [USER, BOT], "tools": [CALL], "functions": [CALL]},
            "both describe functions; keep one",
        ),
        ({"prompt": "1", "completion": "2", "tools": [{"name": "f"}]}, "'tools' cannot stand before plain"),
        ({"messages": [USER | {"tool_calls": [CALL]}, BOT]}, "message 1 calls a function, which only an"),
        (
            {"messages": [USER, BOT | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "message 2, arguments of f must be an object, got a list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, BOT]},
            "message 1 has a part of type 'image_url', and only text can be trained on; set data.text_only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"image": "x"}]}, BOT]},
            "message 1 has a part of type 'image', and only text",
        ),
        (
            {"messages": [USER | {"images": ["a.png"]}, BOT]},
            "message 1: 'images' holds images, and only text can be trained on; set data.text_only",
        ),
        (
            {"messages": [USER, BOT], "images": ["a.png"]},
            "'images' holds images, and only text can be trained on; set data.text_only to train on the text",
        ),
        ({"messages": [USER, BOT | {"weight": 0}]}, "every assistant turn is marked not to be learned from"),
        ({"messages": [USER, BOT | {"weight": 0.5}]}, "message 2 has the weight 0.5; only 0 and 1"),
        ({"messages": [SYSTEM, USER, BOT], "system": "x"}, "are both a system message; keep one"),
        ({"prompt": "1+1=", "completion": "3", "label": False}, "'label' is false: this is an example of a"),
        ({"prompt": "1+1=", "completion": "2", "system": "x"}, "'system' cannot stand before plain text"),
        ({"prompt": "1", "chosen": "2", "rejected": "3"}, "'chosen' holds a preferred answer"),
        (
            {"prompt": "1", "completion": "2", "rejected": "3"},
            "preference data; set loss.name: dpo",
        ),
        (ALPACA | {"history": [["Hi"]]}, "'history', pair 1 must be [question, answer], got a list"),
        (ALPACA | {"history": 5}, "'history' must be a list of pairs [question, answer], got the number 5"),
        (ALPACA | {"history": "Hi"}, "'history' must be a list of pairs [question, answer], got text"),
        (ALPACA | {"system": 0}, "'system' must be text, got the number 0"),
        ({"prompt": "1+1=", "completion": "3", "label": "False"}, "'label' is false"),
        ({"messages": [USER, BOT | {"train": "false"}]}, "message 2 has train: 'false'; it must be true or"),
        ({"messages": [USER, BOT | {"train": 0}]}, "every assistant turn is marked not to be learned from"),
        ({"messages": [USER, BOT | {"train_detail": [{"train": False}]}]}, "message 2 has 'train_detail'"),
    ],
)
def test_fields_that_carry_meaning_and_cannot_be_honoured_are_refused_by_name(
    tmp_path: Path, row: Any, problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_records(save(tmp_path, row))


IMAGE = {"type": "image", "text": None}
SEEN = {"role": "user", "content": [IMAGE, {"type": "text", "text": "Hi"}]}


@pytest.mark.parametrize(
    ("row", "normalised"),
    [
        ({"messages": [SEEN, BOT], "images": ["a.png"]}, {"messages": [USER, BOT]}),
        ({"messages": [SEEN | {"images": ["a.png"]}, BOT]}, {"messages": [USER, BOT]}),
        ({"messages": [SEEN, BOT], "images": None}, {"messages": [USER, BOT]}),
        ({"prompt": [SEEN], "completion": [BOT]}, {"prompt": [USER], "completion": [BOT]}),
        (
            {"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "Hi"}]}, BOT]},
            {"messages": [USER, BOT]},
        ),
        (  # LLaVA's: marks in the text
            {
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nHi"},
                    {"from": "gpt", "value": "Hello"},
                ],
            },
            {"messages": [USER, BOT]},
        ),
        ({"question": "Hi<image>", "answer": "Hello", "image": {"bytes": "x"}}, ASKED),
        ({"question": "<video>\nHi", "answer": "Hello", "video": "a.mp4"}, ASKED),
        ({"question": "Hi <audio>", "answer": "Hello", "audio": {"path": "a.wav"}}, ASKED),
        (  # a mark may be a part of its own, and blanks between parts stay
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "<image>\n"}, "Hi <image> ", "you"],
                    },
                    BOT,
                ],
                "images": ["a.png"],
            },
            {"messages": [USER | {"content": "Hi  you"}, BOT]},
        ),
    ],
)
def test_text_beside_images_trains_alone_if_it_is_asked_for(
    tmp_path: Path, row: Any, normalised: Any
) -> None:
    records = read_records(save(tmp_path, row, {"text": "never read"}), text_only=True, limit=1)
    assert (records.rows, records.num_media) == ([normalised], 1)
    with pytest.raises(ValueError, match=r"set data.text_only to train on the text alone"):
        read_records(save(tmp_path, row))


def test_a_record_without_images_is_read_as_ever(tmp_path: Path) -> None:
    rows = [{"messages": [USER | {"content": "What is <image>?"}, BOT], "images": []}, CHAT_OF_TOOLS]
    source = save(tmp_path, *rows)
    records = read_records(source, text_only=True)
    assert records.rows == read_records(source).rows
    assert records.num_media == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [USER | {"content": [IMAGE]}, BOT]},
            "a message has no text beside its part of type 'image'",
        ),
        (
            {"messages": [USER | {"content": "<image>\n"}, BOT], "images": ["a"]},
            "a text is nothing but <image>",
        ),
        (
            {"messages": [USER | {"content": [IMAGE, {"type": "refusal", "refusal": "No"}]}, BOT]},
            "message 1 has a part of type 'refusal', and only text can be trained on; leave it out",
        ),
    ],
)
def test_a_message_without_text_is_refused_with_its_place_or_skipped(
    tmp_path: Path, row: Any, problem: str
) -> None:
    source = save(tmp_path, {"messages": [USER, BOT]}, row)
    with pytest.raises(ValueError, match=rf"line 2: .*{re.escape(problem)}; fix it, or set data.on_bad_row"):
        read_records(source, text_only=True)
    records = read_records(source, text_only=True, on_bad_row="skip")
    assert (records.skipped, records.num_media) == (1, 0)


def test_a_label_of_plain_text_is_no_verdict_on_an_answer(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing reads the field label"):
        assert read_records(save(tmp_path, {"text": "a", "label": False})).rows == [{"text": "a"}]


def test_fields_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    rows = ({"text": "a", "id": 1}, {"text": "b", "id": 2, "url": "x"})
    with pytest.warns(UserWarning, match="nothing reads the fields id, url") as caught:
        assert read_records(save(tmp_path, *rows)).unused == ("id", "url")
    assert len(caught) == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda text: {"prompt": "a", "completion": text},
        lambda text: {"instruction": "a", "output": text},
        lambda text: {"messages": [USER, {"role": "assistant", "content": text}]},
    ],
)
def test_empty_answers_are_counted_and_refused_when_there_is_no_other(tmp_path: Path, answer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(answer(text)) for text in ("", "b", " \n")))
    with pytest.warns(
        UserWarning, match="rows.jsonl: 2 of 3 answers are empty; the model learns to say nothing"
    ):
        assert len(read_records(str(file)).rows) == 3
    file.write_text("\n".join(json.dumps(answer(text)) for text in ("", " \n")))
    with pytest.raises(ValueError, match=r"rows.jsonl has no answer to learn from: all 2 answers are empty"):
        read_records(str(file))


@pytest.mark.parametrize(
    "row", [{"instruction": "Add.", "output": "3"}, ALPACA | {"input": None}, ALPACA | {"input": ""}]
)
def test_alpaca_input_may_be_left_out(tmp_path: Path, row: Any) -> None:
    assert read_records(save(tmp_path, row)).rows[0]["prompt"] == [{"role": "user", "content": "Add."}]


def test_kind_can_be_overridden(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing reads the fields instruction, input, output"):
        records = read_records(save(tmp_path, ALPACA | {"text": "Below is"}), kind="text")
    assert (records.kind, records.rows) == ("text", [{"text": "Below is"}])


def test_limit_counts_usable_records_and_reads_no_further(tmp_path: Path) -> None:
    source = save(tmp_path, {"text": "a"}, {"text": 1}, {"text": "b"}, {"text": 2})
    records = read_records(source, limit=2, on_bad_row="skip")
    assert [row["text"] for row in records.rows] == ["a", "b"]
    assert records.skipped == 1


ROLE_NAMES = (
    "system, developer, user, human, prompter, assistant, gpt, bot, chatbot, chatgpt, model, ai, bing, tool, "
    "ipython, observation, function_response, function, function_call, tool_call"
)
BAD: list[tuple[Any, Any, str]] = [
    ({"text": "a"}, ["a"], "a record must be an object with named fields, got a list"),
    ({"text": "a"}, "a", "a record must be an object with named fields, got text"),
    ({"text": "a"}, {"txt": "a"}, "the field 'text' is missing; the fields are: txt"),
    ({"text": "a"}, {}, "the field 'text' is missing; the fields are: none"),
    ({"text": "a"}, {"text": None}, "'text' must be text, got null"),
    ({"text": "a"}, {"text": 5}, "'text' must be text, got the number 5"),
    ({"text": "a"}, {"text": True}, "'text' must be text, got the truth value true"),
    ({"text": "a"}, {"text": ["a"]}, "'text' must be text, got a list"),
    ({"text": "a"}, {"text": {"a": 1}}, "'text' must be text, got an object"),
    ({"text": "a"}, {"text": " \n"}, "'text' is empty"),
    ({"text": "a"}, {"text": "\ud83d"}, "'text' is not UTF-8 text; save it as UTF-8"),
    (ALPACA, {"instruction": "Add."}, "the field 'output' is missing; the fields are: instruction"),
    (ALPACA, ALPACA | {"output": None}, "'output' must be text, got null"),
    (ALPACA, ALPACA | {"input": 3}, "'input' must be text, got the number 3"),
    (KINDS[1][1], {"prompt": "a", "completion": None}, "'completion' must be text, got null"),
    (KINDS[1][1], {"prompt": "a", "completion": [BOT]}, "'completion' must be text, got a list"),
    (KINDS[2][2], {"prompt": [USER], "completion": [USER]}, "no assistant turn to learn from"),
    (
        KINDS[2][2],
        {"prompt": [], "completion": [BOT]},
        "'prompt' must be a list of messages, got an empty list",
    ),
    (KINDS[3][1], {"messages": None}, "'messages' must be a list of messages, got null"),
    (KINDS[3][1], {"messages": []}, "'messages' must be a list of messages, got an empty list"),
    (
        KINDS[3][1],
        {"messages": ["Hi"]},
        "'messages', message 1 must be an object with a role and text, got text",
    ),
    (KINDS[3][1], {"messages": [USER]}, "no assistant turn to learn from"),
    (KINDS[3][1], {"messages": [BOT, USER]}, "no assistant turn to learn from"),
    (
        KINDS[3][1],
        {"messages": [USER, {"role": "assistant"}]},
        "'messages', message 2 has no text (content, value, text); it has role",
    ),
    (
        KINDS[3][1],
        {"messages": [USER, BOT | {"content": None}]},
        "'messages', message 2, content must be text, got null",
    ),
    (
        KINDS[3][1],
        {"messages": [USER, {"role": "robot", "content": "Hello"}]},
        f"'messages', message 2 has the unknown role 'robot'; known: {ROLE_NAMES}",
    ),
    (
        KINDS[4][1],
        {"conversations": [{"from": "narrator", "value": "Hi"}]},
        f"'conversations', message 1 has the unknown role 'narrator'; known: {ROLE_NAMES}",
    ),
]


@pytest.mark.parametrize(("good", "bad", "problem"), BAD)
def test_a_bad_row_is_named_with_file_and_line_or_skipped(
    tmp_path: Path, good: Any, bad: Any, problem: str
) -> None:
    source = save(tmp_path, good, bad, good)
    with pytest.raises(ValueError, match="line 2") as info:
        read_records(source)
    assert str(info.value) == f"{source}, line 2: {problem}; fix it, or set data.on_bad_row=skip"
    records = read_records(source, on_bad_row="skip")
    assert (len(records.rows), records.skipped) == (2, 1)
    assert records.first_skipped == f"{source}, line 2: {problem}"


def test_rows_that_are_not_json_are_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: not JSON \("):
        read_records(str(path))
    records = read_records(str(path), on_bad_row="skip")
    assert ([row["text"] for row in records.rows], records.skipped) == (["a", "b"], 2)


def test_csv_bytes_and_empty_cells_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"prompt,completion\na,b\n\xff,b\na\n")
    with pytest.raises(ValueError, match=r"data\.csv, line 3: 'prompt' is not UTF-8 text"):
        read_records(str(path))
    assert read_records(str(path), on_bad_row="skip").skipped == 2


def test_an_empty_text_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match=r"b\.txt: 'text' is empty"):
        read_records(str(tmp_path))


def test_fields_of_no_known_kind_are_listed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"line 1: cannot tell the kind .* fields problem, solution; known: messages; "
    ):
        read_records(save(tmp_path, {"problem": "a", "solution": "b"}))


def test_fields_of_other_names_are_mapped_by_hand(tmp_path: Path) -> None:
    source = save(tmp_path, {"problem": "Hi", "solution": {"text": "Hello"}}, {"problem": "Hi"})
    names = {"question": "problem", "answer": "solution.text"}
    records = read_records(source, fields=names, limit=1)
    assert (records.kind, records.rows, records.unused) == ("question-answer", [ASKED], ())
    with pytest.raises(
        ValueError, match=r"line 2: data.fields names the field 'solution.text', which is mis"
    ):
        read_records(source, fields=names)
    with pytest.raises(ValueError, match=r"data.fields: unknown field 'questoin'. Did you mean 'question'\?"):
        read_records(source, fields={"questoin": "problem"})


def test_names_in_messages_are_mapped_by_hand_too(tmp_path: Path) -> None:
    turns = [{"author": "human", "body": "Hi"}, {"author": "bot", "body": "Hello", "weight": 1}]
    source = save(tmp_path, {"dialogue": turns})
    names = {"messages": "dialogue", "role": "author", "content": "body"}
    (row,) = read_records(source, fields=names).rows
    assert row == {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(
        ValueError, match=r"line 1: 'messages', message 1 has no role \(role, from, speaker\)"
    ):
        read_records(source, fields={"messages": "dialogue", "role": "who"})


def _message(name: str, parent: str | None, role: str, **more: Any) -> Any:
    return {"message_id": name, "parent_id": parent, "role": role, "text": name, "lang": "en"} | more


def test_trees_follow_the_best_replies_to_the_last_answer(tmp_path: Path) -> None:
    rows = [
        _message("a1", "q", "assistant", rank=1),
        _message("q", None, "prompter"),
        _message("a0", "q", "assistant", rank=0),
        _message("gone", "q", "assistant", rank=-1, deleted=True),
        _message("q2", "a0", "prompter"),
        _message("lonely", None, "prompter"),
    ]
    records = read_records(save(tmp_path, *rows), on_bad_row="skip")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a0"}]
    assert (records.kind, records.rows, records.skipped) == ("oasst", [{"messages": turns}], 1)
    assert "the tree has no answer" in records.first_skipped
    replies = [_message("a1", "q", "assistant"), _message("a0", "q", "assistant", rank=0)]
    tree = {"message_tree_id": "q", "prompt": _message("q", None, "prompter", replies=replies)}
    assert read_records(save(tmp_path, tree)).rows == [{"messages": turns}]
    with pytest.raises(ValueError, match="its parent 'x' is not in the data"):
        read_records(save(tmp_path, _message("q", None, "prompter"), _message("a", "x", "assistant")))


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is empty: it has no records"):
        read_records(str(path))


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    source = save(tmp_path, {"text": 1}, {"text": 2})
    with pytest.raises(
        ValueError,
        match=r"no usable record among 2; the first: .*line 1: 'text' must be text, got the number 1",
    ):
        read_records(source, on_bad_row="skip")


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="unknown kind of records 'alpacca'; use auto, messages, sharegpt, oasst, alpaca"
    ):
        read_records("python-docs", kind="alpacca")


def test_python_docs_are_chats() -> None:
    records = read_records("python-docs:validation", limit=3)
    assert [len(row["prompt"]) for row in records.rows] == [1, 1, 1]
    assert all(row["completion"][0]["role"] == "assistant" for row in records.rows)


def texts(*values: str) -> Records:
    return Records([{"text": value} for value in values], "text", 0, "here")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_keeps_all_records_and_parts_all_prompts(values: list[str], share: float, seed: int) -> None:
    records = texts(*values)
    different = len({" ".join(value.split()).casefold() for value in values})
    if different == 1:
        with pytest.raises(ValueError, match="has 1 different prompt, and holding it out leaves nothing"):
            split_records(records, share, seed)
        return
    train, validation = split_records(records, share, seed)
    assert train.rows
    assert validation.rows
    assert sorted(row["text"] for row in train.rows + validation.rows) == sorted(values)
    assert {row["text"] for row in train.rows}.isdisjoint(row["text"] for row in validation.rows)
    shuffled = random.Random(seed).sample(values, len(values))
    held_out = {row["text"] for row in split_records(texts(*shuffled), share, seed)[1].rows}
    assert held_out == {row["text"] for row in validation.rows}


@pytest.mark.parametrize(
    ("count", "share", "most", "held_out"),
    [(3, 0.05, None, 1), (3, 0.99, None, 2), (100, 0.2, None, 20), (100, 0.2, 5, 5), (2, 0.5, 9, 1)],
)
def test_a_split_holds_out_at_least_one_prompt_and_at_most_so_many(
    count: int, share: float, most: int | None, held_out: int
) -> None:
    train, validation = split_records(texts(*map(str, range(count))), share, 0, most=most)
    assert (len(train.rows), len(validation.rows)) == (count - held_out, held_out)


def test_another_seed_holds_out_other_records() -> None:
    records = texts(*map(str, range(100)))
    splits = {tuple(row["text"] for row in split_records(records, 0.1, seed)[1].rows) for seed in range(5)}
    assert len(splits) == 5
    assert {len(split) for split in splits} == {10}


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "What is  it?", "completion": str(n)} for n in range(2)],
        [{"prompt": [USER | {"content": text}], "completion": [BOT]} for text in ("hi", "HI ")],
        [{"messages": [USER, BOT | {"content": str(n)}, USER, BOT]} for n in range(2)],
    ],
)
def test_records_with_the_same_question_stay_on_one_side(rows: list[Any]) -> None:
    others: list[Any] = [{"prompt": str(n), "completion": ""} for n in range(9)]
    for seed in range(20):
        _, held_out = split_records(Records(rows + others, "", 0, ""), 0.5, seed)
        assert sum(row in rows for row in held_out.rows) in (0, 2)
