"""The content of a report, and its HTML file: without scripts, loading nothing, with every text escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lisatune.files.disk import explain_write_errors, replace_file
from lisatune.report.figures import Entry, Figure, Table

__all__ = ["Page", "Sample", "group_samples", "render", "write_page"]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its answers before and after training."""

    prompt: str
    reference: str
    before: list[tuple[str, str]]
    """Name and answer before training. Equal answers are listed once."""
    after: list[tuple[str, str]]
    """Name and answer after training."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything on a page."""

    title: str
    made: str
    intro: Sequence[str]
    problems: Sequence[str]
    """Warnings: what is missing, and what a reader must know."""
    overview: Table
    overview_note: str
    tables: Sequence[tuple[str, Table]]
    figures: Sequence[Figure]
    samples: Sequence[Sample]
    texts: Sequence[tuple[str, str]]
    """Recipes, commands and environments to repeat the runs, each with a title."""


def group_samples(entries: Sequence[Entry]) -> list[Sample]:
    """Group the answers of all entries by prompt."""
    samples: dict[tuple[str, str], Sample] = {}
    for entry in entries:
        for answers in entry.samples:
            prompt, reference = answers.get("prompt", ""), answers.get("reference", "")
            sample = samples.setdefault((prompt, reference), Sample(prompt, reference, [], []))
            before = answers.get("before", "")
            if before not in [text for _, text in sample.before]:
                sample.before.append((entry.name, before))
            sample.after.append((entry.name, answers.get("after", "")))
    return list(samples.values())


def render(page: Page) -> str:
    """Render the page as HTML.

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
    return text.encode("utf-8", errors="replace").decode()  # lone surrogates, which JSON may contain


def write_page(page: Page, path: Path) -> None:
    """Write the page to a file, which appears complete or not at all, and make its folder.

    Raises:
        ImportError: Jinja2 is missing.
        OSError: the file cannot be written.
    """
    text = render(page)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
