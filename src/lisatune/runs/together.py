"""Write a checkpoint, on one rank or on several together: complete or not at all.

All ranks fill one folder with another name. Each writes, flushes and hashes its own files, which
`lisatune.files.parts` describes. Once all of them have, rank 0 adds the rest and gives the folder its name.
If a rank fails or dies before that, no folder has that name.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lisatune.distributed import ranks
from lisatune.files.disk import name_aside, sync, write_aside
from lisatune.files.parts import INDEX, index_rows, part_name, write_rows
from lisatune.files.tensors import DividedTensor
from lisatune.runs.manifest import DIVIDED, describe_file, write_manifest

__all__ = ["CheckpointWriter"]

NUMBERS = 1 + 32
"""Whole numbers that say size and sha256 of a file."""


class CheckpointWriter:
    """A checkpoint on its way to the disk: made, written, and finished.

    All ranks make and finish it in their main threads, where they may exchange messages. `write` exchanges
    none, so it may run in another thread while the ranks train.

    Args:
        target: the checkpoint's folder, equal on all ranks and on a disk that all of them share.
        files: tensors of each file by name.
        state: contents of state.json; that of rank 0 is written.
        writes: whether this rank writes its rows. Of several copies only the ranks of one do.
        wait: called before the first tensor is read.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        target: Path,
        files: Mapping[str, Mapping[str, DividedTensor]],
        state: dict[str, Any],
        *,
        writes: bool,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.target = target
        self._files, self._state, self._writes, self._wait = files, state, writes, wait
        self._failure: BaseException | None = None
        self._written: list[int] = []
        self._writers = [rank for rank, (does,) in enumerate(ranks.gather_numbers([writes])) if does]
        self._parts = len(self._writers)
        self._index: dict[str, Any] = {"parts": self._parts}
        for name in DIVIDED:
            firsts = ranks.gather_numbers([0 if t.rows is None else t.rows[0] for t in files[name].values()])
            self._index[name] = index_rows(files[name], [firsts[rank] for rank in self._writers])
        self._aside = Path(ranks.broadcast_text(str(name_aside(target))))
        self._folder = ExitStack()
        ranks.on_rank0(lambda: self._folder.enter_context(write_aside(target, aside=self._aside)))

    def write(self) -> None:
        """Write this rank's files; on one rank that completes the checkpoint. `finish` raises what fails."""
        try:
            if self._wait is not None:
                self._wait()
            self._written = self._write_files()
            if ranks.count() == 1:
                self._complete([self._written])
        except BaseException as error:
            self._failure = error
        self._files = {}

    def finish(self) -> None:
        """Complete the checkpoint once every rank has written; every rank must call it, after `write`.

        Raises:
            OSError, TypeError, RuntimeError: as in `save_checkpoint`, on all ranks.
        """
        with self._folder:  # of rank 0, which deletes it if something fails
            written = ranks.gather_numbers(ranks.on_every_rank(self._result))
            if ranks.count() > 1:
                ranks.on_rank0(lambda: self._complete(written))

    def give_up(self) -> None:
        """Delete what was written instead of finishing it, without a word to other ranks."""
        self._folder.pop_all()
        if ranks.is_rank0():
            shutil.rmtree(self._aside, ignore_errors=True)

    def _result(self) -> list[int]:
        if self._failure is not None:
            raise self._failure
        return self._written

    def _write_files(self) -> list[int]:
        """Write this rank's files, and return size and hash of those that other ranks have too."""
        numbers: list[int] = []
        for name, tensors in self._files.items():
            if not (self._writes and (name in DIVIDED or ranks.is_rank0())):
                continue
            path = self._aside / self._name(name, ranks.rank())
            write_rows(path, tensors, is_first=ranks.is_rank0())
            if name in DIVIDED:
                sync(path)
                described = describe_file(path)
                numbers += [int(described["bytes"]), *bytes.fromhex(str(described["sha256"]))]
        return numbers or [0] * len(DIVIDED) * NUMBERS

    def _complete(self, written: list[list[int]]) -> None:
        """Write what is not divided, sync the folder and give it its name."""
        known: dict[str, Any] = {}
        for rank in self._writers:
            for i, name in enumerate(DIVIDED):
                size, *digest = written[rank][i * NUMBERS : (i + 1) * NUMBERS]
                known[self._name(name, rank)] = {"bytes": size, "sha256": bytes(digest).hex()}
        if self._parts > 1:
            (self._aside / INDEX).write_text(json.dumps(self._index))
        (self._aside / "state.json").write_text(json.dumps(self._state))
        is_whole = not self._state.get("left_out")
        write_manifest(self._aside, self._state["step"], parts=self._parts, known=known, is_whole=is_whole)
        self._folder.pop_all().close()

    def _name(self, name: str, rank: int) -> str:
        """Name the file of a rank."""
        if name in DIVIDED and self._parts > 1:
            return part_name(name, self._writers.index(rank), self._parts)
        return f"{name}.safetensors"
