"""Copies in host memory of what a checkpoint holds, so that training may go on while they are written."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lisatune.files.tensors import DividedTensor

__all__ = ["Files", "copy_files", "copy_size"]

Files = Mapping[str, Mapping[str, DividedTensor]]
"""Tensors of each file by name."""


def copy_files(files: Files, fixed: Collection[str] = ()) -> tuple[Files, Callable[[], None]]:
    """Copy this rank's parts of tensors to host memory, as they are now.

    From a CUDA device they go through page-locked memory, in the order of the device's stream: the next
    update waits for them there, and this process does not.

    Args:
        files: what to copy.
        fixed: names of tensors that never change; these are not copied.

    Returns:
        The same with copies; and a function that waits until the copies are there.
    """
    streams: set[torch.cuda.Stream] = set()

    def copy(tensor: DividedTensor) -> DividedTensor:
        part = tensor.part
        is_cuda = part.device.type == "cuda"
        if is_cuda:
            streams.add(torch.cuda.current_stream(part.device))
        there = torch.empty(part.shape, dtype=part.dtype, pin_memory=is_cuda)
        there.copy_(part, non_blocking=is_cuda)
        rows = None if tensor.rows is None else (tensor.rows[0], there)
        return replace(tensor, gather=partial(_same, there), rows=rows)

    copied = {
        file: {name: tensor if name in fixed else copy(tensor) for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }
    events = [stream.record_event() for stream in streams]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return copied, wait


def copy_size(nbytes: int, device: str) -> int:
    """Return the bytes of host memory that a tensor's copy takes: torch rounds page-locked memory up."""
    return 1 << (nbytes - 1).bit_length() if device == "cuda" and nbytes > 0 else nbytes


def _same(tensor: Tensor) -> Tensor:
    return tensor
