"""The parts of the site that are made from the code: recipe keys, commands and the public API.

A page asks for one by a comment, such as `<!-- generated: recipe keys -->`, and gets it while the site is
built. The parts are never written to disk, so they cannot fall behind the code.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astroid.manager import AstroidManager
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "lisatune"
MARK = re.compile(r"<!-- generated: ([\w ]+) -->")
PAGES = re.compile(r'<!-- pages(?: "([^"]+)")?: ([^>]+?) -->', flags=re.DOTALL)
FILE = re.compile(r"<!-- file: \.\./([\w.]+) -->")
PICTURE = re.compile(r"^!\[(.*)\]\((?:\.\./)*pictures/([\w-]+)\.svg\)$", flags=re.MULTILINE)
PUBLIC = (
    *("lisa", "nn", "optim", "losses", "data", "models"),
    *("runs", "methods", "evaluate", "memory", "train", "study", "compare", "export"),
)


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the pages in as they are read."""
    AstroidManager.brain["module_denylist"] = AstroidManager().module_denylist = Foreign()
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Foreign(set[str]):
    """Modules that autodoc2 must not read: neither ours nor Python's. Reading torch takes minutes."""

    def __contains__(self, name: object) -> bool:
        """Tell whether a module is neither ours nor of the standard library."""
        return str(name).split(".")[0] not in {"lisatune", "builtins", *sys.stdlib_module_names}


def fill_in(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace each comment by its part, and put pictures into the page so that they take its colours.

    `<!-- pages "Caption": a b -->` becomes a table of contents that only the sidebar shows.
    """
    parts = {"recipe keys": recipe_keys, "commands": commands, "api": api}
    source[0] = FILE.sub(lambda match: _read_from_root(match[1]), source[0])
    text = MARK.sub(lambda match: parts[match[1]](), source[0])
    text = PAGES.sub(lambda match: _toctree(match[1], match[2].split()), text)
    source[0] = PICTURE.sub(lambda match: _picture(match[1], match[2]), text)


def _toctree(caption: str | None, pages: list[str]) -> str:
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    return f"```{{toctree}}\n{options}\n" + "\n".join(pages) + "\n```\n"


def _read_from_root(name: str) -> str:
    """Read a page that lies beside docs/, with its links as seen from docs/."""
    text = (DOCS.parent / name).read_text(encoding="utf-8")
    return re.sub(r"\]\((docs/)?(?!http|#)", lambda match: "](" if match[1] else "](../", text)


def _picture(words: str, name: str) -> str:
    svg = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace('color="#767d86"', "", 1)
    return f'<div class="chart" role="img" aria-label="{words}">\n{svg}\n</div>'


def recipe_keys() -> str:
    """Write a table of keys for each section of a recipe and each method."""
    from lisatune.methods import METHODS
    from lisatune.train.recipe_file import SECTIONS

    text = []
    for name, section in SECTIONS.items():
        if name == "method":
            text.append("## method\n\nThe other keys of this section depend on `method.name`.\n")
            for method, kind in METHODS.items():
                text.append(f"### {method}\n\n`method.name: {method}`: [its page](../methods/{method}.md).\n")
                text.extend(_table(kind))
        else:
            text.append(f"## {name}\n\n{inspect.getdoc(section)}\n")
            text.extend(_table(section))
    return "\n".join(text)


def _table(kind: type) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(kind) if field.init]
    if not fields:
        yield "It has no keys of its own.\n"
        return
    hints, help_texts = typing.get_type_hints(kind), _field_docs(kind)
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for field in fields:
        default = "must be given" if field.default is dataclasses.MISSING else f"`{_yaml(field.default)}`"
        values = _values(hints[field.name]).replace("|", "\\|")
        meaning = " ".join(help_texts.get(field.name, "").split()).replace("|", "\\|")
        yield f"| `{field.name}` | {values} | {default} | {meaning} |"
    yield ""


def _field_docs(kind: type) -> dict[str, str]:
    """Read the docstring under each field, those of base classes first."""
    docs = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = text.value.value
    return docs


def _values(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (types.UnionType, typing.Union):
        return ", ".join("`null`" if part is types.NoneType else _values(part) for part in parts)
    if origin is tuple:
        return f"list of {len(parts)}" if Ellipsis not in parts else "list"
    names = {str: "text", bool: "`true`, `false`", int: "whole number", float: "number"}
    return names.get(hint, "list" if "Sequence" in str(hint) else str(hint))


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def commands() -> str:
    """Write the help of every command."""
    from lisatune.cli.app import build_app

    text = build_app().generate_docs(output_format="markdown")
    text = text[text.index("## lisatune ") :]
    text = re.sub(r"lisatune ((?:\w+ )+?)\1", r"lisatune \1", text)
    text = re.sub(r" ?\*\[default: (?:False|\"\"|None)\]\*", "", text)
    return re.sub(r"\*\*(\w+)\*\*:$", r"**\1**", text, flags=re.MULTILINE)


def api() -> str:
    """Write a section for each package with its public names."""
    own = sorted(_reexported(PACKAGE), key=str.lower)
    names = ", ".join(f"`{name.rsplit('.', 1)[1]}`" for name in own)
    text = [f"`from lisatune import …` has what your own loop needs, with torch alone: {names}.\n"]
    for package in PUBLIC:
        source = ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))
        text.append(f"## lisatune.{package}\n\n{ast.get_docstring(source)}\n")
        seen = set()
        for name in _reexported(PACKAGE / package):
            if name not in seen:
                text.append(f"```{{autodoc2-object}} {name}\n```\n")
            seen.add(name)
    return "\n".join(text)


def _reexported(package: Path) -> list[str]:
    """Read full names of what an `__init__` hands on, and of what it defines."""
    names = []
    prefix = ".".join(["lisatune", *package.relative_to(PACKAGE).parts])
    for node in ast.walk(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lisatune."):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.AnnAssign) and package != PACKAGE:
            names.append(f"{prefix}.{node.target.id}")
    if package.name == "methods":  # the classes of single methods are recipe keys, on a page of their own
        return [name for name in names if name.endswith((".METHODS", ".Method"))]
    return names
