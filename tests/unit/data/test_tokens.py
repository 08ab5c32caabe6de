import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lisatune.data.batches import collate
from lisatune.data.chat import encode_prompt
from lisatune.data.records import Records
from lisatune.data.rows import TokenRow
from lisatune.data.tokens import tokenize
from lisatune.losses.causal_lm import IGNORE
from tiny_text import CHATML, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "Hello"},
    "plain": {"prompt": "Hi", "completion": "Hello"},
    "chat": {"prompt": [USER], "completion": [BOT]},
    "messages": {"messages": [USER, BOT]},
}


def records(*rows: dict[str, Any], kind: str = "messages") -> Records:
    return Records(list(rows), kind, 0, "data.jsonl")


def learned(row: TokenRow, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokens that carry loss, as text."""
    ids, labels = row["input_ids"], row["labels"]
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
    return str(tokenizer.decode(labels[labels != IGNORE]))


def test_only_answers_and_the_end_of_their_turns_carry_loss() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows = [
        FORMS["chat"],
        FORMS["messages"],
        {"messages": [USER, BOT, USER, BOT | {"content": "Bye"}, USER]},
        {"prompt": [USER, BOT, USER], "completion": [BOT | {"content": "Bye"}]},
        {"prompt": "Hi", "completion": " there"},
    ]
    examples = tokenize(records(*rows), tokenizer, max_length=1000)
    assert [learned(row, tokenizer) for row in examples.rows] == [
        "Hello<eos>",
        "Hello<eos>",
        "Hello<eos>Bye<eos>",
        "Bye<eos>",
        " there<eos>",
    ]
    assert (examples.num_cut, examples.num_without_loss) == (0, 0)
    assert examples.num_loss_tokens == 6 + 6 + 10 + 4 + 7
    assert examples.num_tokens == sum(len(row["input_ids"]) for row in examples.rows)
    assert examples.longest == max(len(row["input_ids"]) for row in examples.rows)


@pytest.mark.parametrize("template", [CHATML, None, CHATML.replace("eos_token", "''")])
@pytest.mark.parametrize("loss_on", ["auto", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_learns_to_stop(form: str, loss_on: Any, template: str | None) -> None:
    """Although the end-of-sequence token pads too, and whether or not the template writes it."""
    tokenizer = byte_tokenizer(template)
    examples = tokenize(records(FORMS[form]), tokenizer, max_length=1000, loss_on=loss_on)
    assert learned(examples.rows[0], tokenizer).rstrip().endswith("<eos>")
    batch = collate([*examples.rows, {"input_ids": torch.ones(99), "labels": torch.ones(99)}])
    stops = int((examples.rows[0]["labels"] == tokenizer.eos_token_id).sum())
    assert (batch["labels"][0] == tokenizer.eos_token_id).sum() == stops > 0


def test_text_carries_loss_on_all_but_the_first_token() -> None:
    tokenizer = byte_tokenizer(None)
    (row,) = tokenize(records(FORMS["text"], kind="text"), tokenizer, max_length=1000).rows
    assert learned(row, tokenizer) == "ello<eos>"
    assert tokenizer.chat_template is None


def test_loss_on_all_takes_prompts_and_needs_no_answer_borders() -> None:
    tokenizer = byte_tokenizer(
        CHATML.replace("message['content']", "('' if loop.last else 'Old: ') + message['content']")
    )
    (row,) = tokenize(records({"messages": [USER, BOT]}), tokenizer, max_length=1000, loss_on="all").rows
    assert row["labels"].tolist() == [-100, *row["input_ids"][1:].tolist()]


def test_special_tokens_are_written_once() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True)
    texts = [
        tokenizer.decode(tokenize(records(row), tokenizer, max_length=1000).rows[0]["input_ids"])
        for row in (FORMS["messages"], FORMS["plain"], FORMS["text"], {"text": "Hello<eos>"})
    ]
    assert [text.count("<bos>") for text in texts] == [1, 1, 1, 1]
    assert texts[1:] == ["<bos>HiHello<eos>", "<bos>Hello<eos>", "<bos>Hello<eos>"]


def test_an_answer_marked_not_to_be_learned_from_carries_no_loss() -> None:
    tokenizer = byte_tokenizer(CHATML)
    bad = {"role": "assistant", "content": "BAD", "train": False}
    question, good = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "GOOD"}
    rows = records({"messages": [question, bad, question, good]})
    (row,) = tokenize(rows, tokenizer, max_length=1000).rows
    assert "BAD" in tokenizer.decode(row["input_ids"])
    assert "BAD" not in learned(row, tokenizer)
    assert "GOOD" in learned(row, tokenizer)
    with pytest.raises(ValueError, match="loss_on all would learn from it; use loss_on answers"):
        tokenize(rows, tokenizer, max_length=1000, loss_on="all")


def test_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(None, adds_bos=True)
    rows = records({"text": "<bos>ab"}, {"prompt": "<bos>a", "completion": "b"}, {"text": "ab"})
    texts = [tokenizer.decode(row["input_ids"]) for row in tokenize(rows, tokenizer, max_length=99).rows]
    assert texts == ["<bos>ab<eos>"] * 3
    assert learned(tokenize(rows, tokenizer, max_length=99).rows[1], tokenizer) == "b<eos>"
    assert encode_prompt(tokenizer, "<bos>a") == encode_prompt(tokenizer, "a")


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = byte_tokenizer(None, merges=[("b", "c")])
    (row,) = tokenize(records({"prompt": "ab", "completion": "cd"}), tokenizer, max_length=1000).rows
    assert len(row["input_ids"]) == 4
    assert learned(row, tokenizer) == "bcd<eos>"


def test_a_tokenizer_without_chat_template_gets_the_plain_one() -> None:
    tokenizer = byte_tokenizer(None)
    (row,) = tokenize(records(FORMS["messages"]), tokenizer, max_length=1000).rows
    assert tokenizer.decode(row["input_ids"]) == "### User:\nHi\n\n### Assistant:\nHello<eos>\n\n"
    assert tokenizer.chat_template is not None


def test_long_records_are_cut_and_counted_and_those_without_answer_left_out() -> None:
    tokenizer = byte_tokenizer(None)
    rows = [
        {"prompt": "1234", "completion": "5"},
        {"prompt": "1234", "completion": "56"},
        {"prompt": "12345678", "completion": "9"},
    ]
    examples = tokenize(records(*rows), tokenizer, max_length=6)
    assert [learned(row, tokenizer) for row in examples.rows] == ["5<eos>", "56"]
    assert (examples.num_cut, examples.num_without_loss, examples.longest) == (2, 1, 6)
    assert (examples.num_lost_tokens, examples.lost_share) == (11, 11 / 23)
    with pytest.raises(
        ValueError,
        match=r"cut off by max_length=4: the shortest prompt of data\.jsonl has 4 tokens; set max_length",
    ):
        tokenize(records(*rows), tokenizer, max_length=4)


def test_long_text_becomes_several_rows_and_no_token_is_lost() -> None:
    tokenizer = byte_tokenizer(None)
    examples = tokenize(records({"text": "abcdefgh"}, {"text": "xyz"}, kind="text"), tokenizer, max_length=4)
    texts = [tokenizer.decode(row["input_ids"]) for row in examples.rows]
    assert texts == ["abcd", "efgh", "xyz<eos>"]  # <eos> alone has nothing to learn from
    assert [row["labels"][0] for row in examples.rows] == [IGNORE] * 3
    assert examples.num_loss_tokens == 9
    assert (examples.num_split, examples.num_cut, examples.num_lost_tokens) == (1, 0, 1)


@pytest.mark.parametrize(
    ("long", "texts", "counts"),
    [
        ("split", ["abcd", "efg<eos>", "x<eos>"], (1, 0, 0, 0)),
        ("cut", ["abcd", "x<eos>"], (0, 1, 0, 4)),
        ("drop", ["x<eos>"], (0, 0, 1, 8)),
    ],
)
def test_long_records_are_split_cut_or_dropped_as_asked(
    long: Any, texts: list[str], counts: tuple[int, ...]
) -> None:
    tokenizer = byte_tokenizer(None)
    rows = records({"text": "abcdefg"}, {"text": "x"}, kind="text")
    examples = tokenize(rows, tokenizer, max_length=4, long=long)
    assert [tokenizer.decode(row["input_ids"]) for row in examples.rows] == texts
    found = (examples.num_split, examples.num_cut, examples.num_dropped, examples.num_lost_tokens)
    assert found == counts
    assert examples.num_tokens + examples.num_lost_tokens == 10


def test_dropping_every_record_is_refused() -> None:
    rows = records({"text": "abcdefg"}, kind="text")
    with pytest.raises(ValueError, match=r"all 1 records of data\.jsonl are longer than max_length=4 tokens"):
        tokenize(rows, byte_tokenizer(None), max_length=4, long="drop")


def test_wrong_wishes_are_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(
        ValueError, match=r"data\.jsonl is plain text, which has no answers; set loss_on to all"
    ):
        tokenize(records(FORMS["text"], kind="text"), tokenizer, max_length=9, loss_on="answers")
    with pytest.raises(ValueError, match="loss_on must be auto, answers, last, all or a tuple of"):
        tokenize(records(FORMS["text"]), tokenizer, max_length=9, loss_on="answer")  # type: ignore[arg-type]


def test_roles_that_records_do_not_have_are_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)
    how: dict[str, Any] = {"max_length": 99, "loss_on": ("user", "tool")}
    with pytest.raises(
        ValueError, match=r"data\.jsonl is plain text, which has no roles; set loss_on to all"
    ):
        tokenize(records(FORMS["text"], kind="text"), tokenizer, **how)
    with pytest.raises(ValueError, match=r"record 1: a plain prompt and completion have no roles; set"):
        tokenize(records(FORMS["plain"]), tokenizer, **how)
    nothing = r"nothing in data\.jsonl carries loss: no record has a message that data.loss_on names, or all"
    with pytest.raises(ValueError, match=nothing):
        tokenize(records(FORMS["chat"]), tokenizer, max_length=99, loss_on=("tool",))
    examples = tokenize(records(FORMS["chat"]), tokenizer, **how)
    assert learned(examples.rows[0], tokenizer) == "Hi<eos>"


def test_last_answers_that_are_all_marked_not_to_be_learned_from_are_refused_for_that() -> None:
    answers = [{"role": "assistant", "content": text} for text in ("Yes", "No")]
    question = {"role": "user", "content": "Hi"}
    messages = [question, answers[0], question, answers[1] | {"train": False}]
    with pytest.raises(ValueError, match=r"carries loss: .* marked not to be learned from \(weight: 0"):
        tokenize(records({"messages": messages}), byte_tokenizer(CHATML), max_length=999, loss_on="last")


def test_a_record_the_template_refuses_is_named() -> None:
    tokenizer = byte_tokenizer(
        "{{ raise_exception('No system') if messages[0]['role'] == 'system' }}" + CHATML
    )
    bad = {"messages": [{"role": "system", "content": "Be brief."}, USER, BOT]}
    with pytest.raises(ValueError, match=r"^data\.jsonl, record 2: the chat template refuses .*: No system$"):
        tokenize(records(FORMS["messages"], bad), tokenizer, max_length=99)


def test_a_tokenizer_without_end_of_sequence_token_is_refused() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match=r"record 1: the tokenizer has no end-of-sequence token .* set its eos_token"
    ):
        tokenize(records(FORMS["text"]), tokenizer, max_length=99)


def test_importing_the_data_modules_imports_no_hugging_face_package() -> None:
    code = (
        "import sys; import lisatune.data.tokens;"
        "print({'transformers', 'datasets', 'trl', 'pyarrow', 'tokenizers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
