"""The results of a comparison as tables: on the terminal, and in results.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lisatune.compare.gains import gain_text
from lisatune.compare.results import ArmResult, EqualTime, Results, Spread
from lisatune.console import byte_text, count_text, plural, terminal
from lisatune.evaluate.scores import is_share
from lisatune.recipe.data import describe_paths

__all__ = ["describe_scores", "format_markdown", "make_equal_time_table", "make_overview", "print_results"]

Column = tuple[str, Callable[[ArmResult], str]]


def make_overview(results: Results) -> tuple[list[str], list[list[str]]]:
    """Make heads and rows of the table of arms. Columns without figures are left out."""
    columns: list[Column] = [
        ("arm", lambda arm: arm["name"]),
        ("lr", lambda arm: _lr_text(arm)),
        ("test loss", lambda arm: _spread_text(arm["test_loss"])),
        ("gain", lambda arm: "" if arm["gain_share"] is None else f"{100 * arm['gain_share']:.0f} %"),
        ("forgetting", lambda arm: _spread_text(arm["forgetting"], "+.4f")),
        *(_score_column(name, is_share(metric)) for name, metric in _list_tasks(results).items()),
        ("peak memory", lambda arm: _mean_text(arm["peak_bytes"], byte_text)),
        ("tensors in a step", lambda arm: _tensors_text(arm)),
        ("trainable", lambda arm: "" if arm["trainable"] is None else count_text(arm["trainable"])),
        ("touched", lambda arm: _mean_text(arm["touched"], count_text)),
        ("to save", lambda arm: "" if arm["delta_bytes"] is None else byte_text(arm["delta_bytes"])),
        ("tokens/s", lambda arm: _mean_text(arm["tokens_per_second"], lambda rate: f"{rate:,.0f}")),
        ("training time", lambda arm: _mean_text(arm["train_seconds"], _seconds_text)),
    ]
    rows = [[cell(arm) for _, cell in columns] for arm in results["arms"]]
    shown = [i for i in range(len(columns)) if i < 3 or any(row[i] for row in rows)]
    return [columns[i][0] for i in shown], [[row[i] for i in shown] for row in rows]


def _list_tasks(results: Results) -> dict[str, str]:
    """List the tasks that some arm or the base has a score of, with its metric. Older results have none."""
    parts = [results["base"], *results["arms"]]
    return {name: score["metric"] for part in parts for name, score in part.get("scores", {}).items()}


def _score_column(task: str, is_percent: bool) -> Column:
    return task + " %" * is_percent, lambda arm: gain_text(arm.get("scores", {}).get(task))


def describe_scores(results: Results) -> str:
    """Say what the columns of benchmark tasks are; empty if there are none."""
    base = results["base"].get("scores", {})
    if not base:
        return ""
    before = ", ".join(f"{name} {gain_text(each)} of {each['items']:,}" for name, each in base.items())
    percent = (
        "in percent"
        if all(is_share(each["metric"]) for each in base.values())
        else "in percent where so marked,"
    )
    return (
        f"Benchmark tasks before training: {before} questions. Scores are {percent} ± standard error over "
        "the questions; in brackets the gain over the base, whose error is of the differences question by "
        "question. Gains below two of their errors are noise."
    )


def make_equal_time_table(times: EqualTime) -> tuple[list[str], list[list[str]]]:
    """Make heads and rows of the table of losses at one training time."""
    losses = times["losses"]
    rows = [[name, "not reached" if loss is None else f"{loss:.4f}"] for name, loss in losses.items()]
    head = f"validation loss after {_seconds_text(times['seconds'])}, the end of {times['reference']}"
    return ["arm", head], rows


def print_results(results: Results, folder: Path) -> None:
    """Print the arms, losses at equal time and warnings. `folder` is the comparison's."""
    console = terminal()
    heads, rows = make_overview(results)
    wide = {"tensors in a step", "trainable", "touched", "to save", "training time"}
    shown = [i for i, head in enumerate(heads) if head not in wide]
    _print_table(console, [heads[i] for i in shown], [[row[i] for i in shown] for row in rows])
    for times in results["equal_time"]:
        _print_table(console, *make_equal_time_table(times))
    if text := describe_scores(results):
        console.print(Text(text), soft_wrap=True)
    for problem in results["problems"]:
        console.print(Text(f"! {problem}", style="yellow"), soft_wrap=True)
    files = [name for name in ("results.md", "results.json", "report.html") if (folder / name).exists()]
    console.print(Text(f"{folder}: {', '.join(files)}"), soft_wrap=True)


def _print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.ROUNDED)
    for head in heads:
        table.add_column(head, justify="left" if head == "arm" else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def format_markdown(results: Results) -> str:
    """Format the results as the text of results.md."""
    data, base = results["data"], results["base"]
    seeds = ", ".join(map(str, results["seeds"]))
    tokens = {run["tokens"] for run in results["runs"] if run["status"] == "done" and run["tokens"]}
    amount = f"{min(tokens):,}" + (f" to {max(tokens):,}" if len(tokens) > 1 else "") if tokens else "no"
    before = "unknown" if base["test_loss"] is None else f"{base['test_loss']:.4f}"
    model, records = results["recipe"]["model"]["name"], describe_paths(results["recipe"]["data"]["train"])
    lines = [
        f"# Comparison {results['name']}",
        "",
        f"{model} on {records}; every run has {amount} tokens of the same records in the same order. "
        f"Seeds {seeds}. Learning rates were chosen by the loss on "
        f"{plural(data['validation'], 'validation record')} with seed {results['seeds'][0]}. The test loss "
        f"is measured on {plural(data['test'], 'other record')}, which only chosen runs read. Before "
        f"training it was {before}.",
        "",
        *_markdown_table(*make_overview(results)),
        "",
        "Mean ± standard deviation over seeds. gain: how far the test loss fell, as a share of "
        f"{results['reference'] or 'the reference'}'s. peak memory: on a CPU of the process, loading "
        "included; else as allocated on the device. tensors in a step: live bytes at the peak of one "
        "separate step, measured. to save: touched tensors, or adapters. Time is that of training steps.",
        *(["", text] if (text := describe_scores(results)) else []),
        "",
        "## Memory of a step",
        "",
        *_list_memory(results),
        "",
        "## Learning rates",
        "",
        *_markdown_table(["arm", "lr", "seed", "validation loss", "test loss", ""], _list_runs(results)),
        "",
        "## At equal wall time",
        "",
        "Interpolated between the runs' evaluations, linear in time. A run whose learning rate had not yet "
        "fallen at that time would have done better if it had been planned to end there.",
        "",
    ]
    for times in results["equal_time"]:
        lines += [*_markdown_table(*make_equal_time_table(times)), ""]
    if results["problems"]:
        lines += ["## Warnings", "", *(f"- {problem}" for problem in results["problems"]), ""]
    return "\n".join(lines)


def _list_memory(results: Results) -> list[str]:
    measured = [arm for arm in results["arms"] if arm["memory"] is not None]
    if not measured:
        return ["Not measured."]
    categories = [name for arm in measured[:1] if arm["memory"] for name in arm["memory"]["at_peak"]]
    rows = []
    for arm in measured:
        memory = arm["memory"]
        assert memory is not None
        sizes = [byte_text(memory["at_peak"].get(name, 0)) for name in categories]
        rows.append([arm["name"], byte_text(memory["peak_bytes"]), memory["phase"], *sizes, memory["how"]])
    return _markdown_table(["arm", "peak", "in", *categories, "how"], rows)


def _list_runs(results: Results) -> list[list[str]]:
    return [
        [
            run["arm"],
            f"{run['lr']:g}",
            str(run["seed"]),
            "" if run["validation_loss"] is None else f"{run['validation_loss']:.4f}",
            "" if run["test_loss"] is None else f"{run['test_loss']:.4f}",
            "chosen" if run["chosen"] and run["status"] == "done" else run["status"],
        ]
        for run in results["runs"]
    ]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(heads)}", *lines[1:]]


def _lr_text(arm: ArmResult) -> str:
    if arm["chosen_lr"] is None:
        return "failed" if arm["reason"] else "–"
    return f"{arm['chosen_lr']:g}" + (" (edge)" if arm["lr_at_edge"] else "")


def _spread_text(spread: Spread | None, form: str = ".4f") -> str:
    if spread is None:
        return ""
    std = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:{form}}{std}"


def _mean_text(spread: Spread | None, text: Callable[[float], str]) -> str:
    return "" if spread is None else text(spread["mean"])


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _tensors_text(arm: ArmResult) -> str:
    return "" if arm["memory"] is None else byte_text(arm["memory"]["peak_bytes"])
