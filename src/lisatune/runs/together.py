"""Checkpoints that several ranks write together, complete or not at all.

All ranks fill one folder with another name. Each writes, flushes and hashes its own files, which
`lisatune.files.parts` describes. Once all of them have, rank 0 adds the rest and gives the folder its name.
If a rank fails or dies before that, no folder has that name.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks
from lisatune.files.disk import name_aside, sync, write_aside
from lisatune.files.parts import INDEX, index_rows, part_name, write_rows
from lisatune.files.tensors import DividedTensor
from lisatune.runs.manifest import DIVIDED, describe_file, write_manifest

__all__ = ["write_together"]

NUMBERS = 1 + 32
"""Whole numbers that say size and sha256 of a file."""


def write_together(
    target: Path, files: Mapping[str, Mapping[str, DividedTensor]], state: dict[str, Any], *, writes: bool
) -> None:
    """Write a checkpoint on several ranks.

    Args:
        target: the checkpoint's folder, equal on all ranks and on a disk that all of them share.
        files: tensors of each file by name.
        state: contents of state.json; that of rank 0 is written.
        writes: whether this rank writes its rows. Of several copies only the ranks of one do.

    Raises:
        OSError, TypeError, RuntimeError: as in `save_checkpoint`, on all ranks.
    """
    writers = [rank for rank, (does,) in enumerate(ranks.gather_numbers([writes])) if does]
    parts, names = len(writers), {name: f"{name}.safetensors" for name in files}
    if writes and parts > 1:
        number = writers.index(ranks.rank())
        names |= {name: part_name(name, number, parts) for name in DIVIDED}
    index: dict[str, Any] = {"parts": parts}
    for name in DIVIDED:
        firsts = ranks.gather_numbers([0 if t.rows is None else t.rows[0] for t in files[name].values()])
        index[name] = index_rows(files[name], [firsts[rank] for rank in writers])

    def write(aside: Path) -> list[int]:
        """Write this rank's files, and return size and hash of those that other ranks have too."""
        failure, numbers = None, []
        for name, tensors in files.items():
            path = aside / names[name] if writes and (name in DIVIDED or ranks.is_rank0()) else None
            try:
                write_rows(None if failure else path, tensors, is_first=ranks.is_rank0())
            except (OSError, TypeError) as error:
                failure = error  # and the other ranks still get what they need from this one
            if path is not None and failure is None and name in DIVIDED:
                sync(path)
                described = describe_file(path)
                numbers += [int(described["bytes"]), *bytes.fromhex(str(described["sha256"]))]
        if failure is not None:
            raise failure
        return numbers or [0] * len(DIVIDED) * NUMBERS

    def finish(aside: Path, known: dict[str, Any]) -> None:
        if parts > 1:
            (aside / INDEX).write_text(json.dumps(index))
        (aside / "state.json").write_text(json.dumps(state))
        write_manifest(aside, state["step"], parts=parts, known=known)

    with _shared_aside(target) as aside:
        written = ranks.gather_numbers(ranks.on_every_rank(lambda: write(aside)))
        known: dict[str, Any] = {}
        for number, rank in enumerate(writers):
            for i, name in enumerate(DIVIDED):
                size, *digest = written[rank][i * NUMBERS : (i + 1) * NUMBERS]
                file = part_name(name, number, parts) if parts > 1 else names[name]
                known[file] = {"bytes": size, "sha256": bytes(digest).hex()}
        ranks.on_rank0(lambda: finish(aside, known))


@contextmanager
def _shared_aside(target: Path) -> Iterator[Path]:
    """Let all ranks fill a folder as in `write_aside`; rank 0 makes it and gives it its name at the end."""
    aside = Path(ranks.broadcast_text(str(name_aside(target))))
    with ExitStack() as stack:
        ranks.on_rank0(lambda: stack.enter_context(write_aside(target, aside=aside)))
        yield aside
        ranks.on_rank0(lambda: stack.pop_all().close())
