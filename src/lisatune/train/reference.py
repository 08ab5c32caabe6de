"""What the model says of every answer before training, for losses that compare with it.

The log-probabilities are computed once, before the first step, and kept in `RUN/reference`. A resumed run
reads them from there, because its model has been trained since.
"""

import math
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lisatune.data.batches import my_share
from lisatune.distributed import ranks
from lisatune.distributed.shards import reshard
from lisatune.files.disk import sha256_of, write_aside
from lisatune.losses.causal_lm import evaluation_mode
from lisatune.losses.dpo import DPOLoss
from lisatune.runs.folder import NEW_FOLDER
from lisatune.train.assemble import Parts
from lisatune.train.progress import Bar

__all__ = ["attach_reference"]

FILE, NAME = "log_probs.safetensors", "log_probs"


def attach_reference(parts: Parts, folder: Path, hash_before: str | None, bar: Bar) -> str:
    """Give the loss its reference, if it has one: compute and save it, or read what the run has saved.

    Args:
        parts: the run; its model is as before the first step, unless the run is resumed.
        folder: the run's folder `reference`.
        hash_before: the hash that this function returned when the run began; None for a new run.
        bar: shows how far the computation is.

    Returns:
        Hash of the saved file, for the run's checkpoints; empty if the loss has no reference.

    Raises:
        ValueError: the file of a resumed run is gone or has changed.
        OSError: the file could not be written.
    """
    from safetensors.torch import load_file, save_file

    loss, file = parts.built.step.loss, folder / FILE
    if not isinstance(loss, DPOLoss):
        return ""
    if hash_before is None:
        log_probs = _compute(parts, loss, bar)

        def write() -> None:
            with write_aside(folder) as aside:
                save_file({NAME: log_probs}, aside / FILE)

        ranks.on_rank0(write)
    now = ""
    with suppress(OSError):
        now = sha256_of(file)
    if hash_before not in (None, now):
        raise ValueError(
            f"{file} is {'gone' if not now else 'not the one'} that the run began with, and the model before "
            f"training cannot be asked again; put the file back, or {NEW_FOLDER}"
        )
    loss.reference = load_file(file)[NAME].to(parts.device)
    return now


@torch.no_grad()
def _compute(parts: Parts, loss: DPOLoss, bar: Bar) -> Tensor:
    """Compute the log-probability of every row of the run, float32 [rows] on the CPU."""
    data, size, step = parts.data, parts.recipe.run.batch_size, parts.built.step
    num_rows = len(data.train.rows) + len(data.validation.rows)
    log_probs = torch.zeros(num_rows)
    with (
        evaluation_mode(step.model),
        torch.autocast(parts.device.type, dtype=step.autocast, enabled=step.autocast is not None),
        bar.follow("reference", math.ceil(num_rows / (2 * size))) as advance,
    ):
        for some in chain(data.by_length(data.train, size), data.by_length(data.validation, size)):
            batch = parts.collate(my_share(some, data.rows_per_record))
            found = loss.log_probs({name: each.to(parts.device) for name, each in batch.items()})
            log_probs[batch["number"]] = found.float().cpu()  # zeros for a row without loss
            advance()
    reshard(step.model)
    return torch.tensor(ranks.sum_over_ranks(*log_probs.tolist()))
