"""Questions and answers about the running Python's standard library, made from its docstrings.

`make_pairs` reads the library's source files as syntax trees, so it executes none of them. It also looks at
the functions and types of a fixed list of modules written in C. The first paragraphs of a docstring are the
answer, and one of three phrasings is the question. This gives a few thousand pairs of real data wherever
Python is.

The pairs depend only on the Python version. Each answer occurs once. Whether a pair is held out depends on a
hash of the last part of its name, so that `str.lower` and `bytes.lower`, whose docstrings are nearly equal,
stay on one side.
"""

import ast
import builtins
import contextlib
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["HELD_OUT_SHARE", "make_pairs"]

HELD_OUT_SHARE = 0.1
"""Share of the names whose pairs are held out."""

SHORTEST_ANSWER, LONGEST_ANSWER = 30, 400
"""Bounds of an answer in characters. Paragraphs are added while they fit; if the first does not: no pair."""

LONGEST_CALL = 100
"""Longest `name(arguments)` in a question, in characters; a longer one is replaced by the name."""

# fmt: off
NOT_READ = frozenset({
    "antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data",
    "sre_compile", "sre_constants", "sre_parse", "test", "tests", "this", "tkinter", "turtle", "turtledemo",
})
"""Modules that are left out: tests, demos, jokes, generated tables, and modules that newer Pythons lack."""

IN_C = (
    "array", "asyncio", "binascii", "bisect", "builtins", "bz2", "cmath", "codecs", "collections",
    "contextvars", "csv", "ctypes", "datetime", "decimal", "errno", "fcntl", "functools", "gc",
    "grp", "hashlib", "heapq", "io", "itertools", "json", "locale", "lzma", "marshal", "math",
    "mmap", "operator", "os", "pwd", "queue", "re", "resource", "select", "signal", "socket",
    "sqlite3", "ssl", "statistics", "struct", "sys", "syslog", "termios", "threading", "time",
    "tracemalloc", "unicodedata", "weakref", "zlib",
)
"""Modules with parts in C; importing them has no side effect that a program would notice."""

ASK_FUNCTION = (
    "What does `{}` do in Python?",
    "In Python, what is `{}` for?",
    "Explain the Python function `{}`.",
)
ASK_CLASS = (
    "What is the class `{}` in Python?",
    "In Python, what is the class `{}` for?",
    "Explain the Python class `{}`.",
)


class _Doc(NamedTuple):
    name: str
    """Qualified name, such as `textwrap.TextWrapper.fill` or `str.lower`."""
    call: str
    """The subject of the question: name and arguments, or only the name."""
    is_class: bool
    text: str
    """The docstring, unchanged."""


def make_pairs(part: Literal["train", "validation"]) -> list[dict[str, str]]:
    """Make the question–answer pairs of one part.

    Args:
        part: `train`, or `validation` for the held-out pairs.

    Returns:
        Dicts with `prompt` (a question), `completion` (one paragraph of plain text, whole sentences) and
        `name` (qualified name of the function or class), sorted by name.

    Raises:
        ValueError: the part is unknown.
        RuntimeError: this Python comes without the source of its library.
    """
    if part not in ("train", "validation"):
        raise ValueError(f"python-docs has the parts train and validation, not {part!r}")
    return [dict(pair) for pair in _make_all_pairs() if _is_held_out(pair["name"]) == (part == "validation")]


@cache
def _make_all_pairs() -> tuple[dict[str, str], ...]:
    docs: dict[str, _Doc] = {}
    for doc in (*_read_source_docs(Path(sysconfig.get_path("stdlib"))), *_read_c_docs()):
        docs.setdefault(doc.name, doc)  # the source comes first, because it has every signature
    seen: set[str] = set()
    found = []
    for name in sorted(docs):
        answer = _extract_answer(docs[name].text)
        if answer is not None and answer.casefold() not in seen:
            seen.add(answer.casefold())
            found.append({"prompt": _write_question(docs[name]), "completion": answer, "name": name})
    if len(found) < 1000:
        raise RuntimeError(
            f"python-docs found only {len(found)} docstrings in {sysconfig.get_path('stdlib')}; "
            "use a Python that comes with the source of its standard library"
        )
    return tuple(found)


def _is_held_out(name: str) -> bool:
    return _hash(name.rpartition(".")[2]) < HELD_OUT_SHARE * 2**32


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def _write_question(doc: _Doc) -> str:
    phrasings = ASK_CLASS if doc.is_class else ASK_FUNCTION
    return phrasings[_hash(f"question/{doc.name}") % len(phrasings)].format(doc.call)


def _extract_answer(docstring: str) -> str | None:
    """Take the first prose of a docstring as one paragraph; None if there is none of a fitting length."""
    answer = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        text = _extract_prose(paragraph)
        if text is None or len(answer) + len(text) >= LONGEST_ANSWER:
            break
        answer = f"{answer} {text}".strip()
    return answer[0].upper() + answer[1:] if len(answer) >= SHORTEST_ANSWER else None


_SIGNATURES = re.compile(r"(?:(?:[\w, ]+ = )?[\w.]+\(.*?\)(?:[ ]*--?>.*?)?\s*?(?:$|\n|[ ]--?[ ]|:[ ]))*")
"""First lines such as `S.find(sub[, start]) -> int`, which many docstrings begin with."""


_MARKUP = re.compile(
    r">>>|->|::|\.\. |[=~_-]{4,}|[|\t]|^[ ]"  # examples, directives, rules, tables, indented blocks
    r"|^[-*+#•@:]|^o\s|^\w{1,2}\)\s|^\[?\d+[.\])]|^\w+(?:\s+--?|\s*:)\s",  # bullets, numbers, named items
    re.MULTILINE,
)


def _extract_prose(paragraph: str) -> str | None:
    """Turn a paragraph into plain text: empty if it only repeats the signature, None if it is not prose."""
    text = _SIGNATURES.sub("", paragraph, count=1).strip("\n")
    if not text.strip():
        return ""
    if _MARKUP.search(text) or text.rstrip().endswith(":"):
        return None
    text = re.sub(r":\w+(?::\w+)?:`~?([^`]+)`", r"`\1`", text)  # :meth:`~io.open` -> `io.open`
    text = re.sub(r"(?<!\*)\*(\w+)\*(?!\*)", r"\1", text)  # *name* -> name
    text = " ".join(text.replace("``", "`").split())
    if len(text.split()) < 4 or not text[0].isalpha():
        return None
    return text if text.rstrip(")\"'`").endswith((".", "!", "?")) else text + "."


def _read_source_docs(library: Path) -> Iterator[_Doc]:
    """Read the docstrings of the public functions and classes in the library's source files."""
    for module in sorted(sys.stdlib_module_names - NOT_READ):
        top = library / f"{module}.py"
        for path in [top] if top.is_file() else sorted((library / module).rglob("*.py")):
            parts = path.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if NOT_READ.isdisjoint(parts) and not any(part.startswith("_") for part in parts):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
                    tree = ast.parse(path.read_bytes())
                yield from _read_body_docs(tree.body, ".".join(parts), in_class=False)


def _read_body_docs(body: list[ast.stmt], prefix: str, *, in_class: bool) -> Iterator[_Doc]:
    for node in body:
        if not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) or node.name.startswith("_"):
            continue
        name, text = f"{prefix}.{node.name}", ast.get_docstring(node, clean=False) or ""
        if isinstance(node, ast.ClassDef):
            yield _Doc(name, name, True, text)
            yield from _read_body_docs(node.body, name, in_class=True)
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if not any("property" in decorator or "." in decorator for decorator in decorators):  # x.setter
            is_bound = in_class and "staticmethod" not in decorators
            arguments = _format_arguments(node.args, drop_first=is_bound)
            yield _Doc(name, _format_call(name, arguments), False, text)


def _format_arguments(arguments: ast.arguments, *, drop_first: bool) -> str:
    """Write arguments as in a call for help: no annotations, no `self`, no `/`."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    names = ast.unparse(arguments).replace(", /", "")
    return names.partition(", ")[2] if drop_first else names


def _read_c_docs() -> Iterator[_Doc]:
    """Read the docstrings of functions, types and methods that are written in C."""
    for module_name in IN_C:
        with contextlib.suppress(ImportError):  # not every build has every module
            module = importlib.import_module(module_name)
            prefix = "" if module is builtins else f"{module_name}."
            for name, value in sorted(vars(module).items()):
                if name.startswith("_") or not _is_home(module_name, name, value):
                    continue  # an alias, or imported from elsewhere
                if inspect.isbuiltin(value):
                    yield _read_function_doc(prefix + name, value)
                elif inspect.isclass(value):
                    yield _Doc(prefix + name, prefix + name, True, inspect.getdoc(value) or "")
                    for method_name, method in sorted(vars(value).items()):
                        if (
                            inspect.ismethoddescriptor(method)
                            and callable(method)
                            and not method_name.startswith("_")
                        ):
                            yield _read_function_doc(f"{prefix}{name}.{method_name}", method)


def _is_home(module: str, name: str, value: object) -> bool:
    """Whether `module.name` is where users find `value`: not an alias, not imported from another module."""
    if not (inspect.isbuiltin(value) or inspect.isclass(value)) or value.__name__ != name:
        return False
    return value.__module__ in (module, f"_{module}") or (
        module == "os" and value.__module__ in ("posix", "nt")
    )


def _read_function_doc(name: str, function: Callable[..., object]) -> _Doc:
    try:
        arguments = str(inspect.signature(function)).partition(" -> ")[0]
    except ValueError:  # this function does not tell its signature
        return _Doc(name, name, False, function.__doc__ or "")
    arguments = re.sub(r"^\((?:self|cls|type)\b(?:, )?", "(", arguments).replace(", /", "").replace("/, ", "")
    return _Doc(name, _format_call(name, arguments[1:-1].removeprefix("/")), False, function.__doc__ or "")


def _format_call(name: str, arguments: str) -> str:
    call = f"{name}({arguments})".replace(str(sys.maxsize), "sys.maxsize")
    return call if len(call) <= LONGEST_CALL and "<" not in call else name
