"""Count the memory of a training step: live tensor storages, by category and by phase.

A `StorageTracker` sees every operation below autograd. For each storage that an operation returns it notes
the size and the events at which the storage was made and freed. The category is often known only later: a
tensor made in forward is an activation if it is still there afterwards. So categories are settled at the end
of a step:

    weights          parameters and buffers of the model
    gradients        `.grad` of a parameter
    optimizer state  tensors in `optimizer.state`
    activations      made in forward, or made again in backward, and kept for backward
    loss             made between the decoder's output and that output's gradient, such as logits
    workspace        everything else: gradients of activations, temporaries

The same tracker runs over real tensors (`lisatune.memory.measure`) and over fake ones (`plan_memory`). It
does not see memory that a kernel allocates inside.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lisatune.distributed.shards import has_values
from lisatune.lisa.correction import find_correction
from lisatune.lisa.statistics import collected_tensors
from lisatune.memory.torch_private import (
    ASKS_DEVICE,
    IN_PLACE,
    ResizeHook,
    identify,
    run_first,
    runs_backward,
)
from lisatune.nn.coded import coded_weights
from lisatune.optim.meter import host_state, plain_tensors, tensors_bytes

__all__ = ["CATEGORIES", "PHASES", "StepMemory", "StorageTracker", "measure"]


CATEGORIES = ("weights", "gradients", "optimizer state", "activations", "loss", "workspace")

PHASES = ("forward", "loss", "backward", "clip", "optimizer step")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one training step, in bytes of live tensor storages."""

    peak_bytes: int
    """Most bytes at once."""

    phase: str
    """Phase of the peak, one of PHASES. The backward pass of the loss belongs to `loss`."""

    at_peak: dict[str, int]
    """Bytes of each category at the peak; their sum is `peak_bytes`."""

    by_phase: dict[str, int]
    """Most bytes at once in each phase of the step."""

    static_bytes: int
    """Bytes at the end of the step: weights and optimizer state."""

    host_bytes: int = 0
    """Bytes of optimizer state with `state_device: cpu`; in a plan also those of exact frozen weights and of
    the copy of a checkpoint. In the step that makes the state, `peak_bytes` includes the state; otherwise no
    other figure has these bytes."""


@dataclass(slots=True)
class _Storage:
    size: int
    category: str | None
    born: int
    reference: Any
    died: int | None = None


def measure(model: nn.Module, optimizer: Optimizer) -> "StorageTracker":
    """Count the live tensors of real training steps, by category and by phase.

    Inside the `with`, every operation takes some microseconds longer. The results do not change.

    Args:
        model: the model that trains, after everything was attached to it.
        optimizer: its optimizer.

    Returns:
        A context manager. Call its `end_step()` after each step for the step's `StepMemory`, in bytes.

    Example:
        >>> with memory.measure(model, optimizer) as measured:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     step = measured.end_step()
        >>> step.peak_bytes, step.phase, step.at_peak["activations"]
    """
    return StorageTracker(model, optimizer)


class StorageTracker(TorchDispatchMode):
    """Counts live storages inside a `with`. It changes no result.

    The loop need not name the phases. Hooks on the decoder tell forward and loss, autograd tells backward,
    and hooks on the optimizer tell its step. `clip` is the time between backward and the optimizer's step.

    Args:
        model: the model that trains, after everything was attached to it.
        optimizer: its optimizer. Tensors that are in its state already are counted from the start.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._optimizer = model, optimizer
        self._correction = find_correction(model)
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
        self._masters: set[int] = set()
        self._mark_weights()
        self._mark_state()
        self._mark_gradients()
        self._peaks.clear()  # state in host memory was counted for a moment

    # ---- what the caller does

    def __enter__(self) -> Self:
        decoder = _find_decoder(self._model)
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder),
            decoder.register_forward_hook(self._after_decoder),
            self._optimizer.register_step_pre_hook(self._before_update),
            self._optimizer.register_step_post_hook(self._after_update),
            *(
                p.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call]
                for p in self._all_parameters()
                if p.requires_grad
            ),
        ]
        run_first(self._optimizer, self._handles[3])  # a schedule's own hook may release state
        self._resize_hook = ResizeHook(self._after_resize)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._resize_hook.remove()
        for handle in self._handles:
            handle.remove()

    def mark(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """Put tensors into a category. A tensor made of others stands for these."""
        for tensor in tensors:
            for plain in plain_tensors(tensor) if tensor is not None else ():
                self._note(plain).category = category

    def end_step(self) -> StepMemory:
        """End a step: settle its categories and start to count the next one.

        Returns:
            Bytes of the step that has just ended.
        """
        self._mark_state()
        self._mark_weights()
        self._peaks.setdefault(self._phase, (self._total, self._event))
        phase, (peak, moment) = max(self._peaks.items(), key=lambda item: item[1][0])
        memory = StepMemory(
            peak_bytes=peak,
            phase=phase,
            at_peak=self._count(moment),
            by_phase={name: self._peaks[name][0] for name in PHASES if name in self._peaks},
            static_bytes=self._total,
            host_bytes=tensors_bytes(host_state(self._optimizer)),
        )
        self._storages = [storage for storage in self._storages if storage.died is None]
        self._peaks = {}
        return memory

    # ---- the count

    def _count(self, moment: int) -> dict[str, int]:
        """Count the bytes of each category that were alive after an event of this step."""
        counts = dict.fromkeys(CATEGORIES, 0)
        for storage in self._storages:
            if storage.born <= moment and (storage.died is None or storage.died > moment):
                counts[storage.category or "workspace"] += storage.size
        return counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is ASKS_DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else function(*args)
        if self._in_place:  # by now, the tensor that the last operation replaced is freed
            self._note_peak()
        self._find_phase()
        self._in_place = (
            function in IN_PLACE and self._phase in ("loss", "backward") and _computes_gradients()
        )
        out = function(*args, **(kwargs or {}))
        for each in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(each, Tensor):
                for plain in plain_tensors(each):
                    if identify(plain.untyped_storage()) not in self._masters:
                        self._note(plain)
        return out

    def _note(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = identify(storage)
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
        """Count a resized storage as a new one. Only FSDP2 resizes any: those of weights that it gathers."""
        known.category, self._event = "weights", self._event + 1
        self._leave(known)
        resized = _Storage(size, "weights", self._event, known.reference)
        self._live[key] = resized
        self._storages.append(resized)
        self._total += size
        self._note_peak()
        return resized

    def _after_resize(self, storage: torch.UntypedStorage) -> None:
        key = identify(storage)
        known = self._live.get(key)
        if known is not None and known.size != storage.nbytes():
            self._resize(key, known, storage.nbytes())

    def _note_peak(self) -> None:
        if self._total > self._peaks.get(self._phase, (-1, 0))[0]:
            self._peaks[self._phase] = self._total, self._event

    def _free(self, key: int) -> None:
        if key in self._live:
            self._leave(self._live.pop(key))

    def _leave(self, storage: _Storage) -> None:
        """Stop counting a storage."""
        if storage.died is None:
            self._event += 1
            storage.died = self._event
            self._total -= storage.size

    def _mark_weights(self) -> None:
        """Mark the weights. Exact weights of coded layers are outside the device and are not counted."""
        coded = [w for w in coded_weights(self._model).values() if has_values(w.parameter)]
        self._masters = {identify(weight.exact().untyped_storage()) for weight in coded}
        for key in self._masters & self._live.keys():
            self._leave(self._live.pop(key))
        self.mark("weights", [*self._all_parameters(), *self._model.buffers()])

    def _mark_gradients(self) -> None:
        self.mark("gradients", [p.grad for p in self._all_parameters() if p.grad is not None])

    def _all_parameters(self) -> list[nn.Parameter]:
        """Return the model's parameters and those of a correction's adapters."""
        own = [] if self._correction is None else self._correction.all_parameters()
        return [*self._model.parameters(), *own]

    def _mark_state(self) -> None:
        """Mark the optimizer's state. The part that lives in host memory is no longer counted."""
        self.mark("optimizer state", _list_state(self._optimizer))
        self.mark("optimizer state", collected_tensors(self._optimizer))
        if self._correction is not None and self._correction.optimizer is not None:
            self.mark("optimizer state", _list_state(self._correction.optimizer))
        for plain in (each for value in host_state(self._optimizer) for each in plain_tensors(value)):
            self._leave(self._note(plain))

    # ---- the phases

    def _find_phase(self) -> None:
        if self._phase == "optimizer step":
            return
        if not runs_backward():
            if self._phase == "backward":
                self._enter("clip")
            return
        if self._phase == "loss" and self._in_loss:
            return
        if self._phase != "backward":
            self._enter("backward")
        # In backward, autograd is on only while a checkpointed block is computed again.
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
        """Mark storages without a category as activations if they were made after the event `since`."""
        for storage in self._live.values():
            if storage.category is None and storage.born > since:
                storage.category = "activations"

    def _before_decoder(self, decoder: nn.Module, args: Any) -> None:
        if not runs_backward():
            self._enter("forward")

    def _after_decoder(self, decoder: nn.Module, args: Any, out: Any) -> None:
        if runs_backward():
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
        # FSDP2 sets the gradient of a sharded parameter without calling the parameter's hook.
        self._mark_gradients()
        self._enter("optimizer step")

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.mark("optimizer state", _list_state(optimizer))  # before a draw releases any
        if runs_backward():  # an update inside backward
            self._enter("backward")


def _computes_gradients() -> bool:
    """Return whether autograd computes gradients now, as opposed to a checkpointed forward pass."""
    return runs_backward() and not torch.is_grad_enabled()


def _find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that computes hidden states; the whole model if it does not name one."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _list_state(optimizer: Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
