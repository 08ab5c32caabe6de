"""Chat templates as training needs them: where answers begin and end in a rendered conversation."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lisatune.console import first_line
from lisatune.data.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN_CHAT_TEMPLATE", "Chat", "common_length", "set_chat_template", "template_errors"]

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
    """Give a tokenizer without a chat template `PLAIN_CHAT_TEMPLATE`, which is then saved with it.

    The template starts with the beginning-of-sequence token if the tokenizer puts one before plain text.

    Returns:
        Whether the template was set; False if the tokenizer has its own.

    Raises:
        ValueError: there is no end-of-sequence token to end an answer with.
    """
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token to end an answer with; set its eos_token"
        )
    starts_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{- bos_token -}}\n" if starts_with_bos else "") + PLAIN_CHAT_TEMPLATE
    return True


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what a template raises, which is a program and can raise anything, into one ValueError.

    transformers renders templates in jinja's sandbox, which keeps them from Python and from files.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the chat template refuses this conversation: {first_line(error)}") from error


class Chat:
    """The chat template of a tokenizer, which gets `PLAIN_CHAT_TEMPLATE` if it has none.

    Where TRL knows a variant of the template that writes earlier turns the same whatever follows (Qwen 3
    and others drop the thoughts of earlier turns), that variant is used for training.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError as error:
            raise ImportError('chat templates need trl: pip install "lisatune[train]"') from error
        set_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.template: str | None = None
        # Not known to TRL: the own template stays, and `prefixes` checks it on every conversation.
        with suppress(ValueError), template_errors():
            self.template = get_training_chat_template(tokenizer)
        special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        self._stops = tuple(token for token in special if token.strip())

    def render(self, messages: Messages, *, ask: bool = False) -> str:
        """Write messages as text; `ask` adds the beginning of the answer that is due.

        Raises:
            ValueError: the template refuses the messages, or leaves out what one of them says.
        """
        with template_errors():
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=ask
            )
        for number, message in enumerate(messages, 1):
            if _last_word(message) not in text:
                raise ValueError(
                    f"the chat template leaves out what message {number} says (templates of vision models "
                    "may want a list of parts); give the tokenizer a template for plain text"
                )
        return text

    def ends_turn(self, text: str) -> bool:
        """Whether rendered text ends with a special token, at which a model can learn to stop."""
        return text.rstrip().endswith(self._stops)

    def prefixes(self, messages: Messages, first_answer: int) -> list[tuple[str, bool]]:
        """Write the conversation as ever longer beginnings, the last of which is all of it.

        Args:
            messages: the conversation.
            first_answer: index of the first message that may be an answer, >= 1.

        Returns:
            Texts, each with whether what it adds to the one before is an answer. An answer begins after
            what the template writes to ask for it and ends with the special token that ends its turn, or,
            if there is none, with all that the template writes.

        Raises:
            ValueError: the template refuses the messages, or writes some differently once others follow.
        """
        full = self.render(messages)
        found: list[tuple[str, bool]] = []
        for index in range(first_answer, len(messages)):
            if messages[index]["role"] == "assistant":
                question, answer = self.render(messages[:index], ask=True), self.render(messages[: index + 1])
                if not full.startswith(question) and full.startswith(self.render(messages[:index])):
                    question = _without_unseen_end(question, full)
                word = _last_word(messages[index])
                end_of_text = max(len(question), answer.rfind(word) + len(word) if word else 0)
                same = common_length(answer, full)
                if not full.startswith(question) or same < end_of_text:
                    raise ValueError(
                        f"the chat template writes the messages up to number {index + 1} differently once "
                        "others follow, so answers can't be told from the rest; set loss_on to all, or give "
                        "the tokenizer a template that only appends"
                    )
                # After the last message some templates write another end of turn than between two.
                end = same if same == len(answer) else end_of_text
                stops = (i for i in range(end_of_text, same + 1) if answer.endswith(self._stops, 0, i))
                found += [(question, False), (answer[: max(stops, default=end)], True)]
        return found if found and found[-1][0] == full else [*found, (full, False)]


def _last_word(message: dict[str, str]) -> str:
    return (message["content"].split() or [""])[-1]


def _without_unseen_end(question: str, full: str) -> str:
    """The question up to where the conversation goes on differently; only the header of an answer is lost."""
    common = full[: common_length(question, full)]
    warnings.warn(
        f"the chat template asks for an answer with {question[len(common) :]!r}, which it leaves out of "
        "finished conversations: the model trains without it",
        stacklevel=2,
    )
    return common


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt: plain text as it is, messages through the chat template."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    else:
        with template_errors():
            ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, tokenizer_kwargs={"verbose": False}
            )["input_ids"]
    return ids
