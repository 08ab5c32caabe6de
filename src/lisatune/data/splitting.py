"""Which records are held out: chosen by a hash of their prompts, so that no question is on both sides."""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lisatune.data.records import Record, Records
from lisatune.data.turns import Messages, find_answer

__all__ = ["hash_prompt", "hold_out", "split_records"]


def split_records(
    records: Records, share: float, seed: int, *, most: int | None = None
) -> tuple[Records, Records]:
    """Hold out a share of the records by their prompts, so that no question is on both sides.

    Records with the same prompt up to case and spacing (for text: the same text) stay together. The different
    prompts are ranked by a hash of (seed, prompt), and the lowest `share` of them is held out. So the split
    does not depend on the order of the records.

    Args:
        records: the records to split.
        share: share of the different prompts to hold out, 0 < share < 1; their number is rounded, but at
            least one is held out and at least one stays.
        seed: names the split; the same seed gives the same split.
        most: hold out at most this many prompts, >= 1; None: no limit.

    Returns:
        The records to train on and the held-out records, each in the order given.

    Raises:
        ValueError: there are fewer than two different prompts.
    """
    keys = np.array([hash_prompt(row, seed) for row in records.rows], dtype="S16")
    is_held_out = hold_out(keys, share, records.source, most=most).tolist()
    train, validation = (
        [row for row, is_out in zip(records.rows, is_held_out, strict=True) if is_out == wanted]
        for wanted in (False, True)
    )
    return replace(records, rows=train), replace(records, rows=validation)


def hold_out(
    keys: NDArray[np.bytes_], share: float, source: str, *, most: int | None = None
) -> NDArray[np.bool_]:
    """Tell which records are held out, by the hashes of their prompts.

    Args:
        keys: `hash_prompt` of each record.
        share, most: as for `split_records`.
        source: name of the data for the error message.

    Raises:
        ValueError: there are fewer than two different prompts.
    """
    ranked = np.unique(keys)
    if len(ranked) < 2:
        raise ValueError(
            f"{source} has 1 different prompt, and holding it out leaves nothing to train on; give "
            "validation data, or set data.validation_share to 0 to evaluate nothing"
        )
    wanted = min(round(share * len(ranked)), len(ranked) if most is None else most)
    num_held_out = min(max(wanted, 1), len(ranked) - 1)
    is_held_out: NDArray[np.bool_] = keys <= ranked[num_held_out - 1]
    return is_held_out


def hash_prompt(row: Record, seed: int) -> bytes:
    """Hash a record's prompt, 16 bytes: equal for prompts that are equal up to case and spacing.

    A pair of answers without a prompt is told from others by its chosen text.
    """
    if "text" in row:
        prompt = row["text"]
    elif "messages" in row:
        prompt = _take_question(row["messages"])
    else:
        prompt = row["prompt"]
        if "rejected" in row:
            prompt = prompt or row["completion"]
    if not isinstance(prompt, str):
        prompt = "\0".join(f"{message['role']}\0{message['content']}" for message in prompt)
    return hashlib.blake2b(f"{seed}/{' '.join(prompt.split()).casefold()}".encode(), digest_size=16).digest()


def _take_question(messages: Messages) -> Messages:
    """Take the turns before the first answer, or all of them where there is none."""
    return messages[: find_answer(messages)]
