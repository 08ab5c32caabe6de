"""Several sources of training data: their names, how much each gives, and the loss on each.

Every source is prepared, divided and packed on its own, so that a row is of one source and a change of
weights changes no row. `lisatune.data.batches.Order` draws the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lisatune.data.batches import Share
from lisatune.data.examples import Examples
from lisatune.data.rows import Ints, Rows
from lisatune.data.splitting import hold_out
from lisatune.data.store import Prepared
from lisatune.distributed import ranks
from lisatune.losses.causal_lm import IGNORE
from lisatune.recipe import SourceConfig

__all__ = [
    "MixedSource",
    "SourceLosses",
    "describe_sources",
    "divide_limit",
    "find_duplicates",
    "hold_out_of_each",
    "join",
    "name_sources",
    "plan_shares",
]


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture, for a reader."""

    name: str
    num_rows: int
    """Rows of training."""
    num_held_out: int
    """Rows that are held out."""
    passes: float
    """How often an epoch of the mixture reads it."""
    row_share: float
    """Its share of the rows of an epoch, 0 to 1."""
    token_share: float
    """Its share of the tokens of an epoch, 0 to 1."""


def plan_shares(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> tuple[Share, ...]:
    """Plan how many rows of each source an epoch takes.

    By `epochs`, each source gives so many times its rows. By `weight`, an epoch is as short as it can be
    while every source is read at least once: the one with the most rows for its weight exactly once.

    Args:
        sources: with `weight` all of them, or with `epochs`.
        sizes: rows of each source, >= 1.
    """
    if sources[0].weight is None:
        factors = [source.epochs or 1.0 for source in sources]
    else:
        weights = [source.weight or 0.0 for source in sources]
        most = max(size / weight for size, weight in zip(sizes, weights, strict=True))
        factors = [weight * most / size for size, weight in zip(sizes, weights, strict=True)]
    shares = zip(sizes, factors, strict=True)
    return tuple(Share(size, max(1, round(size * factor))) for size, factor in shares)


def name_sources(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """Name sources by the last parts of their paths, as many as are needed to tell them apart."""
    paths = [(*Path(source.path).parts[:-1], Path(source.path).name) for source in sources]
    longest = max(map(len, paths))
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{source.path} ({source.split})" for source in sources)


def join(parts: Sequence[Examples]) -> Examples:
    """Put the examples of several sources one after the other, and add their counts."""
    counts = [each.name for each in fields(Examples) if each.name != "rows"]
    sums = {name: sum(getattr(part, name) for part in parts) for name in counts}
    return Examples(Rows.join([part.rows for part in parts]), **sums)


def hold_out_of_each(
    prompts: Sequence[NDArray[np.bytes_]], names: Sequence[str], share: float, limits: Sequence[int | None]
) -> list[NDArray[np.bool_]]:
    """Hold out a share of each source; a prompt that one holds out is held out of all.

    Args:
        prompts: `hash_prompt` of each record, for each source.
        names: of the sources, for error messages.
        share, limits: as `share` and `most` of `lisatune.data.splitting.hold_out`; a limit for each source.

    Raises:
        ValueError: a source has fewer than two different prompts.
    """
    asked = zip(prompts, names, limits, strict=True)
    found = [hold_out(keys, share, name, most=most) for keys, name, most in asked]
    if len(found) == 1:
        return found
    every = np.concatenate([keys[is_out] for keys, is_out in zip(prompts, found, strict=True)])
    return [np.isin(keys, every) for keys in prompts]


def divide_limit(most: int | None, sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[int | None]:
    """Divide the limit of held-out records among sources as an epoch is; each may hold out one.

    Args:
        most: `data.validation_limit`.
        sources, sizes: as for `plan_shares`.
    """
    if most is None or len(sizes) == 1:
        return [most] * len(sizes)
    shares = plan_shares(sources, sizes)
    total = sum(share.per_epoch for share in shares)
    return [max(1, round(most * share.per_epoch / total)) for share in shares]


def describe_sources(
    sources: Sequence[SourceConfig],
    shares: Sequence[Share],
    train: Sequence[Examples],
    held_out: Sequence[Examples],
) -> tuple[MixedSource, ...]:
    """Say of each source of a mixture what an epoch takes of it.

    Args:
        sources: the sources.
        shares: from `plan_shares`.
        train: examples of each source.
        held_out: the same that are held out; empty if the sources hold out nothing.

    A pair of answers counts as one row.
    """
    per_row = [len(part.rows) // share.num_rows for part, share in zip(train, shares, strict=True)]
    passes = [share.per_epoch / share.num_rows for share in shares]
    tokens = [part.num_tokens * often for part, often in zip(train, passes, strict=True)]
    rows = sum(share.per_epoch for share in shares)
    return tuple(
        MixedSource(
            name=name,
            num_rows=shares[index].num_rows,
            num_held_out=len(held_out[index].rows) // per_row[index] if held_out else 0,
            passes=passes[index],
            row_share=shares[index].per_epoch / rows,
            token_share=tokens[index] / sum(tokens),
        )
        for index, name in enumerate(name_sources(sources))
    )


def find_duplicates(sources: Sequence[Prepared], chosen: Sequence[Ints]) -> list[NDArray[np.bool_]]:
    """Tell which of the chosen records have the tokens of an earlier one, of the same source or another."""
    digests = np.concatenate([source.digests[some] for source, some in zip(sources, chosen, strict=True)])
    is_again = np.ones(len(digests), bool)
    is_again[np.unique(digests, return_index=True)[1]] = False
    return np.split(is_again, np.cumsum([len(some) for some in chosen])[:-1])


class SourceLosses:
    """The mean loss of each source in a step or an evaluation. A loss function calls it for every batch.

    Args:
        names: of the sources, in the order of their numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, batch: Mapping[str, Tensor], sums_B: Tensor) -> None:
        """Note the loss sums of a batch's rows, float [B]. Rows without a source are left out."""
        if "source" in batch:
            counts_B = (batch["labels"][:, 1:] != IGNORE).sum(dim=1)
            self._batches.append((batch["source"], sums_B, counts_B))

    def take(self) -> dict[str, float]:
        """Return the mean loss per token of each source since the last call, over all ranks.

        A source of which there was no token is left out. Every rank must call it.
        """
        totals = torch.zeros(2, len(self.names), dtype=torch.float64)
        for source_B, sums_B, counts_B in self._batches:
            found = torch.stack([sums_B.double().cpu(), counts_B.double().cpu()])
            totals.index_add_(1, source_B.cpu(), found)
        self._batches.clear()
        sums = ranks.sum_over_ranks(*totals.flatten().tolist())
        pairs = zip(self.names, sums, sums[len(self.names) :], strict=False)
        return {name: total / count for name, total, count in pairs if count}
