"""Docstrings in Google's style, with Markdown inside: a parser that docutils finds by its module's name."""

import re

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser


class Parser(MystParser):
    """Docstrings in Google's style, with Markdown inside."""

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Write sections such as `Args:` as lists, then read all as Markdown."""
        super().parse(markdown(inputstring), document)


SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example|Reference|Shapes|Symbols):\s*")


def markdown(docstring: str) -> str:
    r"""Turn a Google-style docstring into Markdown.

    >>> print(markdown("Add.\n\nArgs:\n    a: the first,\n        at least 0.\n    b: the second."))
    Add.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `a`: the first, at least 0.
    - `b`: the second.
    """
    out: list[str] = []
    section, code = "", False
    for line in docstring.expandtabs().splitlines():
        if match := SECTION.fullmatch(line.rstrip()):
            out += ["```"] if code else []
            section, code = match[1], False
            out += ["", f"**{section}**", ""]
        elif not section:
            out.append(line)
        elif line and not line.startswith(" "):
            out += ["```"] if code else []
            section, code = "", False
            out += ["", line]
        elif section == "Example":
            if not code and line.strip():
                out.append("```python")
                code = True
            out.append(line[4:])
        elif item := re.match(r"    (\*{0,2}\w[\w, *]*): (.*)", line):
            out.append(f"- `{item[1]}`: {item[2]}")
        elif line.startswith("        ") and out[-1].startswith("- "):
            out[-1] += f" {line.strip()}"
        else:
            out.append(line[4:])
    out += ["```"] if code else []
    return "\n".join(out)
