"""Optimizer state in safetensors files, the same for any number of ranks.

What has a weight's shape is divided as the weight is, whichever optimizer it belongs to; sums of rows are
divided with the rows. All else is equal on all ranks, such as sums of columns.

8-bit moments have a scale for each 256 numbers of a rank's part. If every part begins at a multiple of 256,
joined parts are the state of one rank. If not, the tensor `block_starts` says where the parts began, and a
rank whose blocks are others quantises the numbers anew.

A table of rows (`lisatune.optim.rows`) is joined from the ranks' tables. A rank takes the entries of rows
that it holds. As many ranks as wrote it take their own, empty ones included.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lisatune.distributed.shards import Part, is_sharded, local_part, part_of, row_bounds
from lisatune.files.parts import part_starts
from lisatune.files.tensors import DividedTensor, read_part
from lisatune.optim import codecs
from lisatune.optim.codecs import BLOCK

__all__ = ["describe_states", "read_states"]

STARTS = "block_starts"
"""int64 [parts]: at which elements of the parameter blocks of 256 began anew. Missing: only at 0."""

IDS = "row_ids"
"""int64 [entries]: of a table of rows, the row that each entry is of, -1 if it is empty."""


def describe_states(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, DividedTensor]:
    """Describe optimizer state named "PARAMETER//KEY", of which this rank may hold only a part."""
    divided, lengths = {}, _count_entries(tensors, parameters)
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("//")
        parameter, part = parameters[name], part_of(parameters[name])
        if not is_sharded(parameter):
            divided[path] = _describe(tensor)
        elif name in lengths:
            divided[path] = _describe(tensor, part, lengths[name])
        elif key.endswith("_scales"):
            divided[path] = _describe(tensor, part, _count_blocks(part))
            starts = torch.tensor(part.bounds[:-1])
            if (starts % BLOCK).any():
                divided[f"{name}//{STARTS}"] = _describe(starts)
        elif key == "exp_avg_sq_rows" or tensor.shape == local_part(parameter).shape:
            divided[path] = _describe(tensor, part, _count_rows(parameter))
        else:  # equal on all ranks
            divided[path] = _describe(tensor)
    return divided


def _count_entries(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Count the entries of each rank's table of rows, for each divided parameter that has one."""
    lengths = {}
    for path in sorted(tensors):  # ranks exchange the numbers
        name, _, key = path.rpartition("//")
        if key == IDS and is_sharded(parameters[name]):
            part, ids = part_of(parameters[name]), tensors[path]
            lengths[name] = part.gather(len(ids), ids.device)
    return lengths


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
    elif f"{name}//{IDS}" in names:
        entries = _find_entries(file, f"{name}//{IDS}", parameter)
        yield path, file.get_tensor(path)[entries]
    elif key == "exp_avg_sq_rows":
        bounds, index = row_bounds(parameter), part_of(parameter).index
        yield path, file.get_slice(path)[bounds[index] : bounds[index + 1]]
    elif key != STARTS and not (key.endswith("_scales") and f"{path.removesuffix('_scales')}_codes" in names):
        yield path, read_part(file, path, parameter)


def _find_entries(file: Any, path: str, parameter: Tensor) -> slice | Tensor:
    """Say which entries of a saved table of rows are this rank's."""
    part, starts = part_of(parameter), part_starts(file, path)
    ids = file.get_tensor(path)
    if len(starts) == len(part.bounds) - 1:
        return slice(*[*starts, len(ids)][part.index : part.index + 2])
    first, end = row_bounds(parameter)[part.index : part.index + 2]
    return torch.nonzero((ids >= first) & (ids < end)).squeeze(1)


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
    """Describe a tensor that all ranks have, or one of which each part has `sizes[part]` rows."""
    if part is None:
        return DividedTensor(tensor.dtype, tuple(tensor.shape), tensor.detach)
    rows = sum(sizes[: part.index]), tensor.detach()
    return DividedTensor(tensor.dtype, (sum(sizes), *tensor.shape[1:]), tensor.detach, rows)


def _count_blocks(part: Part) -> list[int]:
    """Count the blocks of 256 in each rank's part."""
    return [-(-(end - start) // BLOCK) for start, end in pairwise(part.bounds)]


def _count_rows(parameter: Tensor) -> list[int]:
    """Count the rows in each rank's part."""
    bounds = row_bounds(parameter)
    return [end - start for start, end in pairwise(bounds)]
