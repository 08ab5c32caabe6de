"""Pages say what the code says, and read well as they are."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lisatune
import tiny
from lisatune.memory import fit
from lisatune.methods import METHODS
from lisatune.report import charts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
]


def sentences() -> list[str]:
    """Read every text in the source, … in place of values."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_quoted_errors_are_those_of_the_code() -> None:
    quoted = re.findall(
        r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(quoted) > 15
    known = sentences()
    gone = [quote for quote in quoted if not any(quote in re.sub("…+", "…", text) for text in known)]
    assert gone == []


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", lisatune.__version__]


def test_the_tutorial_on_active_blocks_names_all_changes_that_make_room() -> None:
    page = (DOCS / "tutorials" / "choose-active-blocks.md").read_text(encoding="utf-8")
    codes = {f"method.{key}": value for each in fit.FINEST_CODES for key, value in each.items()}
    changes = [fit.EIGHT_BIT[0], fit.BF16[0], fit.STOCHASTIC[0], codes]
    rows = [f"| `{key}={value}` |" for change in changes for key, value in change.items()]
    assert re.findall(r"^\| `\S+=\S+` \|", page, re.MULTILINE) == rows


def test_every_method_has_a_page_and_a_line_in_the_index() -> None:
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert (DOCS / "methods" / f"{name}.md").is_file()
        assert f"]({name}.md)" in index


def test_contributing_prints_the_order_that_the_architecture_test_enforces() -> None:
    text = (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    (order,) = [
        ast.literal_eval(ast.unparse(node.value).replace("*", ""))
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER"
    ]
    words = [name for row in order for name in row]
    printed = re.findall(r"^```\n(distributed .*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert re.findall(r"\w+", re.sub("#.*", "", printed[0])) == words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_end_within_120_columns(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not re.match(r"\s*(\||!\[|<)", line)]
    assert [line for line in lines if len(line) > 120 and " " in line.strip()] == []
    assert [line for line in lines if line.lstrip().startswith("%")] == []  # a comment to the site's parser


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_modules_exist(page: Path) -> None:
    for path in re.findall(
        r"\b(?:src|tests|benchmarks|experiments|examples|recipes)/[\w/.-]+\.\w+", page.read_text()
    ):
        assert "NAME" in path or (ROOT / path).exists(), path
    for name in re.findall(r"`lisatune((?:\.[a-z_]\w*)+)", page.read_text()):
        parts, folder = name.split(".")[1:], ROOT / "src" / "lisatune"
        while parts and (folder / parts[0]).is_dir():
            folder = folder / parts.pop(0)
        if parts:
            source = folder / f"{parts[0]}.py"
            defined = source.is_file() or re.search(rf"\b{parts[0]}\b", (folder / "__init__.py").read_text())
            assert defined, f"lisatune{name}"


def test_the_sampler_on_the_page_of_lisa_draws_by_what_it_reads() -> None:
    page = (ROOT / "docs" / "methods" / "lisa.md").read_text(encoding="utf-8")
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Sampler)" in each)
    names: dict[str, Any] = {"lisatune": lisatune, "torch": torch}
    exec(code, names)  # noqa: S102
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lisa = lisatune.LISA(model, optimizer, sampler=names["LargestGradient"](6, 2), period=2)
    tiny.fit(model, optimizer, 6)
    assert lisa.visits == [1] * 6  # those that have not trained come first


def test_pictures_are_drawn_by_functions_that_exist() -> None:
    names = set(re.findall(r"\bcharts\.(\w+)", (ROOT / "docs" / "pictures.py").read_text(encoding="utf-8")))
    assert names
    assert {name for name in names if not hasattr(charts, name)} == set()
