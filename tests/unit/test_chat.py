from collections.abc import Callable
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lisatune.chat import PLAIN_CHAT_TEMPLATE, Chat, common_length, set_chat_template
from tiny_text import CHATML, byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def answers(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], first: int = 1) -> list[str]:
    """What `Chat.prefixes` marks as answers; checks that the prefixes grow up to the whole conversation."""
    chat = Chat(tokenizer)
    prefixes = chat.prefixes(messages, first)
    found, before = [], ""
    for text, is_answer in prefixes:
        assert text.startswith(before)
        if is_answer:
            found.append(text[len(before) :])
        before = text
    assert before == chat.render(messages)
    return found


def test_answers_end_with_the_token_that_ends_the_turn() -> None:
    messages = [SYSTEM, USER, BOT, USER, BOT | {"content": "Again?\n"}, USER]
    assert answers(byte_tokenizer(CHATML), messages) == ["Hello<eos>", "Again?\n<eos>"]


def test_answers_before_the_first_asked_for_are_not_marked() -> None:
    assert answers(byte_tokenizer(CHATML), [USER, BOT, USER, BOT | {"content": "Bye"}], 3) == ["Bye<eos>"]
    assert answers(byte_tokenizer(CHATML), [BOT, USER, BOT | {"content": "Bye"}]) == ["Bye<eos>"]


def test_the_plain_template_reads_as_documented_and_ends_answers() -> None:
    tokenizer = byte_tokenizer(None)
    assert set_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(
        [SYSTEM, USER, BOT, USER], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello<eos>\n\n"
        "### User:\nHi\n\n### Assistant:\n"
    )
    assert answers(tokenizer, [USER, BOT, USER, BOT]) == ["Hello<eos>", "Hello<eos>"]


def test_the_plain_template_begins_as_the_tokenizer_begins_text() -> None:
    tokenizer = byte_tokenizer(None, adds_bos=True)
    set_chat_template(tokenizer)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "<bos>### User:\nHi\n\n"


def test_the_plain_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == PLAIN_CHAT_TEMPLATE


def test_an_own_template_stays() -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert not set_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_the_plain_template_needs_an_end_of_sequence_token() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token to end an answer with; set its eos_token"):
        set_chat_template(tokenizer)


QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


def test_a_template_that_rewrites_earlier_turns_is_used_in_trls_training_variant() -> None:
    tokenizer = byte_tokenizer(QWEN3.read_text("utf-8"), extra=["<|im_end|>"])
    found = answers(tokenizer, [USER, BOT, USER, BOT])
    assert [answer.endswith("Hello<|im_end|>") for answer in found] == [True, True]
    assert tokenizer.chat_template == QWEN3.read_text("utf-8")


def test_an_unknown_template_that_rewrites_earlier_turns_is_an_error() -> None:
    tokenizer = byte_tokenizer(
        CHATML.replace("message['content']", "(message['content'] if loop.last else 'cut')")
    )
    with pytest.raises(
        ValueError, match=r"up to number 2 differently once others follow, .* set loss_on to all"
    ):
        answers(tokenizer, [USER, BOT, BOT, BOT])


def test_a_template_that_refuses_a_conversation_is_an_error() -> None:
    refuse = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
    with pytest.raises(ValueError, match="refuses this conversation: System role not supported"):
        answers(byte_tokenizer(refuse + CHATML), [SYSTEM, USER, BOT])


def test_what_only_a_question_ends_with_is_left_out_with_a_warning() -> None:
    tokenizer = byte_tokenizer(
        CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}")
    )
    with pytest.warns(UserWarning, match="asks for an answer with '<think>', which it leaves out"):
        assert answers(tokenizer, [USER, BOT]) == ["Hello<eos>"]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([], [1], 0), ([1, 9], [1, 2], 1), ("ab", "ac", 1)],
)
@pytest.mark.parametrize("swap", [False, True])
def test_common_length(first: object, second: object, length: int, swap: bool) -> None:
    compare: Callable[..., int] = common_length
    assert compare(*((second, first) if swap else (first, second))) == length
