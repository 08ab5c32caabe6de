"""What a run asks of its model before, during and after training: held-out loss, and answers to prompts."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lisatune.data.batches import my_share
from lisatune.distributed import ranks
from lisatune.evaluate.held_out import generate_answers, held_out_loss
from lisatune.train.assemble import Parts
from lisatune.train.progress import Bar

__all__ = ["StopRequestedError", "answer_samples", "held_out"]


class StopRequestedError(Exception):
    """Raised inside an evaluation when a stop was requested."""


def held_out(
    parts: Parts, bar: Bar, asked_to_stop: Callable[[], object] = lambda: None
) -> tuple[float, dict[str, Any]]:
    """Return the held-out loss per token or pair (NaN if nothing is held out), and more figures by name.

    Raises:
        StopRequestedError: `asked_to_stop` said so between two batches.
    """
    if not parts.recipe.data.holds_out:
        return math.nan, {}
    examples = parts.data.validation
    size = parts.recipe.run.batch_size * ranks.count()

    def batches(advance: Callable[[], None]) -> Iterator[dict[str, Tensor]]:
        for some in parts.data.by_length(examples, size):
            if asked_to_stop():
                raise StopRequestedError
            yield parts.collate(my_share(some, parts.data.rows_per_record))
            advance()

    step = parts.built.step
    if parts.source_losses is not None:
        parts.source_losses.take()  # what a stopped evaluation left
    num_batches = math.ceil(len(examples.rows) / (size * parts.data.rows_per_record))
    with bar.follow("held-out loss", num_batches) as advance:
        found = held_out_loss(step.loss, batches(advance), device=parts.device, autocast=step.autocast)
    more: dict[str, Any] = {f"held_out_{name}": value for name, value in found.more.items()}
    if parts.source_losses is not None and (by_source := parts.source_losses.take()):
        more["held_out_loss_by_source"] = by_source
    return found.loss, more


def answer_samples(parts: Parts) -> list[str]:
    """Let the model answer the held-out prompts of `run.samples`, greedily."""
    prompts = [question.prompt for question in parts.data.questions]
    if not prompts:
        return []
    recipe = parts.recipe
    return generate_answers(
        parts.built.model,
        parts.tokenizer,
        prompts,
        max_new_tokens=recipe.run.sample_tokens,
        date=recipe.data.date,
    )
