"""The command `lisatune generate`: a model's answers to prompts, or a conversation with it."""

import errno
import gc
import io
import json as json_text
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lisatune.cli.loading import LoadOptions
from lisatune.cli.options import refuse_unused
from lisatune.console import print_line, terminal

__all__ = ["generate"]

Messages = list[dict[str, str]]
Prompt = str | Messages
"""Plain text, or a conversation that ends with the user."""

HOW_TO_CHAT = "/reset begins a new conversation, /exit ends"


def generate(
    folder: str,
    /,
    *,
    prompt: list[str] | None = None,
    file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    chat: bool = False,
    system: str | None = None,
    against: str | None = None,
    output: Path | None = None,
    json: bool = False,
    batch: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template: Literal["auto", "on", "off"] = "auto",
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Generate a model's answers to prompts, or chat with it.

    Decoding is greedy by default, so the answer is the same every time. Prompts go through the chat template
    if the run trained on conversations:

        lisatune generate runs/demo --prompt "What does the Python function os.getcwd() do?"
        lisatune generate runs/demo --chat --system "Answer in one sentence."
        lisatune generate runs/demo --file prompts.jsonl --batch 8 --output answers.jsonl
        lisatune generate runs/demo --prompt "What is a metaclass?" --against smollm2-135m

    Args:
        folder: Run folder, or any model that `train` takes, or a folder of adapters.
        prompt: Prompt to answer; may be given several times.
        file: File of prompts, one on each line, or .jsonl with `prompt` or `messages`; - for standard input.
        chat: Talk with the model; each answer appears while it is written.
        system: System prompt that each conversation begins with.
        against: Base model: let it answer too, and show both answers side by side.
        output: New file for a line of JSON for each prompt: prompt, answer, model.
        json: Print these lines instead of text.
        batch: Prompts that are answered at once.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Seed of the draws.
        chat_template: Whether prompts go through the tokenizer's chat template. auto: as the run trained; for
            any other model, if its tokenizer has one.
        device: cpu, cuda, …; auto: an accelerator if there is one.
        dtype: Dtype of the weights. auto: as the model is stored.
        attention: Attention implementation, as model.attention.
        trust_remote_code: Run Python code that comes with the model.
    """
    import torch

    from lisatune.files.disk import check_writable

    for name, value, least in (("max-new-tokens", max_new_tokens, 1), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"--{name} must be >= {least}, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be a number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        refuse_unused({"--top-p": top_p < 1}, "without --temperature, because no token is drawn")
    if chat:
        refuse_unused({"--chat-template off": chat_template == "off"}, "with --chat")
    if output is not None and output.exists():
        raise ValueError(f"--output {output} exists; name a new file")
    if output is not None:
        check_writable(output, "--output")
    options = LoadOptions(device, dtype, attention, trust_remote_code)
    models = [_Model.find(each, Path(folder), options) for each in (folder, against) if each is not None]
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if chat:
            if prompt or file or output or json:
                raise ValueError(
                    "--chat is a conversation on the terminal; leave out --prompt, --file, --output"
                )
            _check_template(models[0], "on", system)
            return _chat(models, system, how)
        texts = _read_prompts(prompt, file)
        uses_template = _check_template(models[0], chat_template, system)
        if chat_template == "off" and not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{file or 'standard input'} has `messages`, which go through the chat template; leave out "
                "--chat-template off, or give texts in `prompt`"
            )
        prompts = [_make_prompt(text, system, uses_template) for text in texts]
        for model in models:
            options.check(model.name)
        return _answer(models, prompts, batch, output, json, how)


@dataclass
class _Model:
    """A model that answers."""

    name: str
    run: Path | None
    first_day: str | None
    """The day that the chat template of the run sees as today."""
    options: LoadOptions
    loaded: tuple[Any, Any] | None = None

    @classmethod
    def find(cls, name: str, folder: Path, options: LoadOptions) -> "_Model":
        from lisatune.runs.folder import first_day
        from lisatune.runs.summary import model_of

        found, run = model_of(name)
        return cls(found, run, first_day(folder), options)

    def answer(self, prompts: Sequence[Prompt], how: dict[str, Any]) -> list[str]:
        """Answer prompts; the first call loads the model."""
        from lisatune.evaluate.held_out import generate_answers

        if self.loaded is None:
            self.loaded = self.options.load(self.name)
        model, tokenizer = self.loaded
        return generate_answers(model, tokenizer, prompts, date=self.first_day, **how)


def _check_template(model: _Model, asked: str, system: str | None) -> bool:
    """Say whether prompts go through the chat template, and refuse what needs one where there is none."""
    from lisatune.models.load import load_tokenizer
    from lisatune.runs.summary import trained_on_chat

    tokenizer = load_tokenizer(model.name, trust_remote_code=model.options.trust_remote_code)
    if asked == "on" and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {model.name} has no chat template; leave out --chat-template and --chat"
        )
    is_chat = None if model.run is None else trained_on_chat(model.run)
    uses = bool(tokenizer.chat_template) if is_chat is None else is_chat
    uses = asked == "on" or (asked == "auto" and uses)
    if system is not None and not uses:
        raise ValueError(
            "--system needs the chat template, and prompts go without one; give --chat-template on"
        )
    return uses


def _read_prompts(given: list[str] | None, file: str | None) -> list[Prompt]:
    """Read the prompts of the command line, of a file, or of standard input.

    Raises:
        ValueError: there are none, or a line is no prompt.
        FileNotFoundError: there is no such file.
    """
    if given and file:
        raise ValueError("--prompt and --file both give prompts; use one of them")
    if given:
        return [_read_escapes(text) for text in given]
    if file is None and sys.stdin.isatty():
        raise ValueError("give a prompt with --prompt, prompts with --file, or --chat")
    is_stdin = file is None or file == "-"
    name = "standard input" if is_stdin else f"prompt file {file}"
    if not is_stdin and not Path(str(file)).is_file():
        raise FileNotFoundError(f"there is no {name}")
    try:
        text = sys.stdin.read() if is_stdin else Path(str(file)).read_text(encoding="utf-8")
        text.encode()  # standard input may hold wrong bytes as escapes
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason}); write it in UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} is empty; write a prompt on each line")
    is_json = str(file).endswith(".jsonl") or (is_stdin and all(line[0] == "{" for _, line in lines))
    return [_parse(line, f"{name}, line {number}") if is_json else line for number, line in lines]


def _read_escapes(text: str) -> str:
    """Put U+FFFD for each byte that Python holds as an escape, as under a locale without UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _parse(line: str, where: str) -> Prompt:
    """Read a line of JSON: a text, `prompt`, or `messages`."""
    try:
        value = json_text.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    found = value.get("messages", value.get("prompt")) if isinstance(value, dict) else value
    if isinstance(found, str) and found.strip():
        return found
    keys = ("role", "content")
    if not (
        isinstance(found, list)
        and found
        and all(isinstance(each, dict) and all(isinstance(each.get(k), str) for k in keys) for each in found)
    ):
        raise ValueError(
            f"{where} has neither a text in `prompt` nor a list of role and content in `messages`"
        )
    if found[-1]["role"] == "assistant":
        raise ValueError(f"{where} ends with an answer of the assistant; end it with the user's message")
    return found


def _make_prompt(prompt: Prompt, system: str | None, uses_template: bool) -> Prompt:
    """Put a prompt into the form that the model is asked in."""
    if isinstance(prompt, str):
        if not uses_template:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt


def _answer(
    models: list[_Model],
    prompts: list[Prompt],
    batch: int,
    output: Path | None,
    as_json: bool,
    how: dict[str, Any],
) -> int:
    """Answer all prompts, batch by batch; of two models the base answers all of them first."""
    others: list[list[str]] = []
    for model in reversed(models[1:]):
        others.insert(0, [text for _, texts in _batches(model, prompts, batch, how) for text in texts])
        model.loaded = None
        gc.collect()
    with _lines_to(output) as write:
        for start, answers in _batches(models[0], prompts, batch, how):
            for i, answer in enumerate(answers, start):
                both = [answer, *(texts[i] for texts in others)]
                line = _json_line(models, prompts[i], both)
                write(line)
                if as_json:
                    print_line(line)
                elif output is None:
                    _print_answer(models, prompts[i], both, alone=len(prompts) == 1)
    if output is not None and not as_json:
        print_line(str(output))
    return 0


@contextmanager
def _lines_to(output: Path | None) -> Iterator[Callable[[str], None]]:
    """Make a new file; give a function that adds a line to it, or does nothing if there is none."""
    from lisatune.files.disk import explain_write_errors

    if output is None:
        yield lambda line: None
        return
    with explain_write_errors(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("xb", buffering=0)  # else closing it raises again, for what was not written

    def write(line: str) -> None:
        text = f"{line}\n".encode()
        with explain_write_errors(output, "--output"):
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with file:
        yield write


def _batches(
    model: _Model, prompts: list[Prompt], batch: int, how: dict[str, Any]
) -> Iterator[tuple[int, list[str]]]:
    """Answer batch by batch; give the number of the first prompt and the answers."""
    for start in range(0, len(prompts), batch):
        yield start, model.answer(prompts[start : start + batch], how | {"batch": batch})


def _json_line(models: list[_Model], prompt: Prompt, answers: list[str]) -> str:
    key = "prompt" if isinstance(prompt, str) else "messages"
    record: dict[str, Any] = {key: prompt, "answer": answers[0], "model": models[0].name}
    if len(models) > 1:
        record |= {"against_answer": answers[1], "against": models[1].name}
    return json_text.dumps(record, ensure_ascii=False)


def _print_answer(models: list[_Model], prompt: Prompt, answers: list[str], *, alone: bool) -> None:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if len(models) > 1:
        print_line(f"> {text}")
        _print_side_by_side(models, answers)
    else:
        print_line(answers[0] if alone else f"> {text}\n{answers[0]}\n")


def _print_side_by_side(models: list[_Model], answers: list[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for model in models:
        table.add_column(Text(model.name), ratio=1, overflow="fold")
    table.add_row(*map(Text, answers))
    terminal().print(table)


def _chat(models: list[_Model], system: str | None, how: dict[str, Any]) -> int:
    """Talk until the user ends it. Each model has a conversation of its own, with the same user."""
    begin: Messages = [] if system is None else [{"role": "system", "content": system}]
    for model in models:
        model.options.check(model.name)
        model.loaded = model.options.load(model.name)
    told = [list(begin) for _ in models]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte costs itself, not the conversation
    print_line(HOW_TO_CHAT)
    while (text := _ask()) is not None:
        if text == "/reset":
            told = [list(begin) for _ in models]
            continue
        for model, messages in zip(models, told, strict=True):
            messages.append({"role": "user", "content": text})
            if len(models) > 1:
                print_line(f"[{model.name}]")
            try:
                (answer,) = model.answer([messages], how | {"stream": _show})
            except ValueError as error:
                messages.pop()
                print_line(f"{error}; {HOW_TO_CHAT}")
                continue
            print_line("")
            messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str | None:
    """Read the user's next message; None at the end."""
    while True:
        try:
            text = _read_escapes(input("> " if sys.stdin.isatty() else "")).strip()
        except EOFError:
            return None
        if text in ("/exit", "/quit"):
            return None
        if text:
            return text


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
