"""The command `lisatune`: parse, call, print.

Every failure prints one sentence to stderr and returns an exit code of `lisatune.console`. Imports are inside
functions so that `--help` is fast and a missing package is one of those sentences.
"""

import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lisatune import __version__
from lisatune.console import (
    BAD_INPUT,
    ending_signals,
    exit_code,
    expand_home,
    first_line,
    handle_signals,
    join_overrides,
    print_line,
    terminate,
)

if TYPE_CHECKING:
    from cyclopts import App

__all__ = ["build_app", "main"]

LONGEST_PATH = 48
"""Characters of a path in the table of `lisatune cache`."""

ABOUT = """Fine-tune all weights of a language model at the memory of a few layers: LISA.

A recipe is a YAML file, here the shortest:

    model: {name: smollm2-135m}
    data:  {train: rows.jsonl}

    lisatune init --data rows.jsonl
    lisatune check recipe.yaml
    lisatune train recipe.yaml run.steps=200 method.active=4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name. Default: those of the process.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    warnings.formatwarning = _format_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale such as C lacks most characters
        sys.stdout.reconfigure(errors="replace")
    if sys.stdin is None:  # closed by the shell (`0<&-`); it is read as if it were empty
        sys.stdin = io.StringIO()
    if sys.stdout is None:  # closed by the shell (`>&-`)
        sys.stdout = io.StringIO()
    try:
        with handle_signals(dict.fromkeys(ending_signals(), terminate)):
            return _run(tokens)
    except BrokenPipeError:  # the reader of our output has gone, as in `lisatune layers MODEL | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, Exception) as error:
        return _report_failure(error, debug)


def train(
    recipe: Path,
    /,
    *overrides: str,
    resume: bool = False,
    resume_auto: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Fine-tune a model with a recipe.

    Prints an outline of the run, trains, and saves the model in the run folder:

        lisatune train recipes/demo.yaml
        lisatune train recipe.yaml run.steps=200 optimizer.betas=[0.9,0.95]
        lisatune train recipe.yaml --resume

    Args:
        recipe: YAML file.
        overrides: `section.key=value` or `--section.key value`; wins over the file. A list is [a,b].
        resume: Continue from the newest checkpoint in the run folder, with the same result as without a stop.
        resume_auto: Also written --resume=auto. As --resume, but start the run if there is none to resume.
        overwrite: Delete the run in the run folder and start over.
        quiet: Print warnings and errors only; metrics.jsonl and summary.json in the run folder have the rest.
    """
    from lisatune.train.loop import train
    from lisatune.train.recipe_file import load_recipe

    with _without_output() if quiet else nullcontext():
        how: bool | Literal["auto"] = "auto" if resume_auto else resume
        train(load_recipe(recipe, overrides), resume=how, overwrite=overwrite)
    return 0


def check(
    recipe: Path,
    /,
    *overrides: str,
    resume: bool = False,
    resume_auto: bool = False,
    overwrite: bool = False,
    show: int = 0,
) -> int:
    """Find the problems of a run before any weights load.

    Reads the keys, the model's config, the tokenizer and every record, prints an outline of the run
    and lists all problems. Writes nothing but prepared tokens, which `train` then finds in the cache:

        lisatune check recipe.yaml
        lisatune check recipe.yaml data.max_length=512
        lisatune check recipe.yaml --show 3

    Args:
        recipe: YAML file.
        overrides: `section.key=value` or `--section.key value`; wins over the file.
        resume: Check for `train --resume`.
        resume_auto: Check for `train --resume=auto`.
        overwrite: Check for `train --overwrite`.
        show: Print so many training rows as the model sees them, with what carries loss in ⟦ ⟧.
    """
    from lisatune.train.check import check, print_report
    from lisatune.train.recipe_file import load_recipe

    how: bool | Literal["auto"] = "auto" if resume_auto else resume
    if show < 0:
        raise ValueError(f"--show must be >= 0, got {show}")
    report = check(load_recipe(recipe, overrides), resume=how, overwrite=overwrite, show=show)
    print_report(report)
    return 2 if report.problems else 0


def cache(*, folder: str | None = None, clear: bool = False) -> int:
    """Show prepared tokens, or delete them.

    `train`, `check` and `compare` tokenise each source once and take its tokens from the cache later:

        lisatune cache
        lisatune cache --clear

    Args:
        folder: Another folder than the default, as given to data.cache.
        clear: Delete all prepared tokens. The next run makes its own again.
    """
    from rich import box
    from rich.table import Table

    from lisatune.console import byte_text, count_text, plural, terminal
    from lisatune.data.cache import clear as clear_folder
    from lisatune.data.cache import list_entries, tokens_folder

    console, where = terminal(), tokens_folder(folder)
    if clear:
        num_bytes, busy = clear_folder(where)
        console.print(f"{byte_text(num_bytes)} deleted in {where}", markup=False, soft_wrap=True)
        if busy:
            console.print(f"{plural(len(busy), 'source')} left, which a run prepares now")
        return 0
    entries = list_entries(where)
    if entries:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("source", "records", "tokens", "size", "last used"):
            table.add_column(name, justify="left" if name == "source" else "right")
        for entry in entries:
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            sizes = (f"{entry.records:,}", count_text(entry.tokens), byte_text(entry.num_bytes))
            table.add_row(_shorten_path(entry.source), *sizes, day)
        console.print(table)
    total = byte_text(sum(entry.num_bytes for entry in entries))
    sources = plural(len(entries), "prepared source")
    console.print(f"{sources}, {total} in {where}", markup=False, soft_wrap=True)
    return 0


def _shorten_path(source: str) -> str:
    """Leave the end of a long path, with the name of the file."""
    text = source if len(source) <= LONGEST_PATH else f"…{source[-LONGEST_PATH + 1 :]}"
    return text.replace(str(Path.home()), "~").replace("[", r"\[")


@contextmanager
def _without_output() -> Iterator[None]:
    """Print nothing to standard output."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _expand_paths(tokens: Sequence[str]) -> list[str]:
    """Expand ~ in arguments that a shell has left as they are: in quotes, or after `--output=`."""
    expanded = list(tokens)
    for i, token in enumerate(tokens):
        flag, equals, value = token.rpartition("=") if token.startswith("--") else ("", "", token)
        is_text = {"--prompt", "--system"} & {flag, *tokens[i - 1 : i]}
        if value.startswith("~/") and not is_text:
            expanded[i] = flag + equals + expand_home(value)
    return expanded


def build_app() -> "App":
    """Build the command line as a cyclopts app, with all commands.

    Raises:
        ImportError: the packages of `lisatune[train]` are missing.
    """
    try:
        from cyclopts import App, Parameter
    except ImportError as error:
        raise ImportError(f'{error}; the command needs packages: pip install "lisatune[train]"') from None

    from lisatune.cli.compare import compare
    from lisatune.cli.evaluate import evaluate
    from lisatune.cli.export import export
    from lisatune.cli.generate import generate
    from lisatune.cli.init import init
    from lisatune.cli.layers import layers
    from lisatune.cli.plan import plan
    from lisatune.cli.report import report
    from lisatune.cli.study import norms, outliers
    from lisatune.console import terminal

    app = App(
        name="lisatune",
        help=ABOUT,
        help_epilogue="`--debug` with any command shows the traceback of an error.",
        help_format="plaintext",
        version=__version__,
        console=terminal(),
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    usage = "Usage: lisatune {} RECIPE [section.key=value …] [OPTIONS]"
    app.command(init)
    app.command(train, usage=usage.format("train"))
    app.command(check, usage=usage.format("check"))
    app.command(plan, usage=usage.format("plan").replace("RECIPE", "[RECIPE | --model MODEL]"))
    app.command(compare, usage=usage.format("compare").replace("RECIPE", "[RECIPE | FOLDER]"))
    app.command(evaluate)
    study = App(name="study", help="Measure what training does to each layer, for samplers to read.")
    study.command(norms, usage=usage.format("study norms"))
    study.command(outliers, usage=usage.format("study outliers"))
    app.command(study)
    app.command(report, usage="Usage: lisatune report RUN… [OPTIONS]")
    app.command(layers)
    app.command(export)
    app.command(cache)
    app.command(generate)
    app.register_install_completion_command(help="Install completion for your shell: bash, zsh or fish.")
    return app


def _run(tokens: list[str]) -> int:
    """Run one command and return its exit code."""
    _refuse_empty(tokens)
    tokens = ["--resume-auto" if token == "--resume=auto" else token for token in tokens]
    asks_keys = tokens[:1] in (["train"], ["check"]) and bool({"--help", "-h"} & set(tokens))
    if asks_keys and tokens[1] in ("--help", "-h") and len(tokens) == 3:
        _print_keys(tokens[2])
        return 0
    app = build_app()
    from cyclopts import CycloptsError, UnusedCliTokensError

    try:
        result = app(
            _expand_paths(join_overrides(tokens)),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        command = " ".join(["lisatune", *(error.command_chain or ())])
        text = str(error)
        if isinstance(error, UnusedCliTokensError):
            text = f"{command} does not take {' '.join(error.unused_tokens or ())}; leave it out."
        raise ValueError(f"{text} See `{command} --help`.") from None
    if asks_keys:
        _print_keys(None)
    return result if isinstance(result, int) else 0


def _print_keys(only: str | None) -> None:
    """Print the keys of one section or method with their help, or the names of all keys."""
    from lisatune.console import terminal
    from lisatune.train.recipe_help import print_keys, print_sections

    if only is not None:
        print_keys(terminal(), only)
        return
    print_line("Keys of a recipe, each also an override:\n")
    print_sections(terminal())
    print_line(
        "\n`lisatune train --help SECTION` or `… --help METHOD` says what each key does, with its default."
    )


def _refuse_empty(tokens: Sequence[str]) -> None:
    """Refuse an empty argument, which an unset shell variable leaves behind."""
    for before, token in pairwise(["lisatune", *tokens]):
        if not token:
            raise ValueError(f"the argument after {before!r} is empty; give it a value or leave it out")


def _report_failure(error: BaseException, debug: bool) -> int:
    """Print what happened in one sentence, with `debug` after the traceback; return the exit code."""
    code = exit_code(error)
    if isinstance(error, KeyboardInterrupt):
        sentence = str(error) or "interrupted"
    else:
        text = first_line(error)
        if not debug and "\n" in str(error).strip():
            text += " (--debug shows more)"
        hint = "" if debug else "; --debug shows the traceback"
        name = type(error).__name__
        sentence = f"error: {text}" if code == BAD_INPUT else f"{name}: {text} (a defect{hint})"
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # nobody reads it any more
        print_line(f"lisatune: {sentence}", sys.stderr)
    return code


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning. One that is meant for users does not show the line of code that it comes from."""
    place = "" if category is UserWarning else f" ({category.__name__} in {filename}:{lineno})"
    return f"lisatune: warning: {message}{place}\n"
