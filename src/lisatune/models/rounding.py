"""The dtype of written weights, where it is not the one that they were trained in.

The model in memory keeps its dtype, and its weights are rounded to what was written. So an evaluation that
follows is one of the written model.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import local_part
from lisatune.lisa.correction import find_correction
from lisatune.nn.bottleneck import has_adapters
from lisatune.nn.coded import coded_weights, exact_parameters

__all__ = ["fits_range", "held_in", "note_dtype", "round_parameters"]


@contextmanager
def held_in(dtype: torch.dtype | None, model: Any) -> Iterator[None]:
    """Hold a model's weights, or its adapters, in another dtype meanwhile, without a second copy of them.

    What corrects frozen blocks is merged into the weights before, for good, or they would be rounded twice.
    """
    if dtype is not None and (correction := find_correction(model)) is not None:
        correction.merge()
    is_adapted = has_adapters(model)
    coded = coded_weights(model)
    held = {
        name: p
        for name, p in exact_parameters(model).items()
        if p.is_floating_point() and (p.requires_grad or name in coded or not is_adapted)
    }
    plain = [p for name, p in held.items() if name not in coded]
    before = [p.dtype for p in plain]
    with ExitStack() as stack:
        if dtype is not None and fits_range(held.values(), dtype):
            for p in plain:
                p.data = p.data.to(dtype)
            for name, weight in coded.items():
                if held[name].dtype != dtype:
                    stack.enter_context(weight.held_in(dtype))
        try:
            yield
        finally:
            for p, was in zip(plain, before, strict=True):
                p.data = p.data.to(was)


def fits_range(weights: Iterable[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether no weight becomes infinite in a dtype. Warns if one would; every rank must call it."""
    most = torch.finfo(dtype).max
    largest = max((float(w.detach().abs().max()) for w in weights if w.numel()), default=0.0)
    fits = not most < largest < math.inf
    if not fits:
        warnings.warn(
            f"a weight is {largest:.3g} and {dtype} ends at {most:.3g}; weights are written as they are",
            stacklevel=2,
        )
    return not ranks.max_over_ranks(int(not fits))


def round_parameters(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters in a dtype, and round the model's own to it; buffers stay as they are."""
    parameters = {id(p) for p in model.parameters() if p.is_floating_point()}
    to_round = {name: t for name, t in tensors.items() if id(t) in parameters}
    with torch.no_grad():
        rounded = {name: t.detach().to(dtype) for name, t in to_round.items()}
        for name, t in to_round.items():
            local_part(t).copy_(local_part(rounded[name]))
    return tensors | rounded


def note_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Correct the dtype in config.json, which transformers takes from the model in memory."""
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
