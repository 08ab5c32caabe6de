"""AdamW for the rows of an embedding that a step reads: gradient and state of these rows, no others.

The gradient of an embedding [V, D] is zero but for the rows of the step's tokens. `nn.Embedding(sparse=True)`
gives only these rows, as a sparse tensor; a param group with `rows: True` updates only these (lazy AdamW).
With t_r counting the steps that row r was in, g_r its gradient,

    m_r ← β1 m_r + (1 - β1) g_r                         w_r ← w_r - lr·λ·w_r
    v_r ← β2 v_r + (1 - β2) g_r²                        w_r ← w_r - lr·m̂_r / (sqrt(v̂_r) + eps)

m̂_r = m_r / (1 - β1^t_r), v̂_r = v_r / (1 - β2^t_r). A row that a step does not read stays as it is:
its moments do not change and its weight does not decay. Rows that every step reads are updated as in AdamW.

The moments are in a table of R ≤ V rows. R is the number of ids of the largest step so far, repeated ones
counted, so that it holds the rows of a step and, because text repeats its words, those of a few steps
before. If it is full, the row that was read longest ago is dropped; its state starts anew when it is read
again.

A group with `span` A, B trains the rows from A to B of any matrix, each in every step. Its gradient is dense;
as soon as it is there, these rows of it are kept and the rest is dropped.

Several ranks that divide the matrix exchange these gradients (`lisatune.distributed.rows`), and each has a
table for the rows that it holds. There an id that several ranks read counts once for each of them in R.

Shapes: V rows of the embedding, D its width, R rows of the table, n different rows in a step.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import local_part, set_local_gradient
from lisatune.optim import codecs
from lisatune.optim.chunks import cut
from lisatune.optim.group import Group

__all__ = ["TABLE", "RowGradients", "make_gradient", "make_table", "table_layout", "update_rows"]

TABLE = ("row_ids", "row_steps", "row_used", "exp_avg", "exp_avg_sq")
"""State of a parameter whose rows are updated: id of each row of the table, in the whole matrix, -1 where it
is empty; t_r; the step that read it last, from 1; its moments."""


class RowGradients:
    """Merges the gradients of equal ids after every micro-step, and counts the ids."""

    def __init__(self) -> None:
        self._ids: dict[Tensor, int] = {}

    def watch(self, parameter: nn.Parameter, span: tuple[int, int] | None = None) -> None:
        """Merge the gradients of this parameter, which must require grad, or keep the rows of `span`."""
        hook = self._merge if span is None else partial(_pick, span=span)
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def take(self, parameter: Tensor) -> int:
        """Return the number of ids in the gradient before merging, 0 if nothing was merged. Forget it."""
        return self._ids.pop(parameter, 0)

    def forget(self) -> None:
        """Forget all counts, because the gradients were released."""
        self._ids.clear()

    def _merge(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            gradient = local_part(parameter.grad)
            self._ids[parameter] = max(self._ids.get(parameter, 0), gradient._nnz())
            set_local_gradient(parameter, gradient.coalesce())


def _pick(parameter: Tensor, *, span: tuple[int, int]) -> None:
    """Keep the rows of `span` of a dense gradient, as a sparse one."""
    first, last = span
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:  # several ranks have picked them before they exchanged them
        set_local_gradient(parameter, local_part(gradient).coalesce())
        return
    ids_1n = torch.arange(first, last + 1, device=gradient.device).unsqueeze(0)
    values_nD = gradient[first : last + 1].clone()  # a view would keep all of the gradient
    parameter.grad = torch.sparse_coo_tensor(
        ids_1n, values_nD, gradient.shape, check_invariants=False, is_coalesced=True
    )


def make_gradient(group: Mapping[str, Any], parameter: nn.Parameter, ids: int) -> None:
    """Give a parameter a gradient of the most rows that can train in a step, with arbitrary values.

    Args:
        group: its param group.
        parameter: of shape [V, D]; it may be divided, and then its part may have the ids of all ranks.
        ids: number of token ids in a step; all count as different.
    """
    p = local_part(parameter)
    first, last = group.get("span", (1, ids * ranks.count()))
    rows = min(last - first + 1, len(p))
    ids_1n = torch.arange(rows, device=p.device).unsqueeze(0)
    values_nD = torch.empty(rows, *p.shape[1:], dtype=p.dtype, device=p.device)
    gradient = torch.sparse_coo_tensor(ids_1n, values_nD, p.shape, check_invariants=False, is_coalesced=True)
    set_local_gradient(parameter, gradient)


def table_layout(p: Tensor, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor in a table of `rows` rows, at most as many as `p` has."""
    rows = min(rows, len(p))
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    layout = dict.fromkeys(TABLE[:3], ((rows,), torch.int64))
    return layout | dict.fromkeys(TABLE[3:], ((rows, *p.shape[1:]), wide))


def make_table(p: Tensor, state: dict[str, Any], rows: int) -> None:
    """Start the table of moments, or make it longer; it never gets shorter."""
    for key, (shape, dtype) in table_layout(p, rows).items():
        old = state.get(key)
        if old is not None and len(old) >= shape[0]:
            continue
        new = torch.full(shape, -1 if key == "row_ids" else 0, dtype=dtype, device=p.device)
        if old is not None:
            new[: len(old)] = old
        state[key] = new


def update_rows(
    group: Group, p: Tensor, state: dict[str, Any], key: int, chunk_size: int, first: int = 0
) -> None:
    """Make one step for the rows that have a gradient.

    Args:
        group: the param group; `steps_done` counts the steps before this one.
        p: weight [V, D] with its sparse gradient.
        state: the table; it has at least as many rows as the gradient.
        key: names the random numbers of stochastic rounding.
        chunk_size: elements in float32 at a time; a row may be longer.
        first: number of p's first row in the whole matrix, if p is this rank's part of it.
    """
    assert p.grad is not None
    gradient = p.grad.coalesce()
    ids_n, gradient_nD = gradient._indices()[0], gradient._values()
    count = len(ids_n)
    if not count:
        return
    key = codecs.key_of(key, first) if first else key  # ranks draw other random numbers
    slots_n, is_known_n = _find_slots(state, ids_n + first, group["steps_done"] + 1)
    steps_n = torch.where(is_known_n, state["row_steps"][slots_n], 0) + 1
    state["row_steps"][slots_n] = steps_n

    (beta1, beta2), lr = group["betas"], group["lr"]
    wide = state["exp_avg"].dtype
    at_a_time = max(1, chunk_size // max(p[0].numel(), 1))
    for number, at in enumerate(cut(count, at_a_time, like=p)):
        slots, ids_c, new_c1 = slots_n[at], ids_n[at], ~is_known_n[at].unsqueeze(1)
        steps_c1 = steps_n[at].to(torch.float64).unsqueeze(1)
        gradient_cD = gradient_nD[at].to(wide)
        exp_avg = state["exp_avg"][slots].masked_fill_(new_c1, 0).lerp_(gradient_cD, 1 - beta1)
        state["exp_avg"][slots] = exp_avg
        exp_avg_sq = state["exp_avg_sq"][slots].masked_fill_(new_c1, 0)
        exp_avg_sq.mul_(beta2).addcmul_(gradient_cD, gradient_cD, value=1 - beta2)
        state["exp_avg_sq"][slots] = exp_avg_sq
        rows_cD = p.detach()[ids_c]
        step_size_c1 = (lr / (1 - beta1**steps_c1)).to(wide)
        bias_correction2_sqrt_c1 = (1 - beta2**steps_c1).sqrt().to(wide)
        denom_cD = exp_avg_sq.sqrt_().div_(bias_correction2_sqrt_c1).add_(group["eps"])
        with codecs.in_float32(rows_cD, None, group["rounding"], codecs.key_of(key, number)) as exact_cD:
            exact_cD.mul_(1 - lr * group["weight_decay"])
            exact_cD.sub_(exp_avg.mul_(step_size_c1).div_(denom_cD))
        p.detach()[ids_c] = rows_cD


def _find_slots(state: dict[str, Any], ids_n: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return the table row of each of the step's ids, and whether the id was in the table already.

    No shape depends on values, so nothing waits for the device.
    """
    ids_R, used_R = state["row_ids"], state["row_used"]
    sorted_R, order_R = ids_R.sort()
    places_n = torch.searchsorted(sorted_R, ids_n).clamp_(max=len(ids_R) - 1)
    is_known_n = sorted_R[places_n] == ids_n
    known_n = order_R[places_n]
    # Rows of this step go last; the others by the step that read them last, then by their ids.
    ages_R = torch.cat([used_R, used_R.new_zeros(1)])
    ages_R[torch.where(is_known_n, known_n, len(used_R))] = step
    oldest_R = order_R[ages_R[order_R].sort(stable=True).indices]
    nth_new_n = (~is_known_n).cumsum(0).sub_(1).clamp_(min=0)
    slots_n = torch.where(is_known_n, known_n, oldest_R[nth_new_n])
    ids_R[slots_n] = ids_n
    used_R[slots_n] = step
    return slots_n, is_known_n
