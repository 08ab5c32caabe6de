"""Outline a run before its first step.

`check` makes the outline from a model without weights, `train` from the real one. Both use the same function,
so `lisatune train` does what `lisatune check` says.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import nn

from lisatune.console import count_text, grid, plural, ranges_text, terminal
from lisatune.data.mixture import MixedSource
from lisatune.data.prepare import RunData
from lisatune.data.shown import MarkedText, show_loss
from lisatune.lisa.correction import count_trainable
from lisatune.lisa.schedule import BlockSchedule
from lisatune.methods import Method
from lisatune.nn.layers import LayerMap
from lisatune.recipe import Recipe
from lisatune.train.schedule import describe_schedule

__all__ = ["Outline", "make_outline", "print_outline"]


EXAMPLE_CHARACTERS = 100
"""Characters of each part of the example that are shown."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The facts of a run. Counts of parameters are elements, a tied one counted once."""

    model: str
    method: str
    num_parameters: int
    num_blocks: int
    end_parameters: int
    block_parameters: int
    """All blocks together."""
    frozen_parameters: int
    """Parameters that never train, such as a vision tower's."""
    is_tied: bool
    """Whether embedding and head are one parameter."""
    trainable: int
    """Parameters that train in the first period."""
    active_blocks: tuple[int, ...] | None
    """Blocks or units of the first period; None if the method draws none."""
    word: str
    """What `active_blocks` and `visits` count: block or unit."""
    steps: int
    start_step: int
    """Steps done before, if the run is resumed."""
    period: int | None
    """Steps between two draws; None if the method draws no blocks."""
    visits: tuple[int, ...]
    """Number of periods in which each block will have trained by the end; empty without draws."""
    visits_are_exact: bool
    """Whether `visits` is known; False if it is simulated, because draws depend on measured statistics."""
    batch: str
    lr: str
    records: str
    """The kind of the training records, the template that writes them, and what is learned."""
    row_word: str
    """What `train_rows` and `validation_rows` count: row or pair."""
    train_rows: int
    train_tokens: int
    loss_tokens: int
    """Training tokens that carry loss; for a reward model the last one of each answer."""
    num_cut: int
    """Training records cut at max_length."""
    num_split: int
    """Training records divided into rows of max_length."""
    num_dropped: int
    """Training records left out because they are longer than max_length."""
    lost_share: float
    """Share of the records' tokens that does not train, because records were cut or left out; 0 to 1."""
    num_without_loss: int
    """Training records dropped because the cut left no answer."""
    skipped: int
    """Records left out because they cannot be used."""
    num_media: int
    """Records whose images, sound or videos are left out."""
    duplicates: int
    """Training records that are equal to an earlier one."""
    deduplicates: bool
    """Whether these are left out."""
    validation_rows: int
    validation_limit: int | None
    """The most held-out rows that the recipe allows; None: no limit."""
    validation_tokens: int
    lacks_samples: bool
    """Whether no sample is written, although `run.samples` is not 0: a reward model writes no text."""
    sources: tuple[MixedSource, ...]
    """Of a mixture."""
    shards: int
    """Of a stream, whose first window is what `train_rows` and the counts after it are of; else 0."""
    example: MarkedText
    """The text of the first training row, in parts with and without loss."""
    device: str
    blocks: str
    """Whether the blocks are compiled, and why; empty if nobody would ask."""
    output: str


def make_outline(
    recipe: Recipe,
    model: nn.Module,
    layers: LayerMap,
    schedule: BlockSchedule,
    data: RunData,
    *,
    device: str,
    start_step: int = 0,
    blocks: str = "",
) -> Outline:
    """Collect the facts of a run.

    Args:
        recipe: the recipe.
        model: after `method.attach`, so that frozen parameters are frozen; it may be on the meta device.
        layers: its blocks and ends.
        schedule: what `method.attach` returned.
        data: from `prepare_data`.
        device: where it will run.
        start_step: steps done before, if the run is resumed.
        blocks: whether they are compiled, and why; shown if it is not empty.
    """
    run = recipe.run
    factors = {schedule.lr_factor(index) for index in range((schedule.layers or layers).num_blocks)}
    word = "row" if data.rows_per_record == 1 else "pair"
    rows = plural(run.batch_size, word) if word == "pair" else f"{run.batch_size} rows"
    per_epoch = sum(share.per_epoch for share in data.order.shares)
    if data.stream is None and per_epoch < data.order.batch_size:
        rows = f"{plural(per_epoch, word)}, all that an epoch has,"
    rows = rows if run.accumulation == 1 else f"{run.accumulation} × {rows}"
    return Outline(
        model=recipe.model.name,
        method=_method_text(recipe.method),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_blocks=layers.num_blocks,
        end_parameters=sum(p.numel() for p in layers.end_parameters(model).values()),
        block_parameters=sum(p.numel() for block in layers.block_parameters(model) for p in block.values()),
        frozen_parameters=sum(p.numel() for p in layers.frozen_parameters(model).values()),
        is_tied=layers.is_tied,
        trainable=count_trainable(model) - schedule.idle_row_numbers,
        active_blocks=schedule.active_blocks,
        word=schedule.word,
        steps=data.steps,
        start_step=start_step,
        period=schedule.period,
        visits=schedule.planned_visits(data.steps),
        visits_are_exact=schedule.coverage_is_exact,
        batch=f"{rows} of up to {recipe.data.max_length:,} tokens",
        lr=f"{_lr_text(recipe, factors)}, {describe_schedule(recipe.optimizer, data.steps)}",
        records=data.records,
        row_word=word,
        train_rows=len(data.train.rows) // data.rows_per_record,
        train_tokens=data.train.num_tokens,
        loss_tokens=len(data.train.rows) if recipe.loss.has_score else data.train.num_loss_tokens,
        num_cut=data.train.num_cut,
        num_split=data.train.num_split,
        num_dropped=data.train.num_dropped,
        lost_share=data.train.lost_share,
        num_without_loss=data.train.num_without_loss,
        skipped=data.skipped,
        num_media=data.num_media,
        duplicates=data.duplicates,
        deduplicates=recipe.data.deduplicate,
        validation_rows=len(data.validation.rows) // data.rows_per_record,
        validation_limit=recipe.data.validation_limit,
        validation_tokens=data.validation.num_tokens,
        lacks_samples=recipe.loss.has_score and run.samples > 0,
        sources=data.sources,
        shards=0 if data.stream is None else len(data.stream.shards),
        example=data.mark(0),
        device=f"{device}, {run.precision}",
        blocks=blocks,
        output=str(run.output),
    )


def _lr_text(recipe: Recipe, lr_factors: Collection[float]) -> str:
    """Return the learning rate, and in brackets the rates of blocks and ends that differ from it.

    Args:
        recipe: the recipe.
        lr_factors: what the rate of a block is multiplied by in a step, for each block.
    """
    lr, ends_lr = recipe.optimizer.lr, recipe.optimizer.ends_lr
    factors = sorted(lr_factors)
    own = []
    if factors != [1.0]:
        extremes = [factors[0], factors[-1]][: len(factors)]
        own.append("blocks " + " to ".join(f"{lr * factor:.3g}" for factor in extremes))
    if ends_lr is not None:
        own.append(f"ends {ends_lr:g}")
    return f"{lr:g}" + (f" ({', '.join(own)})" if own else "")


def print_outline(outline: Outline, console: Console | None = None) -> None:
    """Print the table at the start of a run."""
    console = console or terminal()
    kinds = [f"ends {count_text(outline.end_parameters)}{' (embedding = head)' if outline.is_tied else ''}"]
    kinds.append(f"{outline.num_blocks} blocks {count_text(outline.block_parameters)}")
    kinds += [f"never trained {count_text(outline.frozen_parameters)}"] if outline.frozen_parameters else []
    share = outline.trainable / outline.num_parameters
    trains = f"{count_text(outline.trainable)} parameters at a time, {share:.1%}"
    trains += (
        "" if outline.active_blocks is None else f"; now {outline.word}s {ranges_text(outline.active_blocks)}"
    )
    periods = (
        f" in {plural(math.ceil(outline.steps / outline.period), 'period')} of {outline.period}"
        if outline.period
        else ""
    )
    steps = f"{outline.steps:,}{periods}" + (
        f", {outline.start_step:,} done already" if outline.start_step else ""
    )
    rows: list[tuple[str, str | Text]] = [
        ("model", f"{outline.model}, {count_text(outline.num_parameters)} parameters: {' + '.join(kinds)}"),
        ("method", outline.method),
        ("trains", trains),
        ("steps", f"{steps}; each {outline.batch}"),
    ]
    if outline.visits:
        low, high = min(outline.visits), max(outline.visits)
        often = f"{plural(low, 'period')}" if low == high else f"{low} to {plural(high, 'period')}"
        note = "" if outline.visits_are_exact else " (simulated)"
        rows.append(("visits", f"{_bars(outline.visits)} each {outline.word} trains in {often}{note}"))
    tokens = f"{count_text(outline.train_tokens)} tokens, {count_text(outline.loss_tokens)} with loss"
    rows += [
        ("lr", outline.lr),
        ("records", outline.records),
        (
            "window" if outline.shards else "data",
            "; ".join([f"{plural(outline.train_rows, outline.row_word)}, {tokens}", *_list_changes(outline)]),
        ),
        *(
            [("stream", f"{plural(outline.shards, 'shard')}, read while the run trains")]
            if outline.shards
            else []
        ),
        *([("mixture", _mixture_text(outline))] if outline.sources else []),
        ("example", show_loss(outline.example, most=EXAMPLE_CHARACTERS)),
        ("held out", _held_out_text(outline)),
        *([("samples", "none, because a reward model writes no text")] if outline.lacks_samples else []),
        ("device", outline.device),
        *([("blocks", outline.blocks)] if outline.blocks else []),
        ("output", outline.output),
    ]
    console.print(Panel(grid(rows), title="run", title_align="left", border_style="cyan", box=box.ROUNDED))


def _list_changes(outline: Outline) -> list[str]:
    """Say what of the training records was changed or left out, and of how many."""
    no_loss = "no answer left" if outline.row_word == "row" else "equal answers left"
    duplicates = "left out" if outline.deduplicates else "kept (data.deduplicate)"
    counts = [
        (outline.num_split, f"{outline.num_split:,} split at max_length"),
        (outline.num_cut, f"{outline.num_cut:,} cut at max_length"),
        (outline.num_dropped, f"{outline.num_dropped:,} dropped: longer than max_length"),
        (outline.num_without_loss, f"{outline.num_without_loss:,} dropped: {no_loss}"),
        (outline.skipped, f"{outline.skipped:,} skipped: not usable"),
        (outline.num_media, f"{outline.num_media:,} without images, sound or videos"),
        (outline.duplicates, f"{plural(outline.duplicates, 'duplicate')} {duplicates}"),
        (outline.lost_share, f"{outline.lost_share:.1%} of tokens lost"),
    ]
    return [text for count, text in counts if count]


def _mixture_text(outline: Outline) -> str:
    """Say what an epoch takes of each source, a line for each."""
    return "\n".join(
        f"{source.name}: {source.row_share:.1%} of {outline.row_word}s, {source.token_share:.1%} of tokens; "
        f"{plural(source.num_rows, outline.row_word)}, read {source.passes:.3g} × in an epoch"
        for source in outline.sources
    )


def _held_out_text(outline: Outline) -> str:
    """Say how much is held out, and whether `data.validation_limit` is why it is no more."""
    if not outline.validation_rows:
        return "nothing, so nothing is evaluated (data.validation_share: 0)"
    is_limited = outline.validation_rows == outline.validation_limit
    limit = " (data.validation_limit)" if is_limited else ""
    rows = plural(outline.validation_rows, outline.row_word)
    return f"{rows}{limit}, {count_text(outline.validation_tokens)} tokens"


def _method_text(method: Method) -> str:
    """Name a method, with the settings that differ from their defaults."""
    assert dataclasses.is_dataclass(method)
    changed = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            text = value
            if isinstance(value, tuple):
                is_named = all(isinstance(each, str) for each in value)
                text = " ".join(value) if is_named else f"{len(value)} numbers"
            changed.append(f"{field.name} {text}")
    return ", ".join([method.name, *changed])


def _bars(counts: Sequence[int]) -> str:
    """Draw counts as a row of bars, one for each block; a dot is zero."""
    most = max(counts)
    return "".join("▁▂▃▄▅▆▇█"[math.ceil(8 * count / most) - 1] if count else "·" for count in counts)
