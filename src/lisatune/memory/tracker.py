"""What the memory of a training step is made of: live tensor storages, by category and by phase.

A `StorageTracker` sees every operation below autograd. Each storage that an operation returns is noted with
its size, the event it was born at and the event it was freed at. What it was for is known only later (a
tensor of the forward pass is an activation if it outlives it), so categories are settled when a step is over:

    weights          parameters and buffers of the model
    gradients        `.grad` of a parameter
    optimizer state  tensors in `optimizer.state`
    activations      made in forward, or made again in backward, and kept for backward
    loss             made between the decoder's output and that output's gradient: logits, a few at a time
    workspace        everything else: gradients of activations, temporaries

The same tracker runs over real tensors (`lisatune.memory.measure`) and over fake ones (`plan_memory`). It
doesn't see what a kernel allocates inside.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lisatune.optim.meter import host_state, plain_tensors, tensors_bytes

__all__ = ["CATEGORIES", "PHASES", "StepMemory", "StorageTracker", "measure"]


IN_PLACE = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl.default,
)
"""What autograd does in place in backward unless a dispatch mode watches: it takes no memory of its own."""

ASKS_DEVICE = torch.ops.prim.device.default
"""What `tensor.device` calls for a fake tensor. More than half of all calls are these."""


@dataclass(slots=True)
class _Storage:
    size: int
    category: str | None
    born: int
    reference: Any
    died: int | None = None


CATEGORIES = ("weights", "gradients", "optimizer state", "activations", "loss", "workspace")


PHASES = ("forward", "loss", "backward", "clip", "optimizer step")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one training step, in bytes of live tensor storages."""

    peak_bytes: int
    """Most bytes at once."""

    phase: str
    """Where that was, one of PHASES. The loss's backward pass belongs to `loss`."""

    at_peak: dict[str, int]
    """Bytes of each category at the peak; their sum is `peak_bytes`."""

    by_phase: dict[str, int]
    """Most bytes in each phase the step went through."""

    static_bytes: int
    """Bytes at the end of the step: weights and optimizer state."""

    host_bytes: int = 0
    """Bytes of optimizer state with `state_device: cpu`. In the step that makes it `peak_bytes` has it too;
    later no other figure counts it."""


class StorageTracker(TorchDispatchMode):
    """Counts live storages while it is the current dispatch mode.

    Phases need no word from the loop: forward and loss are told by hooks on the decoder, backward by
    autograd, the optimizer's step by its hooks; what comes between backward and the step is `clip`. Nothing
    that is computed changes.

    Args:
        model: the model that trains, with everything that has to be attached already attached.
        optimizer: its optimizer; tensors already in its state are counted from the start.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer = model, optimizer
        self._live: dict[int, _Storage] = {}
        self._storages: list[_Storage] = []
        self._handles: list[RemovableHandle] = []
        self._event = 0
        self._total = 0
        self._phase = "optimizer step"
        self._in_loss = False
        self._in_place = False
        self._recomputing_since: int | None = None
        self._peaks: dict[str, tuple[int, int]] = {}
        self.mark("weights", [*model.parameters(), *model.buffers()])
        self._mark_state()
        self.mark("gradients", [p.grad for p in model.parameters() if p.grad is not None])
        self._peaks.clear()  # what is in host memory was counted for a moment

    # ---- what the caller does

    def __enter__(self) -> Self:
        decoder = _decoder(self._model)
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder),
            decoder.register_forward_hook(self._after_decoder),
            self._optimizer.register_step_pre_hook(self._before_update),
            self._optimizer.register_step_post_hook(self._after_update),
            *(
                p.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call]
                for p in self._model.parameters()
                if p.requires_grad
            ),
        ]
        # Before LISA's own hook, which may release state.
        hooks: Any = self._optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._handles[3].id, last=False)
        self._resize_before = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._watch_resize()  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize_before  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()

    def mark(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what tensors are for. Of a tensor made of others, each of these is marked."""
        for tensor in tensors:
            for plain in plain_tensors(tensor) if tensor is not None else ():
                self._note(plain).category = category

    def end_step(self) -> StepMemory:
        """Settle the categories of the step that has just ended, and begin the next one."""
        self._mark_state()
        self._peaks.setdefault(self._phase, (self._total, self._event))
        phase, (peak, moment) = max(self._peaks.items(), key=lambda item: item[1][0])
        at_peak = dict.fromkeys(CATEGORIES, 0)
        for storage in self._storages:
            if storage.born <= moment and (storage.died is None or storage.died > moment):
                at_peak[storage.category or "workspace"] += storage.size
        memory = StepMemory(
            peak_bytes=peak,
            phase=phase,
            at_peak=at_peak,
            by_phase={name: self._peaks[name][0] for name in PHASES if name in self._peaks},
            static_bytes=self._total,
            host_bytes=tensors_bytes(host_state(self._optimizer)),
        )
        self._storages = [storage for storage in self._storages if storage.died is None]
        self._peaks = {}
        return memory

    # ---- the count

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is ASKS_DEVICE:
            return function(*args, **(kwargs or {}))
        if self._in_place:  # what the last operation replaced is gone by now
            self._note_peak()
        self._find_phase()
        self._in_place = function in IN_PLACE and self._phase in ("loss", "backward") and _runs_backward()
        out = function(*args, **(kwargs or {}))
        for each in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(each, Tensor):
                for plain in plain_tensors(each):
                    self._note(plain)
        return out

    def _note(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known if known.size == storage.nbytes() else self._resize(key, known, storage.nbytes())
        self._event += 1
        reference = weakref.ref(storage, lambda _: self._free(key))
        category = "loss" if self._phase == "loss" else None
        noted = _Storage(storage.nbytes(), category, self._event, reference)
        self._live[key] = noted
        self._storages.append(noted)
        self._total += noted.size
        if not self._in_place:
            self._note_peak()
        return noted

    def _resize(self, key: int, known: _Storage, size: int) -> _Storage:
        """Count a storage of another size as a new one. FSDP2 alone does so, with weights that it gathers."""
        known.category, self._event = "weights", self._event + 1
        self._leave(known)
        resized = _Storage(size, "weights", self._event, known.reference)
        self._live[key] = resized
        self._storages.append(resized)
        self._total += size
        self._note_peak()
        return resized

    def _watch_resize(self) -> Any:
        """Let a storage that is resized be counted anew: that is no operation which a mode would see."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = self._live.get(storage._cdata)
            if known is not None and known.size != storage.nbytes():
                self._resize(storage._cdata, known, storage.nbytes())
            return result

        return noted

    def _note_peak(self) -> None:
        if self._total > self._peaks.get(self._phase, (-1, 0))[0]:
            self._peaks[self._phase] = self._total, self._event

    def _free(self, key: int) -> None:
        self._leave(self._live.pop(key))

    def _leave(self, storage: _Storage) -> None:
        """Count it no more."""
        if storage.died is None:
            self._event += 1
            storage.died = self._event
            self._total -= storage.size

    def _mark_state(self) -> None:
        """Find the optimizer's state; for a device, what belongs into host memory is gone from here on."""
        self.mark("optimizer state", _state(self._optimizer))
        for plain in (each for value in host_state(self._optimizer) for each in plain_tensors(value)):
            self._leave(self._note(plain))

    # ---- the phases

    def _find_phase(self) -> None:
        if self._phase == "optimizer step":
            return
        if torch._C._current_graph_task_id() == -1:  # not in backward
            if self._phase == "backward":
                self._enter("clip")
            return
        if self._phase == "loss" and self._in_loss:
            return
        if self._phase != "backward":
            self._enter("backward")
        # Backward computes without autograd; with it, a checkpointed block is being computed again.
        if torch.is_grad_enabled():
            if self._recomputing_since is None:
                self._recomputing_since = self._event
        elif self._recomputing_since is not None:
            self._keep_activations(self._recomputing_since)
            self._recomputing_since = None

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._note_peak()

    def _keep_activations(self, since: int) -> None:
        """What forward leaves behind is there for backward."""
        for storage in self._live.values():
            if storage.category is None and storage.born > since:
                storage.category = "activations"

    def _before_decoder(self, decoder: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self._enter("forward")

    def _after_decoder(self, decoder: nn.Module, args: Any, out: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        self._keep_activations(since=0)
        self._enter("loss")
        self._in_loss = True
        hidden = (
            out
            if isinstance(out, Tensor)
            else next(iter(dict(out).values() if isinstance(out, dict) else out))
        )
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._after_loss)  # type: ignore[no-untyped-call]

    def _after_gradient(self, parameter: Tensor) -> None:
        self.mark("gradients", [parameter.grad])

    def _after_loss(self, grad: Tensor) -> None:
        self._in_loss = False
        self._enter("backward")

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_loss = False
        # A sharded parameter gets its gradient from FSDP2, past the hook of its own.
        self.mark("gradients", [p.grad for p in self._model.parameters() if p.grad is not None])
        self._enter("optimizer step")

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.mark("optimizer state", _state(optimizer))  # before a draw releases any
        if torch._C._current_graph_task_id() != -1:  # an update inside backward
            self._enter("backward")


def _runs_backward() -> bool:
    """Whether autograd computes gradients now, and not a checkpointed forward pass."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _decoder(model: nn.Module) -> nn.Module:
    """The part of the model that ends in hidden states; the whole model where it names none."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _state(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def measure(model: nn.Module, optimizer: Optimizer) -> "StorageTracker":
    """Count the live tensors of real training steps, by category and phase.

    Every operation inside the `with` costs some microseconds more; nothing computed changes.

    Example:
        >>> with memory.measure(model, optimizer) as measured:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     step = measured.end_step()
        >>> step.peak_bytes, step.phase, step.at_peak["activations"]
    """
    pass

    return StorageTracker(model, optimizer)
