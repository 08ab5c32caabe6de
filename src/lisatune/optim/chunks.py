"""Weights and optimizer state, one chunk at a time; the state may be on the device or in host memory.

State in host memory is copied to the device chunk by chunk and back again. On CUDA the copies run on a
separate stream, and the next chunk is fetched before this one is computed: two chunks are on the device at
once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lisatune.distributed.shards import has_values
from lisatune.optim.codecs import BLOCK

__all__ = ["cut", "flatten", "on_device", "strip_zero_rows"]


@contextmanager
def flatten(p: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a parameter as one contiguous row [N], to be changed in place.

    The row of a weight that is not contiguous is a copy, and is copied back. `reshape(-1)` would return a
    view of evenly strided weights, such as `x[..., 0]`, in which kernels update the wrong numbers.
    """
    row = p.detach().contiguous().view(-1)
    yield row
    if not p.is_contiguous():
        p.copy_(row.view(p.shape))


def cut(size: int, chunk_size: int, *, like: Tensor) -> list[slice]:
    """Cut `size` elements or rows into slices of `chunk_size`; the last one may be smaller.

    If `like` has no values, because a memory plan is being made, three slices show the peak: the first; the
    second, which is computed while temporaries of the first are still held; and the last.
    """
    slices = [slice(start, min(start + chunk_size, size)) for start in range(0, size, chunk_size)]
    return slices if has_values(like) or len(slices) <= 3 else [*slices[:2], slices[-1]]


def strip_zero_rows(gradient: Tensor) -> Tensor:
    """Return a sparse gradient's rows, equal ids merged; a dense gradient is returned unchanged."""
    return gradient.coalesce()._values() if gradient.is_sparse else gradient


def on_device(
    stored: Mapping[str, Tensor], size: int, chunk_size: int, device: torch.device
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield each chunk's slice and its state on `device`; changes to that state are kept.

    Args:
        stored: flat state [size], or [⌈size/256⌉] for names that end in `_scales`, each on `device` or on
            the CPU.
        size: elements of the weight.
        chunk_size: elements of a chunk, a multiple of 256.
        device: where the weight is.
    """
    slices = cut(size, chunk_size, like=next(iter(stored.values()), torch.empty(0)))
    is_away = any(value.device != device for value in stored.values())
    if not is_away:
        for at in slices:
            yield at, _cut(stored, at)
    elif device.type != "cuda":
        for at in slices:
            homes = _cut(stored, at)
            here = {name: home.to(device) for name, home in homes.items()}
            yield at, here
            _send_back(here, homes)
    else:
        yield from _overlapped(stored, slices, device)


def _overlapped(
    stored: Mapping[str, Tensor], slices: Sequence[slice], device: torch.device
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    copies, computes = _stream(device), torch.cuda.current_stream(device)

    def fetch(at: slice) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        with torch.cuda.stream(copies):
            here = {name: home.to(device, non_blocking=True) for name, home in _cut(stored, at).items()}
        return here, copies.record_event()

    if not slices:  # of a matrix with fewer rows than ranks, some ranks have none
        return
    ahead = fetch(slices[0])
    for at, following in zip(slices, [*slices[1:], None], strict=True):
        here, arrived = ahead
        if following is not None:
            ahead = fetch(following)
        computes.wait_event(arrived)
        yield at, here
        copies.wait_event(computes.record_event())
        with torch.cuda.stream(copies):
            _send_back(here, _cut(stored, at))
        for value in here.values():
            value.record_stream(computes)


def _cut(stored: Mapping[str, Tensor], at: slice) -> dict[str, Tensor]:
    blocks = slice(at.start // BLOCK, -(-at.stop // BLOCK))
    return {name: value[blocks if name.endswith("_scales") else at] for name, value in stored.items()}


def _send_back(here: Mapping[str, Tensor], homes: Mapping[str, Tensor]) -> None:
    for name, home in homes.items():
        if here[name] is not home:
            home.copy_(here[name], non_blocking=True)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's one copy stream: with one, a chunk is never fetched before it was sent back."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
