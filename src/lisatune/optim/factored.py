"""Update with a factored second moment and no first one (Adafactor; the maths is in `lisatune.optim.adamw`).

A gradient is read three times in chunks of whole rows: for the means of rows and columns, for the size of
the update, and for the update itself.
"""

from typing import Any

import torch
from torch import Tensor

from lisatune.distributed.shards import Part
from lisatune.optim import codecs
from lisatune.optim.chunks import cut, flatten, on_device
from lisatune.optim.group import Group

__all__ = ["update_factored"]


def update_factored(
    group: Group, p: Tensor, state: dict[str, Any], key: int, chunk_size: int, part: Part
) -> None:
    """Make one step of a parameter of any shape.

    Args:
        group: the param group.
        p: weight with its gradient; if it has more than two dimensions, all but the first count as one.
        state: `step`, and `exp_avg_sq_rows` and `exp_avg_sq_columns`, or `exp_avg_sq` of one dimension;
            `remainder` if rounding is exact.
        key: names the random numbers of stochastic rounding.
        chunk_size: elements in float32 at a time; a row may be longer.
        part: which elements of the whole parameter `p` holds. Ranks add up their sums of columns, and the
            size of their updates.
    """
    assert p.grad is not None
    beta2, is_matrix = group["betas"][1], p.ndim >= 2
    rows, columns = (len(p), p.shape[1:].numel()) if is_matrix else (1, p.numel())
    if not part.size:
        return
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    gradient_RC = p.grad.contiguous().view(rows, columns)
    step = state["step"].add_(1)
    correction = (1 - beta2**step).to(wide)
    chunks = cut(rows, max(1, chunk_size // max(columns, 1)), like=p)

    if is_matrix:
        sums_C = torch.zeros(columns, dtype=wide, device=p.device)
        means_R = torch.empty(rows, dtype=wide, device=p.device)
        for at in chunks:
            square_RC = gradient_RC[at].to(wide).square()
            means_R[at] = square_RC.mean(dim=1)
            sums_C += square_RC.sum(dim=0)
        state["exp_avg_sq_rows"].lerp_(means_R, 1 - beta2)
        state["exp_avg_sq_columns"].lerp_(part.sum(sums_C) / (part.size // columns), 1 - beta2)
        row_R, column_C = state["exp_avg_sq_rows"], state["exp_avg_sq_columns"]
        mean = column_C.mean()  # that of the rows too, but the rows of other ranks are not here
        left_R1 = (row_R / mean.clamp(min=torch.finfo(wide).tiny)).sqrt().unsqueeze(1)
        right_1C = (column_C / correction).sqrt().unsqueeze(0)
    else:
        state["exp_avg_sq"].view(-1).lerp_(gradient_RC[0].to(wide).square(), 1 - beta2)
        left_R1 = torch.ones(1, 1, dtype=wide, device=p.device)
        right_1C = (state["exp_avg_sq"].view(1, -1) / correction).sqrt()

    def update_of(at: slice) -> Tensor:
        update_RC: Tensor = gradient_RC[at].to(wide) / (left_R1[at] * right_1C).add_(group["eps"])
        return update_RC

    total = torch.zeros((), dtype=wide, device=p.device)
    for at in chunks:
        total += update_of(at).square_().sum()
    scale = -group["lr"] / (part.sum(total) / part.size).sqrt().clamp(min=1)

    remainder = {name: state[name].view(rows, columns) for name in ("remainder",) if name in state}
    with flatten(p) as row:
        weight_RC = row.view(rows, columns)
        for at in chunks:
            weight, start = weight_RC[at].view(-1), part.start + at.start * columns
            kept = {name: value[at].view(-1) for name, value in remainder.items()}
            for _, here in on_device(kept, weight.numel(), weight.numel(), p.device):
                rest, rounding = here.get("remainder"), group["rounding"]
                with codecs.in_float32(weight, rest, rounding, key, start=start) as exact:
                    exact.mul_(1 - group["lr"] * group["weight_decay"])
                    exact.add_((update_of(at) * scale).view(-1))
