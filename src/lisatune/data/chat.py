"""Chat templates for training: where answers begin and end in a conversation, and prompts as token ids."""

import datetime
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

from lisatune.console import first_line
from lisatune.data.turns import Messages, find_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Marked: TypeAlias = list[tuple[str, bool]]
"""Longer and longer beginnings of a text, each with whether what it adds carries loss."""

Tools: TypeAlias = list[dict[str, Any]] | None
"""Descriptions of functions, `{"type": "function", "function": {"name": …}}`; None: there are none."""

__all__ = [
    "PLAIN_CHAT_TEMPLATE",
    "Chat",
    "Marked",
    "common_length",
    "drop_second_bos",
    "encode_prompt",
    "explain_template_errors",
    "set_chat_template",
]

PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '### ' + message['role'].capitalize() + ':\n' + message['content'] -}}
{{- eos_token + '\n\n' if message['role'] == 'assistant' else '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\n' -}}{%- endif -%}"""
"""Chat template for tokenizers that have none. It writes

    ### User:
    What is 2 + 2?

    ### Assistant:
    4<eos>

"""


def set_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Give a tokenizer without a chat template, or with an empty one, `PLAIN_CHAT_TEMPLATE`. It is saved too.

    The template starts with the beginning-of-sequence token if the tokenizer puts one before plain text.

    Returns:
        Whether the template was set; False if the tokenizer has its own.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token to end an answer with.
    """
    if tokenizer.chat_template:
        return False
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token to end an answer with; set its eos_token"
        )
    starts_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{- bos_token -}}\n" if starts_with_bos else "") + PLAIN_CHAT_TEMPLATE
    return True


@contextmanager
def explain_template_errors() -> Iterator[None]:
    """Turn any error of a chat template into a ValueError of one sentence.

    A template is a program and can raise anything. transformers renders it in jinja's sandbox, where it
    reaches neither Python nor files.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the chat template refuses this conversation: {first_line(error)}") from error


class RewrittenError(ValueError):
    """A template writes earlier turns differently once others follow."""


class Chat:
    """The chat template of a tokenizer; a tokenizer without one is given `PLAIN_CHAT_TEMPLATE`.

    Some templates write a turn differently once others follow: Qwen 3 and others drop the thoughts of earlier
    turns. Where TRL knows a variant that does not do this, that variant is used for training.

    Args:
        tokenizer: the tokenizer of the model.
        date: the day that the template sees as today, YYYY-MM-DD. Default: today.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", date: str | None = None) -> None:
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError as error:
            raise ImportError('chat templates need trl: pip install "lisatune[train]"') from error
        set_chat_template(tokenizer)
        self.tokenizer = tokenizer
        template: str | None = None
        # If TRL does not know the template, it stays, and `render_prefixes` checks it on every conversation.
        with suppress(ValueError), explain_template_errors():
            template = get_training_chat_template(tokenizer)
        self.template = _fix_date(template or tokenizer.get_chat_template(), date)
        is_plain = self.template.endswith(PLAIN_CHAT_TEMPLATE)
        self.name = "lisatune's plain chat template" if is_plain else "the tokenizer's chat template"
        """Which template it is, for a reader."""
        if template is not None:
            self.name += " in TRL's form for training"
        self._marks_answers = re.search(r"{%-?\s*generation", self.template) is not None
        special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        self._stops = tuple(token for token in special if token.strip())

    def render(self, messages: Messages, *, ask: bool = False, tools: Tools = None) -> str:
        """Write messages as text.

        Args:
            messages: the conversation.
            ask: add the beginning of the next answer.
            tools: descriptions of the functions that may be called.

        Raises:
            ValueError: the template refuses the messages, or leaves out the text of one of them, a call of a
                function, or a function's description.
        """
        with explain_template_errors():
            text: str = self.tokenizer.apply_chat_template(
                _without_marks(messages),
                chat_template=self.template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=ask,
            )
        self._check_complete(text, messages, tools)
        return text

    def _check_complete(self, text: str, messages: Messages, tools: Tools) -> None:
        """Refuse a text that leaves out something of the conversation."""
        for number, message in enumerate(messages, 1):
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    raise ValueError(
                        f"the chat template leaves out the call of {call['function']['name']} in message "
                        f"{number}; use a model whose template writes calls of functions"
                    )
            if _last_word(message) not in text:
                raise ValueError(
                    f"the chat template leaves out the text of message {number} (templates of vision models "
                    "may need a list of parts); give the tokenizer a template for plain text"
                )
        for tool in tools or ():
            if tool["function"]["name"] not in text:
                raise ValueError(
                    f"the chat template leaves out the tools, such as {tool['function']['name']}; use a "
                    "model whose template writes them"
                )

    def ends_turn(self, text: str) -> bool:
        """Whether rendered text ends with a special token, so that a model can learn to stop there."""
        return text.rstrip().endswith(self._stops)

    def find_stop(self, text: str) -> str:
        """Return the special token that rendered text ends with, without anything after it; empty if none."""
        return max((stop for stop in self._stops if text.endswith(stop)), key=len, default="")

    def first_stop(self, text: str) -> str:
        """Return the special token that text begins with, and the blanks before it; empty if none."""
        blank = len(text) - len(text.lstrip())
        stops = (stop for stop in self._stops if text.startswith(stop, blank))
        return text[:blank] + stop if (stop := max(stops, key=len, default="")) else ""

    def render_prefixes(
        self, messages: Messages, first_answer: int, *, tools: Tools = None, last: bool = False
    ) -> Marked:
        """Write the conversation as longer and longer prefixes; the last one is the whole conversation.

        A template's own marks (`{% generation %}`) count where it has any. Most mark what is found without
        them, or also the header that asks for an answer and the blanks after its stop, which a model does not
        write. So they are read only where they are less, or where answers cannot be found without them.

        Args:
            messages: the conversation.
            first_answer: index of the first message that may be an answer, >= 1.
            tools: descriptions of the functions that may be called.
            last: learn the last answer alone.

        Returns:
            Prefixes, each with whether the text that it adds to the one before carries loss: whether it is an
            answer that is not marked with `train: False`. An answer begins after the template's text that
            asks for it. It ends with the special token that ends its turn, or, if there is none, with the
            last text that the template writes.

        Raises:
            ValueError: the template refuses the messages, or writes some differently once others follow.
        """
        answers = [i for i in range(first_answer, len(messages)) if messages[i]["role"] == "assistant"]
        if last:
            answers = answers[-1:]
        try:
            found = self.find_answers(messages, answers, tools)
            marks = self.read_marks(messages, answers, tools) if self._marks_less else None
            return found if marks is None else self._narrow(found, marks)
        except RewrittenError:
            marked = self.read_marks(messages, answers, tools) if self._marks_answers else None
            if marked is None:
                raise
            return marked

    @cached_property
    def _marks_less(self) -> bool:
        """Whether the template marks less than whole answers."""
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "First"}] * 2
        with suppress(ValueError):  # it may refuse such a conversation
            if self._marks_answers and (marks := self.read_marks(turns, [1, 3], None)):
                return self._narrow(found := self.find_answers(turns, [1, 3], None), marks) != found
        return False

    def _narrow(self, found: Marked, marked: Marked) -> Marked:
        """Leave out of answers what is not marked; a stop that follows what is marked stays."""
        full, kept = found[-1][0], list(found)
        for index in range(0, len(found) - 1, 2):
            begin = max(len(part[index][0]) for part in (found, marked))
            end, marked_end = (len(part[index + 1][0]) for part in (found, marked))
            if marked_end < end and full[marked_end:end].strip() not in self._stops:
                end = marked_end
            kept[index : index + 2] = [(full[:begin], False), (full[: max(begin, end)], found[index + 1][1])]
        return kept if kept[-1][0] == full else [*kept, (full, False)]

    def read_marks(self, messages: Messages, answers: list[int], tools: Tools) -> Marked | None:
        """Take the template's own marks; None if it does not mark every assistant's turn once."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with explain_template_errors():
            texts, spans = render_jinja_template(
                [_without_marks(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        full: str = texts[0]
        self._check_complete(full, messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans[0]) != len(turns):
            return None
        before = messages[: find_answer(messages)]
        asked = self.render(before, ask=True, tools=tools)
        header = asked[common_length(asked, self.render(before, tools=tools)) :]
        found: Marked = []
        for index, (start, end) in zip(turns, spans[0], strict=True):
            if index in answers:
                text = full[start:end]
                shared = (n for n in range(len(header) + 1) if text.startswith(header[len(header) - n :]))
                begin = start + max(shared)
                stop = start + len(text.rstrip()) if self.ends_turn(text) else end
                found += [(full[:begin], False), (full[:stop], messages[index].get("train") is not False)]
        return found if found and found[-1][0] == full else [*found, (full, False)]

    def find_answers(self, messages: Messages, answers: list[int], tools: Tools) -> Marked:
        """Find where answers begin and end by writing longer and longer parts of the conversation."""
        full = self.render(messages, tools=tools)
        found: Marked = []
        for index in answers:
            question = self.render(messages[:index], ask=True, tools=tools)
            is_last = index + 1 == len(messages)
            answer = full if is_last else self.render(messages[: index + 1], tools=tools)
            if not full.startswith(question) and full.startswith(self.render(messages[:index], tools=tools)):
                question = _drop_unseen_end(question, full)
            word = _last_word(messages[index])
            end_of_text = max(len(question), answer.rfind(word) + len(word) if word else 0)
            same = common_length(answer, full)
            if not full.startswith(question) or same < end_of_text:
                raise RewrittenError(
                    f"the chat template writes the messages up to number {index + 1} differently once "
                    "others follow, so answers cannot be told from the rest; set loss_on to all, or give "
                    "the tokenizer a template that only appends"
                )
            # Some templates end the last turn differently from the turns before it.
            end = same if same == len(answer) else end_of_text
            stops = (i for i in range(end_of_text, same + 1) if answer.endswith(self._stops, 0, i))
            end = max(stops, default=end)
            if same < len(answer):
                end += self._length_of_other_stop(messages, index, full[end:], tools)
            is_learned = messages[index].get("train") is not False
            found += [(question, False), (full[:end], is_learned)]
        return found if found and found[-1][0] == full else [*found, (full, False)]

    def _length_of_other_stop(self, messages: Messages, index: int, rest: str, tools: Tools) -> int:
        """Find the stop of an earlier answer in a template that ends the last answer with another one.

        A special token that follows an answer may also begin the next turn. It ends the answer if it ends
        the turn before the answer too (gpt-oss), or if the next turn alone would not begin with it.

        Args:
            messages: the conversation.
            index: index of the answer.
            rest: the conversation after the text of the answer.
            tools: as for `render`.

        Returns:
            Number of characters up to the end of the stop; 0 if there is none.
        """
        found = self.first_stop(rest)
        stop = found.lstrip()
        if not stop:
            return 0
        ends_turns = self.render(messages[:index], tools=tools).rstrip().endswith(stop)
        with suppress(ValueError):  # the template may refuse a conversation of this one message
            following = messages[index + 1]
            ends_turns |= stop not in self.render([following]).partition(following["content"])[0]
        return len(found) if ends_turns else 0


def encode_prompt(
    tokenizer: Any, prompt: str | Messages, *, date: str | None = None, tools: Tools = None
) -> list[int]:
    """Turn a prompt into token ids: plain text as it is, messages through the chat template.

    An end-of-sequence token that the tokenizer puts behind every text is left out: the model continues it.

    Args:
        tokenizer: with a chat template, if the prompt is messages.
        prompt: text or messages.
        date: the day that the template sees as today, YYYY-MM-DD. Default: today.
        tools: descriptions of the functions that may be called.
    """
    if isinstance(prompt, str):
        ids: list[int] = drop_second_bos(tokenizer(prompt, verbose=False)["input_ids"], tokenizer)
        if ids[-1:] == [tokenizer.eos_token_id] and ids.count(ids[-1]) > prompt.count(tokenizer.eos_token):
            ids = ids[:-1]
    else:
        with explain_template_errors():
            ids = tokenizer.apply_chat_template(
                _without_marks(prompt),
                chat_template=_fix_date(tokenizer.get_chat_template(), date),
                tools=tools,
                add_generation_prompt=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
            )["input_ids"]
    return ids


def drop_second_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Drop the beginning-of-sequence token that the tokenizer wrote before a text that brings its own."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the items that two sequences share from the start."""
    if second[: len(first)] == first:  # the usual case, and much faster
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _without_marks(messages: Messages) -> Messages:
    """Leave the messages as a template knows them."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _fix_date(template: str, date: str | None) -> str:
    """Let a template see `date` as today, at midnight.

    transformers gives templates a `strftime_now` that reads the clock, and takes no other one. A macro of
    that name in the template wins over it. The line break after the macro is dropped by jinja's trim_blocks,
    so the template still begins on a line of its own.
    """
    if date is None or "strftime_now" not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    known = [f"%{flag}{code}" for code in "aAbBcdHIjmMpSUVwWxXyYZ" for flag in ("", "-")]
    values = "".join(f" | replace('{code}', '{day.strftime(code)}')" for code in known)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{values} }}}}{{%- endmacro %}}\n{template}"


def _last_word(message: dict[str, Any]) -> str:
    return (str(message["content"]).split() or [""])[-1]


def _drop_unseen_end(question: str, full: str) -> str:
    """Cut the question where the conversation differs from it; this loses only the header of an answer."""
    common = full[: common_length(question, full)]
    warnings.warn(
        f"the chat template asks for an answer with {question[len(common) :]!r}, which it leaves out of "
        "finished conversations: the model trains without it",
        stacklevel=2,
    )
    return common
