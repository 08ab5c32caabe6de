"""Counts the bytes of live tensor storages that operations see, and keeps the most there were."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune.optim.meter import plain_tensors


class LiveBytes(TorchDispatchMode):
    """While it is on, every storage that goes into or comes out of an operation counts until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, Any]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                for plain in plain_tensors(tensor):
                    self.note(plain)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta or storage._cdata in self.live:
            return
        key = storage._cdata
        self.live[key] = storage.nbytes(), weakref.ref(storage, lambda _: self.free(key))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def free(self, key: int) -> None:
        self.now -= self.live.pop(key)[0]
