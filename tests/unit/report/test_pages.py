"""report.html of runs and of comparisons, read as HTML, without a browser."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lisatune.cli import app
from lisatune.compare.results import Results
from lisatune.memory.fit import CARD_GB
from lisatune.report import charts
from lisatune.report.comparison_page import make_comparison_page
from lisatune.report.figures import Entry, find_pareto_front, make_figures, mark_best
from lisatune.report.page import group_samples, render
from lisatune.report.run_page import make_runs_page
from lisatune.report.training import make_training_figures
from lisatune.study.movement import measure_movement
from tiny import llama
from tiny_report import HOSTILE, results, write_run

LOADS = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping"}


class Parsed(HTMLParser):
    """What a reader of the page meets: tags with attributes, and text by the innermost tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def alts(self) -> list[str]:
        return [attrs["aria-label"] or "" for _, attrs in self.tags if attrs.get("role") == "img"]


@pytest.fixture
def comparison(tmp_path: Path) -> tuple[Results, Path]:
    values = results()
    (tmp_path / "compare.json").write_text("{}")
    (tmp_path / "results.json").write_text(json.dumps(values))
    for run in values["runs"]:
        write_run(tmp_path / run["folder"])
    return values, tmp_path


def titles(page: Any) -> list[str]:
    return [figure.title for figure in page.figures]


def test_every_figure_of_a_comparison_is_there_with_words_and_a_table(
    comparison: tuple[Results, Path],
) -> None:
    page = make_comparison_page(*comparison)
    assert titles(page) == [
        "Held-out loss against tokens",
        "Held-out loss against wall time",
        "Memory by category",
        "Quality against memory",
        "Active blocks: lisa",
        "Weight movement by block",
    ]
    html = render(page)
    parsed = Parsed(html)
    assert parsed.open == []
    assert len(parsed.alts()) == 6 == sum(tag == "svg" for tag, _ in parsed.tags)
    assert parsed.alts() == [figure.alt for figure in page.figures]
    assert all(figure.table.rows for figure in page.figures)
    assert "full from 3.0000 to 2.0000" in parsed.alts()[0]
    assert "the Pareto front is full, lisa." in parsed.alts()[3]
    assert "3 blocks over 2 periods" in parsed.alts()[4]
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_loads_nothing(comparison: tuple[Results, Path]) -> None:
    html = render(make_comparison_page(*comparison))
    parsed = Parsed(html)
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not LOADS & attrs.keys()
        assert all((value or "").startswith("#") for key, value in attrs.items() if key.endswith("href"))
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_the_same_results_give_the_same_bytes(comparison: tuple[Results, Path]) -> None:
    assert render(make_comparison_page(*comparison)) == render(make_comparison_page(*comparison))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    values = results(HOSTILE)
    page = make_comparison_page(values, tmp_path)
    html = render(page)
    parsed = Parsed(html)
    assert "<script" not in html.lower()
    assert not any(key.startswith("on") for _, attrs in parsed.tags for key in attrs)
    assert parsed.texts.count(HOSTILE) >= 5  # overview, prompt, reference, before, after
    assert any(HOSTILE in alt for alt in parsed.alts())
    assert any("onerror=alert(2)" in text for text in parsed.texts if "model:" in text)  # the recipe


@settings(max_examples=20, deadline=None)
@given(st.text())
def test_any_name_can_be_drawn(name: str) -> None:
    svg = charts.draw_lines([(name, [[(0, 1), (1, 0)]])], x="x", y="y")
    assert "currentColor" in svg
    assert Parsed(svg).open == []


def test_the_best_of_each_column_is_marked_and_no_other(comparison: tuple[Results, Path]) -> None:
    page = make_comparison_page(*comparison)
    marked = {page.overview.heads[column]: page.overview.rows[row][0] for row, column in page.overview.best}
    assert marked["test loss"] == "full"
    assert marked["peak memory"] == marked["tensors in a step"] == marked["tokens/s"] == "lisa"
    assert "trainable" not in marked
    assert render(page).count('<td class="best">') == len(page.overview.best)
    assert mark_best([2.0, None, 1.0, 1.0], min) == [2, 3]
    assert mark_best([2.0, None], min) == []


def test_the_pareto_front_is_what_nothing_beats() -> None:
    assert find_pareto_front([(3, 1.0), (1, 3.0), (2, 2.0), (2, 2.5), (4, 1.0)]) == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]


@pytest.mark.parametrize(
    ("card_bytes", "words"),
    [(None, "All fit a card of 8 GB: the dashed line."), (4 * CARD_GB, "Above the card of 4 GB")],
)
def test_memory_is_held_against_a_card(card_bytes: int | None, words: str) -> None:
    entries = [
        Entry(name="small", memory={"weights": 10**9}),
        Entry(name="large", memory={"loss": 5 * 10**9}),
    ]
    (figure,) = make_figures(entries, loss="", memory_note="", card_bytes=card_bytes)
    assert words in figure.alt
    assert f"card of {4 if card_bytes else 8} GB" in figure.svg
    assert "small" not in figure.note


def test_the_peak_of_a_whole_run_is_not_called_the_tensors_of_a_step() -> None:
    known = Entry(name="known", memory={"weights": 10**9})
    unknown = Entry(name="unknown", peak_bytes=3e9)
    told: dict[str, Any] = {"loss": "loss", "memory_note": "Planned.", "card_bytes": None}
    (alone,) = make_figures([unknown], **told)
    assert alone.alt.startswith("Stacked bars of peak memory of the run: unknown 2.79 GiB")
    assert alone.table.heads[1] == "peak memory of the run"
    (both,) = make_figures([known, unknown], **told)
    assert both.note.startswith("Planned. Undivided, the peak of the whole run: unknown.")
    assert both.table.heads == ["", "weights", "peak memory of the run", "sum"]


def test_equal_answers_before_training_are_shown_once() -> None:
    sample = {"prompt": "p", "reference": "r", "before": "b", "after": "a"}
    entries = [
        Entry(name="x", samples=[sample]),
        Entry(name="y", samples=[sample | {"after": "c"}]),
        Entry(name="z", samples=[sample | {"prompt": "q"}]),
    ]
    first, second = group_samples(entries)
    assert (first.before, first.after) == ([("x", "b")], [("x", "a"), ("y", "c")])
    assert second.after == [("z", "a")]


def test_periods_that_were_not_logged_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", periods=(0, 3))
    (figure,) = [each for each in make_runs_page([folder]).figures if each.title.startswith("Active")]
    assert "2 periods without a logged step" in figure.note


def test_training_is_drawn_from_the_steps_of_each_run_that_have_numbers() -> None:
    lisa = [
        {"step": step, "loss": 3 - step / 1000, "grad_norm": None, "lr": 1e-4, "block_lr": 3e-4}
        for step in range(1, 1001)
    ]
    full = [{"step": 0, "held_out_loss": 3.0}, {"step": 1, "loss": 2.5, "lr": 1e-5, "grad_norm": 1.0}]
    full += [{"step": 2, "loss": 2.25, "lr": 0.0, "grad_norm": 2.0}, {"step": 3, "loss": None}]
    figures = {each.title: each for each in make_training_figures([("lisa", lisa), ("full", full)])}
    assert [row[0] for row in figures["Learning rates"].table.rows] == ["lisa", "lisa, blocks", "full"]
    assert figures["Training loss"].table.rows == [
        ["lisa", "2.999", "2", "2.999", "2"],
        ["full", "2.5", "2.25", "2.5", "2.25"],
    ]
    assert [row[0] for row in figures["Gradient norm"].table.rows] == ["full"]
    assert "averaged to at most 200 points" in figures["Training loss"].note
    assert "averaged" not in figures["Gradient norm"].note
    assert make_training_figures([("half", full[:2])]) == []


def test_movement_is_the_relative_norm_of_the_difference() -> None:
    before, after = llama(blocks=3), llama(blocks=3)
    with torch.no_grad():
        for parameter in after.model.layers[1].parameters():
            parameter *= 1.5
    assert measure_movement(before, after) == pytest.approx([0, 0.5, 0])
    with pytest.raises(ValueError, match="the base model has no"):
        measure_movement(llama(blocks=2), after)


def test_a_run_that_has_not_ended_is_reported_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, whole = write_run(tmp_path / "half"), write_run(tmp_path / "whole")
    (half / "summary.json").unlink()
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (whole / "environment.json").write_text("[")
    output = tmp_path / "new" / "out.html"
    gone = tmp_path / "gone"
    assert app.main(["report", str(half), str(whole), str(gone), "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{output}\n"
    shown = " ".join(Parsed(output.read_text()).texts)
    for words in (
        "half: summary.json is missing; the run has not finished",
        "half: metrics.jsonl has 1 line that cannot be read",
        "half: model is missing; weight movement is left out",
        "whole: environment.json is damaged",
        f"{gone} does not exist",
    ):
        assert words in shown
        assert words in said.err
    assert "not finished, 4 steps logged" in shown


def test_a_comparison_without_its_run_folders_says_so(tmp_path: Path) -> None:
    page = make_comparison_page(results(), tmp_path)
    assert any("runs/lisa/metrics.jsonl is missing" in problem for problem in page.problems)
    assert "Active blocks: lisa" in titles(page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the folder of a run"),
        (["gone"], "nothing to report: gone does not exist"),
        (["run", "run"], "a run is named twice"),
        (["run", "cmp"], "cmp is a comparison; give it alone"),
        (["run", "--gpu", "big"], "--gpu must be an amount of memory"),
        (["run", "--output", "."], "is a folder; name a file"),
        (["cmp"], "there are no results"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / "compare.json").write_text("{}")
    assert app.main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_how_to_get_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert app.main(["report", str(write_run(tmp_path / "run"))]) == 2
    assert 'pip install "lisatune[report]"' in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()
