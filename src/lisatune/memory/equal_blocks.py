"""Trace a step in which most of a run of equal frozen blocks do nothing, and count them all the same.

Frozen blocks that are equal and follow each other take the same memory one after another: each adds what the
one before added. So of a run of them four are traced, two at each end, and the others hand their input on.
With d bytes that one block adds to a pass, and k blocks that were left out, every count after them is k × d
bytes higher. The count is exact if the second and the last but one of the run do the same, event by event,
because the highest point of k blocks in a row is then in the first or the last of them, which both run. This
is checked in every step, forward and backward. `set_aside` leaves out updates of equal parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.memory.torch_private import runs_backward
from lisatune.memory.tracker import CATEGORIES, StepMemory, StorageTracker
from lisatune.optim.adamw import AdamW

__all__ = ["TRACED", "FewerBlocks", "set_aside"]

TRACED = 4
"""Blocks of a run that are traced: two at each end."""

INDEX_NAMES = ("idx", "index", "layer_id", "layer_number")
"""Ends of the names under which a module may store which block it is in."""

Bytes = dict[str, int]
"""Bytes of each category."""


@dataclass(frozen=True)
class _Mark:
    """A moment of a step."""

    note: int
    """Number of counts that were noted before."""

    event: int
    total: int


@dataclass
class _Pass:
    """One forward pass through a run of equal blocks, and its backward pass."""

    arguments: Any = None
    """What the second block was called with, besides its input."""

    left_out: int = 0
    forward: list[_Mark] = field(default_factory=list)
    """Before the second block, after it, before the last but one, and after it."""

    backward: list[_Mark] = field(default_factory=list)
    """Before the last but one, after it, and after the second."""


class FewerBlocks(StorageTracker):
    """A `StorageTracker` for fake tensors that leaves out most of each run of equal frozen blocks.

    Args:
        model, optimizer: as for `StorageTracker`.
        blocks: the model's blocks, nearest the input first.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, blocks: Sequence[nn.Module]) -> None:
        self._notes: list[tuple[str, int, int]] = []
        super().__init__(model, optimizer)
        self._notes.clear()
        self._runs = [run for run in _find_runs(blocks) if len(run) > TRACED]
        self._passes: list[_Pass] = []
        self._extra: list[tuple[_Mark, Bytes]] = []
        self._own: list[tuple[Any, Callable[..., Any] | None]] = []
        self.is_exact = True
        """Whether the blocks that ran were equal in the step that ended last."""

    def __enter__(self) -> Self:
        super().__enter__()
        for run in self._runs:
            for position, block in enumerate(run):
                self._own.append((block, vars(block).get("forward")))
                block.forward = partial(self._run_block, len(run), position, block.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block, own in self._own:
            del block.forward
            if own is not None:
                block.forward = own
        self._own.clear()
        super().__exit__(kind, error, trace)

    def end_step(self) -> StepMemory:
        """End a step, as `StorageTracker` does. The blocks that were left out are counted too."""
        self._mark_state()
        self._extra = []
        self.is_exact = all(self._add_pass(each) for each in self._passes)
        highest: dict[str, int] = {}
        self._peaks = {}
        for index, (phase, event, total) in enumerate(self._notes):
            total += sum(sum(added.values()) for mark, added in self._extra if mark.note <= index)
            if total > self._peaks.get(phase, (-1, 0))[0]:
                self._peaks[phase], highest[phase] = (total, event), index
        memory = super().end_step()
        for mark, added in self._extra:
            if mark.note <= highest.get(memory.phase, -1):
                for name, size in added.items():
                    memory.at_peak[name] += size
        self._notes, self._passes = [], []
        return memory

    def _note_peak(self) -> None:
        super()._note_peak()
        self._notes.append((self._phase, self._event, self._total))

    def _mark(self) -> _Mark:
        return _Mark(len(self._notes), self._event, self._total)

    def _run_block(
        self, length: int, position: int, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a block of a run, or hand its input on: the `forward` of each block in a run."""
        if runs_backward() or not args or not isinstance(args[0], Tensor):  # recomputes, or is unusual
            return own(*args, **kwargs)
        hidden, others = args[0], (args[1:], kwargs)
        if position == 0:
            self._passes.append(_Pass())
        current = self._passes[-1]
        if position in (1, 2, length - 2, length - 1):
            current.forward.append(self._mark())
        if position in (1, length - 2, length - 1) and hidden.requires_grad:
            hidden.register_hook(lambda _: current.backward.append(self._mark()))  # type: ignore[no-untyped-call]
        if 1 < position < length - 2 and _are_same(others, current.arguments):
            current.left_out += 1
            return hidden
        current.arguments = None  # the step must not keep them alive
        out = own(*args, **kwargs)
        if position == 1 and _is_like(out, hidden):
            current.arguments = others
        return out

    def _add_pass(self, each: _Pass) -> bool:
        """Add what blocks of a pass that were left out take. Return whether that is exact."""
        if not each.left_out:
            return True
        if len(each.forward) != 4 or len(each.backward) not in (0, 3):
            return False
        second, after, last, end = each.forward
        pairs = [((second, after), (last, end), last)]
        if each.backward:
            start, between, done = each.backward
            pairs.append(((start, between), (between, done), between))
        for one, other, since in pairs:
            added = self._added(*one)
            if added != self._added(*other) or self._path(*one) != self._path(*other):
                return False
            if not each.backward and any(added.values()):  # a cache, which ends with the pass
                return False
            self._extra.append((since, {name: each.left_out * size for name, size in added.items()}))
        return not any(self._added(after, last).values())

    def _added(self, start: _Mark, end: _Mark) -> Bytes:
        """Return how many bytes of each category were added between two moments."""
        before, after = self._count(start.event), self._count(end.event)
        return {name: after[name] - before[name] for name in CATEGORIES}

    def _path(self, start: _Mark, end: _Mark) -> list[tuple[str, int]]:
        """Return the counts between two moments, from the first one's."""
        notes = self._notes[start.note : end.note]
        return [(phase, total - start.total) for phase, _, total in notes]


def set_aside(optimizer: Optimizer) -> list[Tensor]:
    """Take the gradients of parameters whose update takes the memory of one before them, and return them.

    `AdamW` updates one parameter after another, and holds nothing of one while it updates the next.
    """
    aside: list[Tensor] = []
    seen = set()
    for group in optimizer.param_groups if type(optimizer) is AdamW else ():
        options = [
            (key, value) for key, value in group.items() if key in ("moments", "rounding", "state_device")
        ]
        for p in group["params"]:
            if p.grad is None or group["rows"]:
                continue
            kind = (p.shape, p.stride(), p.dtype, p.grad.stride(), *options)
            if kind in seen:
                aside.append(p.grad)
                p.grad = None
            seen.add(kind)
    return aside


def _find_runs(blocks: Sequence[nn.Module]) -> list[list[Any]]:
    """Divide blocks into runs of equal ones that do not train."""
    described = [(_describe(block), block) for block in blocks]
    groups = groupby(described, key=lambda pair: pair[0])
    return [[block for _, block in group] for description, group in groups if description is not None]


def _describe(block: nn.Module) -> Any:
    """Return what two blocks must share to be equal; None if the block trains."""
    if any(p.requires_grad for p in block.parameters()):
        return None
    described = []
    for path, module in block.named_modules():
        tensors = (module._parameters | module._buffers).items()
        shapes = [(name, None if t is None else (t.shape, t.stride(), t.dtype)) for name, t in tensors]
        values = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple | torch.dtype | None)
            and not name.endswith(INDEX_NAMES)
        }
        described.append((path, type(module), shapes, values))
    return described


def _are_same(one: Any, other: Any) -> bool:
    """Whether two calls got the very same arguments."""
    if other is None:
        return False
    (args, kwargs), (other_args, other_kwargs) = one, other
    return (
        len(args) == len(other_args)
        and kwargs.keys() == other_kwargs.keys()
        and all(a is b for a, b in zip(args, other_args, strict=True))
        and all(kwargs[name] is other_kwargs[name] for name in kwargs)
    )


def _is_like(out: Any, hidden: Tensor) -> bool:
    """Whether a block's output can stand for its input."""
    return isinstance(out, Tensor) and (out.shape, out.stride(), out.dtype, out.requires_grad) == (
        *(hidden.shape, hidden.stride(), hidden.dtype, hidden.requires_grad),
    )
