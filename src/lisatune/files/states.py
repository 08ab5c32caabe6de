"""Optimizer state in safetensors files, the same for any number of ranks.

What has a weight's shape is divided as the weight is; sums of rows are divided with the rows, and sums of
columns are equal on all ranks. 8-bit moments have a scale for each 256 numbers of a rank's part. If every
part begins at a multiple of 256, joined parts are the state of one rank. If not, the tensor `block_starts`
says where the parts began, and a rank whose blocks are others quantises the numbers anew.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lisatune.distributed.shards import Part, is_sharded, part_of
from lisatune.files.tensors import DividedTensor, read_part, rows_of
from lisatune.optim import codecs
from lisatune.optim.codecs import BLOCK

__all__ = ["describe_states", "read_states"]

STARTS = "block_starts"
"""int64 [parts]: at which elements of the parameter blocks of 256 began anew. Missing: only at 0."""


def describe_states(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, DividedTensor]:
    """Describe optimizer state named "PARAMETER//KEY", of which this rank may hold only a part."""
    divided = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("//")
        parameter, part = parameters[name], part_of(parameters[name])
        if not is_sharded(parameter) or tensor.ndim == 0 or key == "exp_avg_sq_columns":
            divided[path] = _describe(tensor)
        elif key.endswith("_scales"):
            divided[path] = _describe(tensor, part, _count_blocks(part))
            starts = torch.tensor(part.bounds[:-1])
            if (starts % BLOCK).any():
                divided[f"{name}//{STARTS}"] = _describe(starts)
        elif key == "exp_avg_sq_rows":
            divided[path] = _describe(tensor, part, _count_rows(part, parameter))
        else:
            shape, rows = tuple(parameter.shape), rows_of(parameter, tensor)
            divided[path] = DividedTensor(tensor.dtype, shape, tensor.detach, rows)
    return divided


def read_states(file: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read this rank's part of what `describe_states` described, on any number of ranks.

    Args:
        file: from `lisatune.files.parts.open_tensors`.
        parameters: the model's, by name.

    Returns:
        Tensors by "PARAMETER//KEY", which do not share the file's memory.
    """
    names = set(file.keys())
    return {
        path: value.clone()
        for path in sorted(names)
        for path, value in _read_one(file, path, names, parameters.get(path.rpartition("//")[0]))
    }


def _read_one(
    file: Any, path: str, names: set[str], parameter: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    name, _, key = path.rpartition("//")
    scales = f"{path.removesuffix('_codes')}_scales"
    if parameter is None:  # of another model, which the caller refuses
        yield path, file.get_tensor(path)
    elif key.endswith("_codes") and scales in names:
        starts = file.get_tensor(f"{name}//{STARTS}") if f"{name}//{STARTS}" in names else torch.tensor([0])
        codes, of_codes = read_part(file, path, parameter), file.get_tensor(scales)
        is_signed = not key.startswith("exp_avg_sq")
        yield from zip(
            (path, scales),
            _cut_blocks(codes, of_codes, starts.tolist(), part_of(parameter), signed=is_signed),
            strict=True,
        )
    elif key == "exp_avg_sq_rows":
        part = part_of(parameter)
        rows = _count_rows(part, parameter)
        first = sum(rows[: part.index])
        yield path, file.get_slice(path)[first : first + rows[part.index]]
    elif key != STARTS and not (key.endswith("_scales") and f"{path.removesuffix('_scales')}_codes" in names):
        yield path, read_part(file, path, parameter)


def _cut_blocks(
    codes: Tensor, scales: Tensor, starts: list[int], part: Part, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Give this rank's 8-bit moments its own blocks.

    Args:
        codes: those of this rank's part, of any shape.
        scales: all that were saved, in the order of their blocks.
        starts: elements at which blocks began anew when they were saved.
        part: this rank's part.
        signed: as in `codecs.quantize`.
    """
    ends = [*starts[1:], part.size]
    counts = torch.tensor([-(-(end - start) // BLOCK) for start, end in zip(starts, ends, strict=True)])
    begins, first = torch.tensor(starts), counts.cumsum(0) - counts  # number of each saved part's first block

    def block_of(places: Tensor) -> Tensor:
        saved = torch.searchsorted(begins, places, right=True) - 1
        return first[saved] + (places - begins[saved]) // BLOCK

    firsts = torch.arange(part.start, part.start + codes.numel(), BLOCK)
    lasts = (firsts + BLOCK).clamp(max=part.start + codes.numel()) - 1
    if torch.equal(block_of(firsts), block_of(lasts)):
        return codes, scales[block_of(firsts)]
    own, flat = torch.empty(len(firsts)), codes.reshape(-1).clone()
    places = torch.arange(part.start, part.start + codes.numel())
    values = codecs.dequantize(flat, torch.ones(len(firsts)), signed=signed) * scales[block_of(places)]
    codecs.quantize(values, flat, own, signed=signed)
    return flat.view(codes.shape), own


def _describe(tensor: Tensor, part: Part | None = None, sizes: Sequence[int] = ()) -> DividedTensor:
    """Describe a tensor that all ranks have, or a vector of which each part has `sizes[part]` numbers."""
    if part is None:
        return DividedTensor(tensor.dtype, tuple(tensor.shape), tensor.detach)
    rows = sum(sizes[: part.index]), tensor.detach()
    return DividedTensor(tensor.dtype, (sum(sizes),), tensor.detach, rows)


def _count_blocks(part: Part) -> list[int]:
    """Count the blocks of 256 in each rank's part."""
    return [-(-(end - start) // BLOCK) for start, end in zip(part.bounds, part.bounds[1:], strict=False)]


def _count_rows(part: Part, parameter: Tensor) -> list[int]:
    """Count the rows in each rank's part."""
    width = max(parameter.shape[1:].numel(), 1)
    return [(end - start) // width for start, end in zip(part.bounds, part.bounds[1:], strict=False)]
