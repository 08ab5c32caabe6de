"""One HTML file from what was gathered: no script, nothing loaded, every text escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lisatune.files.disk import replace_file
from lisatune.report.figures import Entry, Figure, Table

__all__ = ["Page", "Question", "group_samples", "render", "write_page"]


@dataclass(frozen=True)
class Question:
    """A held-out prompt and what was answered to it, before and after."""

    prompt: str
    reference: str
    before: list[tuple[str, str]]
    """Name, and the answer before training; equal ones once."""
    after: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything on a page."""

    title: str
    made: str
    intro: Sequence[str]
    problems: Sequence[str]
    """What is missing or must be known."""
    overview: Table
    overview_note: str
    tables: Sequence[tuple[str, Table]]
    figures: Sequence[Figure]
    samples: Sequence[Question]
    texts: Sequence[tuple[str, str]]
    """Recipes and environments to repeat it, each under a title."""


def group_samples(entries: Sequence[Entry]) -> list[Question]:
    """Put answers to the same prompt side by side."""
    questions: dict[tuple[str, str], Question] = {}
    for entry in entries:
        for sample in entry.samples:
            prompt, reference = sample.get("prompt", ""), sample.get("reference", "")
            question = questions.setdefault((prompt, reference), Question(prompt, reference, [], []))
            before = sample.get("before", "")
            if before not in [text for _, text in question.before]:
                question.before.append((entry.name, before))
            question.after.append((entry.name, sample.get("after", "")))
    return list(questions.values())


def render(page: Page) -> str:
    """Write the page as HTML.

    Raises:
        ImportError: Jinja2 is missing.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(f'{error}; a report needs more packages: pip install "lisatune[report]"') from None
    environment = Environment(
        loader=PackageLoader("lisatune.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("template.html.j2").render(page=page)
    return text.encode("utf-8", errors="replace").decode()  # half characters, as JSON can hold


def write_page(page: Page, path: Path) -> None:
    """Write the page as a file, whole or not at all.

    Raises:
        ImportError: Jinja2 is missing.
        OSError: it can't be written.
    """
    replace_file(path, render(page))
