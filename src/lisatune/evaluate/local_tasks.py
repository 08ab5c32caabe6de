"""Point the harness's own task definitions at local files, so that a benchmark needs no network.

A folder of data has a folder for each task, with files `test*`, `dev*`, `validation*` and `train*`, each
.jsonl or .jsonl.gz. A group of tasks has one folder too: its files are named after its tasks
(`aqua-rat.jsonl`), or their rows name their task in a column `subject`. Rows have the columns of the stock
data set, or simpler ones:

    arc_easy, arc_challenge   question, choices (texts), answer (index of the right one)
    pubmedqa                  question, contexts, final_decision
    agieval                   passage, question, options ("(A)…"), label (a letter); answer for agieval_math

Nothing of a definition is copied: a generated YAML includes the stock one and replaces where its data are.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.console import plural

__all__ = ["LocalTask", "check_shots", "write_local_task"]

Row = dict[str, Any]

KINDS = ("train", "validation", "dev", "test")
"""Beginnings of file names, one for each kind of split."""

ENDINGS = (".jsonl", ".jsonl.gz")

PLACE = "\0place"
"""Key of a row's file and line, for messages; it is not written."""


@dataclass
class LocalTask:
    """What was written for a task or a group."""

    notes: list[str] = field(default_factory=list)
    """Differences from the stock task, as sentences without a full stop."""

    sha256: str = ""
    """Hash of all rows."""


def write_local_task(
    name: str,
    definitions: dict[str, Path],
    data: Path,
    where: Path,
    *,
    shots: int | None,
    group: Row | None = None,
) -> LocalTask:
    """Write definitions and rows of a task, or of each task of a group that has rows.

    Args:
        name: the task as the user names it, which is the name of its folder.
        definitions: stock YAML files by the tasks' names in the harness.
        data: the folder of data.
        where: an empty place for the generated files; `TaskManager(include_path=where)` finds them.
        shots: examples that will stand before each question; None if that is the definition's choice.
        group: settings of the group that the tasks form; None for a single task.

    Raises:
        FileNotFoundError: the folder or a file that the task needs is missing.
        ValueError: a row is not JSON or lacks a column, or a task cannot show examples.
    """
    is_group = group is not None
    folder = _find_folder(name, next(iter(definitions)) if group is None else group["group"], data)
    written, digest = LocalTask(), hashlib.sha256()
    own = _find_files(folder)
    by_subject = _divide_by_subject(own) if is_group else {}
    present = []
    for leaf, stock in sorted(definitions.items()):
        inner = next((folder / each for each in (leaf, _short(leaf)) if (folder / each).is_dir()), None)
        if not is_group:
            rows = _read_kinds(own)
        elif inner is not None:
            rows = _read_kinds(_find_files(inner))
        elif file := _find_named(folder, leaf):
            rows = {"test": list(_read(file))}
        else:
            rows = by_subject.get(_short(leaf), {})
        if rows:
            present.append(leaf)
            note = _write_leaf(leaf, stock, rows, inner or folder, where / leaf, shots, digest)
            written.notes += [note] if note and note not in written.notes else []
    if not present:
        raise FileNotFoundError(
            f"{folder} has no rows of {name}; it needs files test*, dev*, validation* or train*, or files "
            f"named after its tasks such as {_short(min(definitions))}, each .jsonl or .jsonl.gz"
        )
    if group is not None:
        text = json.dumps(group | {"task": present})
        (where / "group.yaml").write_text(text, encoding="utf-8")  # JSON is YAML
        if len(present) < len(definitions):
            which = f": {', '.join(map(_short, present))}" if len(present) < 8 else ""
            written.notes.append(f"{len(present)} of {plural(len(definitions), 'task')}{which}")
    written.sha256 = digest.hexdigest()
    return written


def check_shots(leaf: str, definition: Row, shots: int) -> None:
    """Refuse examples that the harness would not show, and those that would give answers away.

    Args:
        leaf: the task.
        definition: its definition.
        shots: examples that are asked for, before each question, >= 1.

    Raises:
        ValueError: the definition says 0 examples, and the harness keeps to that; the task scores texts and
            asks nothing; or its only rows are its questions, and the harness would show the asked one too.
    """
    pools = ("training_split", "validation_split", "fewshot_split")
    fewshot = definition.get("fewshot_config") or {}
    if definition.get("num_fewshot") == 0:
        reason = "is defined without examples, and the harness keeps to that"
    elif definition.get("output_type") == "loglikelihood_rolling":
        reason = "scores texts that have no question"
    elif not any(map(definition.get, pools)) and not any(map(fewshot.get, ("split", "samples"))):
        reason = "has no rows for examples beside its questions"
    else:
        return
    raise ValueError(
        f"task {leaf} {reason}, so it cannot be asked with {plural(shots, 'example')}; "
        "leave shots out for this task, or set it to 0"
    )


def _find_folder(name: str, own: str, data: Path) -> Path:
    """Find the folder of a task by the user's name, or by that of the harness."""
    for each in (name, own):
        if (data / each).is_dir():
            return data / each
    there = sorted(entry.name for entry in data.iterdir() if entry.is_dir())
    raise FileNotFoundError(
        f"there are no data for task {name}: {data} has no folder {name} "
        f"(it has {', '.join(there) or 'no folder'})"
    )


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """List the files of each kind of split."""
    files = [file for file in sorted(folder.iterdir()) if file.name.endswith(ENDINGS)]
    kinds = {kind: [file for file in files if file.name.startswith(kind)] for kind in KINDS}
    kinds["validation"] += [file for file in files if file.name.startswith(("val.", "val_", "valid."))]
    return kinds


def _find_named(folder: Path, leaf: str) -> Path | None:
    """Find a file that is named after a task: `aqua-rat.jsonl.gz` for `agieval_aqua_rat`."""
    for file in sorted(folder.iterdir()):
        if file.name.endswith(ENDINGS) and _plain(file.name.partition(".jsonl")[0]) in (leaf, _short(leaf)):
            return file
    return None


def _short(leaf: str) -> str:
    """Return a task's name without that of its group: aqua_rat for agieval_aqua_rat."""
    return leaf.partition("_")[2] or leaf


def _plain(text: str) -> str:
    return text.strip().lower().replace("-", "_").replace(" ", "_")


def _divide_by_subject(found: dict[str, list[Path]]) -> dict[str, dict[str, list[Row]]]:
    """Sort the rows of all files by their column `subject`, then by kind of split."""
    divided: dict[str, dict[str, list[Row]]] = {}
    for kind, files in found.items():
        for row in _read_all(files):
            divided.setdefault(_plain(str(row.get("subject"))), {}).setdefault(kind, []).append(row)
    return divided


def _read_kinds(found: dict[str, list[Path]]) -> dict[str, list[Row]]:
    return {kind: list(_read_all(files)) for kind, files in found.items() if files}


def _read_all(files: list[Path]) -> Iterator[Row]:
    for file in files:
        yield from _read(file)


def _read(file: Path) -> Iterator[Row]:
    """Read the rows of a file; each gets the place that it is from under the key PLACE."""
    open_text = gzip.open if file.suffix == ".gz" else open
    with open_text(file, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("it is not a JSON object")
                    yield row | {PLACE: f"{file}:{number}"}
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}); it must hold one JSON object per line"
            ) from None


def _write_leaf(
    leaf: str,
    stock: Path,
    rows: dict[str, list[Row]],
    folder: Path,
    where: Path,
    shots: int | None,
    digest: Any,
) -> str | None:
    """Write the rows of a task, and the YAML that includes its stock definition.

    Returns:
        What differs from the stock task; None if nothing does.
    """
    from lm_eval.tasks._yaml_loader import load_yaml  # the only reader that knows `!function`

    config = load_yaml(stock, resolve_func=False)
    if shots:
        check_shots(leaf, config, shots)
    splits = {
        f"{key}_split": config.get(f"{key}_split") for key in ("training", "validation", "test", "fewshot")
    }
    has_samples = "samples" in (config.get("fewshot_config") or {})
    sources, note = _match_splits(leaf, splits, has_samples, rows, folder, shots)
    where.mkdir(parents=True)
    data_files = {}
    for split, kind in sources.items():
        if kind in rows:
            lines = [json.dumps(_convert(leaf, row), ensure_ascii=False) for row in rows[kind]]
            digest.update("\n".join((leaf, split, *lines)).encode())
            data_files[split] = str(where / f"{split}.jsonl")
            Path(data_files[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    generated: Row = {
        "include": str(stock),
        "task": leaf,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(where / "cache")},
    }
    generated |= {key: None for key, split in splits.items() if split and split not in data_files}
    (where / f"{leaf}.yaml").write_text(json.dumps(generated), encoding="utf-8")  # JSON is YAML
    return note


def _match_splits(
    leaf: str,
    splits: dict[str, Any],
    has_samples: bool,
    rows: dict[str, list[Row]],
    folder: Path,
    shots: int | None,
) -> tuple[dict[str, str], str | None]:
    """Say which kind of rows each split of a task takes.

    Args:
        leaf: the task.
        splits: the names that its stock definition gives the splits, by key.
        has_samples: whether that definition holds its examples itself.
        rows: what there is, by kind.
        folder: where it was found, for the message.
        shots: examples before each question; None: the task's own number.

    Returns:
        The kind by name of split, and what differs from the stock task; None if nothing does.

    Raises:
        FileNotFoundError: rows that the task needs are missing.
    """
    kinds = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    sources = {split: kinds[key] for key, split in splits.items() if key in kinds and split}
    examples = splits["fewshot_split"]
    if examples and examples not in sources:
        sources[examples] = "dev"
    for split, kind in sources.items():
        if kind == "validation" and kind not in rows and "dev" not in sources.values():
            sources[split] = "dev"  # WinoGrande and others call it so
    asked = splits["test_split"] or splits["validation_split"]
    lacking = sources[asked] if asked and sources[asked] not in rows else None
    has_examples = examples is None or sources[examples] in rows
    note = None
    if shots and examples is None and not has_samples and "train" not in rows:
        others = {sources[split] for split in sources if split != asked} & rows.keys()
        # The harness leaves out the question itself.
        has_examples = bool(others) or splits["test_split"] is None
        note = f"examples from {(others or {sources[asked]}).pop()}*, because there is no train*"
    if lacking is None and shots != 0 and not has_examples:
        lacking = sources[examples] if examples else "train"
    if lacking is not None:
        have = ", ".join(f"{kind}*" for kind in sorted(rows))
        way_out = "" if asked is None or lacking == sources[asked] else ", or set shots to 0"
        raise FileNotFoundError(
            f"task {leaf} needs {lacking}*, and {folder} has only {have}; add a file {lacking}.jsonl{way_out}"
        )
    return sources, note


def _convert(leaf: str, row: Row) -> Row:
    """Give a row the columns of the stock data set.

    Raises:
        ValueError: a column is missing or holds something else.
    """
    place = row.pop(PLACE)
    convert, needed = next(
        (known for start, known in COLUMNS.items() if leaf.startswith(start)), (lambda row: row, "")
    )
    try:
        return {key: value for key, value in convert(row).items() if key in needed.split() or not needed}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: a row of {leaf} does not have what the task needs ({type(error).__name__}: {error}); "
            f"it needs {needed.replace(' ', ', ')}, or the simple columns of docs/evaluate.md, and has "
            f"{', '.join(row)}"
        ) from None


def _check_answer(row: Row, key: str, answers: Sequence[Any]) -> Any:
    """Return the right answer. One that is none of the answers would count as wrong, without a word."""
    if isinstance(row[key], bool) or row[key] not in answers:
        raise ValueError(f"{key} is {row[key]!r} and must be one of {', '.join(map(repr, answers))}")
    return row[key]


def _convert_arc(row: Row) -> Row:
    if isinstance(row["choices"], dict):
        _check_answer(row, "answerKey", row["choices"]["label"])
        return _require(row, "question choices answerKey")
    texts: list[str] = row["choices"]
    labels = list("ABCDEFGH"[: len(texts)])
    choices = {"text": texts, "label": labels}
    return {
        "question": row["question"],
        "choices": choices,
        "answerKey": labels[_check_answer(row, "answer", range(len(labels)))],
    }


def _convert_mmlu(row: Row) -> Row:
    _check_answer(row, "answer", [*range(len(row["choices"])), *"ABCD"])
    return _require(row, "question choices answer")


def _convert_winogrande(row: Row) -> Row:
    _check_answer(row, "answer", ["1", "2"])
    if "_" not in row["sentence"]:
        raise ValueError("sentence has no _")
    return _require(row, "sentence option1 option2 answer")


def _convert_pubmedqa(row: Row) -> Row:
    _check_answer(row, "final_decision", ["yes", "no", "maybe"])
    if "CONTEXTS" in row:
        return _require(row, "CONTEXTS QUESTION final_decision")
    decision = row["final_decision"]
    return {"CONTEXTS": row["contexts"], "QUESTION": row["question"], "final_decision": decision}


def _convert_agieval(row: Row) -> Row:
    """Build the prompt of AGIEval's zero-shot setting (ruixiangcui/AGIEval, src/dataset_loader.py)."""
    if "query" in row:
        return row
    start = f"{row.get('passage') or ''}Q: {row['question']}"
    if not row.get("options"):
        return {"query": f"{start}\nA: The answer is", "answer": row["answer"]}
    options: list[str] = row["options"]
    letters = "ABCDEFG"[: len(options)]
    last = letters[-1]
    query = f"{start} Answer Choices: {' '.join(options)}\nA: Among A through {last}, the answer is"
    return {
        "query": query,
        "choices": options,
        "gold": [letters.index(_check_answer(row, "label", [*letters]))],
    }


def _require(row: Row, columns: str) -> Row:
    return {column: row[column] for column in columns.split()}


COLUMNS: dict[str, tuple[Callable[[Row], Row], str]] = {
    "arc_": (_convert_arc, "question choices answerKey"),
    "pubmedqa": (_convert_pubmedqa, "CONTEXTS QUESTION final_decision"),
    "agieval_": (_convert_agieval, ""),
    "mmlu_": (_convert_mmlu, "question choices answer"),
    "winogrande": (_convert_winogrande, "sentence option1 option2 answer"),
    "gsm8k": (lambda row: _require(row, "question answer"), "question answer"),
}
"""For the beginnings of tasks' names: how simple rows become stock ones, and the stock columns."""
