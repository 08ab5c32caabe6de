import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template, qwen2_5_chat_template

from lisatune.data.chat import PLAIN_CHAT_TEMPLATE, Chat, common_length, encode_prompt, set_chat_template
from lisatune.data.records import Records
from lisatune.data.roles import mark_roles
from lisatune.data.tokens import tokenize
from lisatune.losses.causal_lm import IGNORE
from tiny_text import CHATML, byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def answers(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], first: int = 1) -> list[str]:
    """Return what `Chat.render_prefixes` marks as answers; check that the prefixes grow to the whole."""
    chat = Chat(tokenizer)
    prefixes = chat.render_prefixes(messages, first)
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


@pytest.mark.parametrize("own", [None, ""])
def test_the_plain_template_is_saved_with_the_tokenizer(own: str | None, tmp_path: Path) -> None:
    byte_tokenizer(own).save_pretrained(tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert set_chat_template(tokenizer), "an empty template writes nothing"
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


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN3 = TEMPLATES / "qwen3.jinja"
VISION = {"idefics3", "llava_next", "smolvlm"}  # want parts, not text
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))


@pytest.mark.filterwarnings("ignore:the chat template asks for an answer with")
@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_well_known_models_give_the_answers_and_nothing_of_the_questions(family: str) -> None:
    template = (TEMPLATES / f"{family}.jinja").read_text("utf-8")
    special = set(re.findall(r"<[|｜_a-z][^<>'\"\n{}]*>", template)) - {"<bos>", "<eos>"}
    tokenizer = byte_tokenizer(template, extra=sorted(special))
    messages = [USER, BOT, USER | {"content": "Question"}, BOT | {"content": "Goodbye"}]
    if family in VISION:
        with pytest.raises(ValueError, match=r"the chat template (leaves out|refuses)"):
            answers(tokenizer, messages)
        return
    hello, goodbye = answers(tokenizer, messages)
    assert "Hello" in hello
    assert "Goodbye" in goodbye
    assert "Question" not in hello + goodbye
    assert Chat(tokenizer).ends_turn(goodbye)
    assert Chat(tokenizer).ends_turn(hello)


def is_trained_by_trl(family: str) -> bool:
    tokenizer = byte_tokenizer((TEMPLATES / f"{family}.jinja").read_text("utf-8"))
    try:
        return family not in VISION and bool(get_training_chat_template(tokenizer))
    except ValueError:
        return False


@pytest.mark.filterwarnings("ignore:the chat template asks for an answer with")
@pytest.mark.parametrize("family", [family for family in FAMILIES if is_trained_by_trl(family)])
def test_tokens_with_loss_are_those_of_trls_training_templates(family: str) -> None:
    """TRL also counts what asks for the answer, and the line break after its stop: no model writes these."""
    template = (TEMPLATES / f"{family}.jinja").read_text("utf-8")
    special = set(re.findall(r"<[|｜_a-z][^<>'\"\n{}]*>", template)) - {"<bos>", "<eos>"}
    tokenizer = byte_tokenizer(template, extra=sorted(special))
    messages = [USER, BOT, USER, BOT | {"content": ""}, USER, BOT | {"content": "Goodbye"}]
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=get_training_chat_template(tokenizer),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    records = Records([{"messages": messages}], "messages", 0, "records")
    (ours,) = tokenize(records, tokenizer, max_length=9999).rows
    assert ours["input_ids"].tolist() == theirs["input_ids"]
    asks = Chat(tokenizer).render([USER], ask=True)
    is_counted = [bool(mask) for mask in theirs["assistant_masks"]]
    answers = spans(
        tokenizer, ours["input_ids"].tolist(), [label != IGNORE for label in ours["labels"].tolist()]
    )
    wider = spans(tokenizer, ours["input_ids"].tolist(), is_counted)
    assert len(answers) == len(wider) == 3
    for answer, all_of_it in zip(answers, wider, strict=True):
        assert all_of_it.rstrip().endswith(answer)
        assert all_of_it.rstrip().removesuffix(answer) in asks


def spans(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[bool]) -> list[str]:
    """Return the texts whose tokens are marked."""
    marked = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in group]) for is_marked, group in marked if is_marked]


def test_a_template_that_rewrites_earlier_turns_is_used_in_trls_training_variant() -> None:
    tokenizer = byte_tokenizer(QWEN3.read_text("utf-8"), extra=["<|im_end|>"])
    found = answers(tokenizer, [USER, BOT, USER, BOT])
    assert [answer.endswith("Hello<|im_end|>") for answer in found] == [True, True]
    assert tokenizer.chat_template == QWEN3.read_text("utf-8")


def test_an_unknown_template_that_rewrites_earlier_turns_is_an_error() -> None:
    tokenizer = byte_tokenizer(
        CHATML.replace("message['content']", "('' if loop.last else 'Old: ') + message['content']")
    )
    with pytest.raises(
        ValueError, match=r"up to number 2 differently once others follow, .* set loss_on to all"
    ):
        answers(tokenizer, [USER, BOT, BOT, BOT])


@pytest.mark.parametrize("ending", ["<end>{{ '<eos>' if LAST }}", "{{ '<eos>' if LAST else '<end>' }}"])
def test_the_end_of_the_last_turn_may_be_written_differently(ending: str) -> None:
    """As Phi-3 and gpt-oss do; the conversation still ends with a stop that is learned."""
    ending = ending.replace("LAST", "loop.last and not add_generation_prompt")
    template = CHATML.replace("message['content'] + eos_token + '\n' }}", "message['content'] }}" + ending)
    messages = [USER, BOT, USER, BOT | {"content": ""}, USER, BOT | {"content": "Bye"}]
    found = answers(byte_tokenizer(template, extra=["<end>"]), messages)
    last = "<end><eos>" if ending.startswith("<end>") else "<eos>"
    assert found == ["Hello<end>", "<end>", f"Bye{last}"]


def test_what_begins_the_next_turn_is_not_learned_as_the_end_of_an_answer() -> None:
    template = "{% for m in messages %}{{ '<turn>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    template += "{{ '<turn>assistant:' if add_generation_prompt else '<eos>' }}"
    found = answers(byte_tokenizer(template, extra=["<turn>"]), [USER, BOT, USER, BOT])
    assert found == ["Hello", "Hello<eos>"]


DATED = "{{ 'Today is ' + strftime_now('%d %b %Y (%-d.%-m., %A)') + '.\n' }}" + CHATML


def test_a_template_sees_the_day_that_it_is_told_as_today() -> None:
    tokenizer = byte_tokenizer(DATED)
    today = "Today is 04 Mar 2020 (4.3., Wednesday).\n<|im_start|>user\nHi"
    assert Chat(tokenizer, "2020-03-04").render([USER]).startswith(today)
    ids = encode_prompt(tokenizer, [USER], date="2020-03-04")
    assert tokenizer.decode(ids).startswith(today)
    records = Records([{"messages": [USER, BOT]}], "messages", 0, "records")
    (row,) = tokenize(records, tokenizer, max_length=99, date="2020-03-04").rows
    assert tokenizer.decode(row["input_ids"]).startswith(today)
    assert tokenizer.chat_template == DATED
    assert not Chat(tokenizer).render([USER]).startswith(today)


def test_a_day_changes_nothing_else_of_a_template() -> None:
    template = "\n  {% if strftime_now is defined %}a{% endif %}\n" + CHATML
    tokenizer = byte_tokenizer(template)
    assert Chat(tokenizer, "2020-03-04").render([USER, BOT]) == Chat(tokenizer).render([USER, BOT])


def test_a_template_that_leaves_texts_out_is_an_error() -> None:
    """As those of vision models do when they get text where they want a list of parts."""
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", "''"))
    with pytest.raises(ValueError, match="leaves out the text of message 1"):
        Chat(tokenizer).render([USER, BOT])


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


def test_a_plain_prompt_does_not_end_with_the_stop_that_a_tokenizer_adds() -> None:
    tokenizer = byte_tokenizer(None)
    eos = ("<eos>", tokenizer.eos_token_id)
    adds_eos = processors.TemplateProcessing("$A <eos>", special_tokens=[eos])
    tokenizer.backend_tokenizer.post_processor = adds_eos
    decode = tokenizer.decode
    assert decode(tokenizer("Once")["input_ids"]) == "Once<eos>"
    assert decode(encode_prompt(tokenizer, "Once")) == "Once"
    assert decode(encode_prompt(tokenizer, "A<eos>Once<eos>")) == "A<eos>Once<eos>"


def test_a_missing_trl_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    with pytest.raises(ImportError, match=r'pip install "lisatune\[train\]"'):
        Chat(byte_tokenizer(CHATML))


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CHAT_OF_TOOLS = [USER, CALLS, {"role": "tool", "content": "3"}, BOT]


def test_calls_and_tools_go_through_the_template_and_calls_are_learned() -> None:
    tokenizer = byte_tokenizer(qwen2_5_chat_template, extra=["<|im_start|>", "<|im_end|>"])
    chat = Chat(tokenizer)
    prefixes = chat.render_prefixes(CHAT_OF_TOOLS, 1, tools=[TOOL])
    text, learned = prefixes[-1][0], []
    for (before, _), (prefix, has_loss) in itertools.pairwise([("", False), *prefixes]):
        learned += [prefix[len(before) :]] if has_loss else []
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    assert learned == [f"<tool_call>\n{call}\n</tool_call><|im_end|>", "Hello<|im_end|>"]
    assert json.dumps(TOOL) in text
    assert "<tool_response>\n3\n</tool_response>" in text
    last = chat.render_prefixes(CHAT_OF_TOOLS, 1, tools=[TOOL], last=True)
    assert [prefix for prefix, has_loss in last if has_loss] == [text.rstrip("\n")]


def test_a_template_that_leaves_out_calls_or_tools_is_refused() -> None:
    chat = Chat(byte_tokenizer(CHATML))
    with pytest.raises(ValueError, match="the chat template leaves out the call of add in message 2"):
        chat.render_prefixes(CHAT_OF_TOOLS, 1)
    with pytest.raises(ValueError, match="the chat template leaves out the tools, such as add"):
        chat.render_prefixes([USER, BOT], 1, tools=[TOOL])


def roles_learned(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], roles: tuple[str, ...], **how: Any
) -> list[str]:
    """Return what carries loss by role, as text of the tokens, and check the tokens against the whole."""
    records = Records([{"messages": messages} | how], "messages", 0, "records")
    (row,) = tokenize(records, tokenizer, max_length=9999, loss_on=roles).rows
    (whole,) = tokenize(records, tokenizer, max_length=9999, loss_on="all").rows
    assert row["input_ids"].tolist() == whole["input_ids"][: len(row["input_ids"])].tolist()
    return spans(tokenizer, row["input_ids"].tolist(), (row["labels"] != IGNORE).tolist())


def test_messages_of_named_roles_are_learned_to_the_token_that_ends_their_turn() -> None:
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    messages = [SYSTEM, USER, BOT, USER | {"content": " Why?\n"}, BOT | {"content": "So."}, USER]
    hello, so = "Hello<eos>", "So.<eos>"
    users = ["Hi<eos>", " Why?\n<eos>", "Hi<eos>"]
    assert roles_learned(tokenizer, messages, ("assistant",)) == [hello, so]
    assert roles_learned(tokenizer, messages, ("user",)) == users
    assert roles_learned(tokenizer, messages, ("system",)) == ["Be brief.<eos>"]
    both = [users[0], hello, users[1], so, users[2]]
    assert roles_learned(tokenizer, messages, ("user", "assistant")) == both
    messages[3] = messages[3] | {"train": False}
    records = Records([{"messages": messages}], "messages", 0, "records")
    (row,) = tokenize(records, tokenizer, max_length=9999, loss_on=("user",)).rows
    learned = (row["labels"] != IGNORE).tolist()
    assert spans(tokenizer, row["input_ids"].tolist(), learned) == [users[0], users[2]]


def test_the_answer_of_a_tool_is_found_where_a_template_writes_it_in_a_turn_of_the_user() -> None:
    tokenizer = byte_tokenizer(qwen2_5_chat_template, extra=["<|im_start|>", "<|im_end|>"])
    results = [{"role": "tool", "content": text} for text in ("3", "", "Hi")]
    messages = [USER, CALLS, *results, BOT]
    found = roles_learned(tokenizer, messages, ("tool",), tools=[TOOL])
    assert found == ["3", "Hi"]
    both = roles_learned(tokenizer, messages, ("assistant", "tool"), tools=[TOOL])
    assert both[0].startswith("<tool_call>")
    assert both[1:] == ["3", "Hi", "Hello<|im_end|>"]


def test_a_text_that_a_template_writes_as_json_is_found() -> None:
    template = CHATML.replace("message['content']", "message['content'] | tojson")
    said = 'Say "é" now\n'
    found = roles_learned(byte_tokenizer(template), [USER | {"content": said}, BOT], ("user",))
    assert found == [json.dumps(said, ensure_ascii=False)[1:-1]]


def test_a_text_that_a_template_changes_cannot_be_learned_by_role() -> None:
    twice = CHATML.replace("message['content']", "message['content'] + '.' + message['content']")
    with pytest.raises(ValueError, match=r"changes the text of message 1, .*; leave user out of loss_on"):
        roles_learned(byte_tokenizer(twice), [USER, BOT], ("user",))


def test_what_begins_the_next_turn_is_not_learned_as_the_end_of_a_message() -> None:
    template = "{% for m in messages %}{{ '<turn>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    found = roles_learned(byte_tokenizer(template, extra=["<turn>"]), [USER, BOT, USER, BOT], ("user",))
    assert found == ["Hi", "Hi"]


MARKED = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if not loop.last -%}{{- '(short)' -}}{%- endif -%}
{{- message['content'] + eos_token + '\\n' -}}
{%- endgeneration -%}
{%- else -%}{{- message['content'] + eos_token + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_marks_of_a_template_serve_where_it_writes_earlier_turns_differently() -> None:
    messages = [USER, BOT, USER, BOT | {"content": "Bye"}]
    assert answers(byte_tokenizer(MARKED), messages) == ["(short)Hello<eos>", "Bye<eos>"]
    assert answers(byte_tokenizer(MARKED), [BOT, *messages]) == ["(short)Hello<eos>", "Bye<eos>"]
    unmarked = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ValueError, match="writes the messages up to number 2 differently once others follow"):
        answers(byte_tokenizer(unmarked), messages)


@pytest.mark.parametrize(
    ("marked", "learned"),
    [
        ("MARK{{- '(ok)' + message['content'] + eos_token + '\\n' -}}END", "(ok){}<eos>"),
        ("MARK{{- '(ok)' + message['content'] -}}END{{- eos_token + '\\n' -}}", "(ok){}<eos>"),
        ("{{- '(ok)' -}}MARK{{- message['content'] + eos_token -}}END{{- '\\n' -}}", "{}<eos>"),
        ("MARK{{- '(ok)' + message['content'] -}}END{{- ' (end)' + eos_token + '\\n' -}}", "(ok){}"),
    ],
)
def test_what_a_template_leaves_out_of_its_marks_is_not_learned(marked: str, learned: str) -> None:
    marked = marked.replace("MARK", "{%- generation -%}").replace("END", "{%- endgeneration -%}")
    whole, rest = MARKED.partition("{%- generation -%}")[0], MARKED.partition("{%- endgeneration -%}")[2]
    messages = [USER, BOT, USER, BOT | {"content": "Bye"}, USER]
    found = answers(byte_tokenizer(whole + marked + rest), messages)
    assert found == [learned.format("Hello"), learned.format("Bye")]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gptoss", "glm4moe", "cohere", "lfm2"])
def test_marks_of_a_template_and_our_own_say_the_same(name: str) -> None:
    template = getattr(trl.chat_template_utils, f"{name}_training_chat_template")
    words = sorted(set(re.findall(r"<\|[^|<>{}' ]+\|>", template)))
    tokenizer = byte_tokenizer(template, extra=words)
    messages = [SYSTEM, USER, BOT, USER, BOT | {"content": "Bye"}, USER]
    found = answers(tokenizer, messages)
    chat = Chat(tokenizer)
    marks = chat.read_marks(messages, [2, 4], None)
    assert marks is not None
    assert marks == chat.find_answers(messages, [2, 4], None)
    assert len(found) == 2
    by_role = mark_roles(chat, messages, 1, ("assistant",))
    assert learned_of(by_role) == learned_of(marks)
    both = mark_roles(chat, messages, 1, ("user", "assistant"))
    answers_and_users = learned_of(both)
    assert [span for span in answers_and_users if span in learned_of(marks)] == learned_of(marks)
    users = [
        both[-1][0][start:end] for start, end in answers_and_users if (start, end) not in learned_of(marks)
    ]
    assert [text.removesuffix(chat.find_stop(text)) for text in users] == ["Hi"] * 3


def learned_of(marked: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    """Return begin and end of what carries loss."""
    lengths = [0, *(len(text) for text, _ in marked)]
    return [span for span, (_, learned) in zip(itertools.pairwise(lengths), marked, strict=True) if learned]
