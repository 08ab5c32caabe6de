r"""Cross-entropy of a linear head, and its gradients, without the logits of all tokens at once.

For hidden states h_n, head W, targets y and an elementwise change φ of the logits (scale, soft-cap, or none):

    z = φ(W h)      loss = Σ_n  log Σ_v exp z_nv  -  z_{n y_n}
    ∂loss/∂z = softmax(z) - onehot(y)       ∂h = φ'(·) ∂z W       ∂W = (φ'(·) ∂z)ᵀ h

Two orders, both exact; `linear_cross_entropy` picks by the head's dtype, or by what is asked for:

    TokenChunks      one pass over chunks of tokens computes loss and gradients together, in forward: three
                     matrix products instead of the four that recomputing the logits in backward takes. ∂W
                     is summed up in one float32 buffer. For float32 heads, and for frozen heads.
    VocabularySlices a running logsumexp over slices of the vocabulary in forward; backward computes each
                     slice's logits again and its rows of ∂W in one product over all tokens. There is no sum
                     over chunks, so bf16 needs no float32 buffer and loses no bits to rounding. A head of
                     codes is decoded slice by slice. Also for losses token by token, whose weights in the
                     gradient are known only in backward.

Softmax and sums are in float32 (float64 for float64). Under autocast products are in its dtype, gradients in
that of the parameters.

Shapes: N = positions with loss, H = hidden size, V = vocabulary, C = tokens of a chunk, S = rows of a slice.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lisatune.optim.chunks import cut

__all__ = ["linear_cross_entropy"]

SLICE_ELEMENTS = 2**22
"""Logits of a vocabulary slice that exist at once, N × S: 16 MiB in float32."""


ROWS_AT_ONCE = 8192
"""Rows of ∂W that are made in low precision before they are added to float32."""


Transform = Callable[[Tensor], Tensor]

ReadRows = Callable[[slice, torch.dtype], Tensor]


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    chunk_size: int = 128,
    transform: Transform | None = None,
    read_rows: ReadRows | None = None,
    each: bool = False,
) -> Tensor:
    """Sum the cross-entropies of `hidden_NH @ weight_VH.T` with the targets.

    Args:
        hidden_NH: input of the head, [N, H], any float dtype.
        weight_VH: the head, [V, H].
        target_N: int64 [N], 0 <= target < V.
        chunk_size: C, tokens whose logits exist at once if TokenChunks is used, >= 1.
        transform: elementwise, differentiable change of the logits, keeps shape and dtype.
        read_rows: returns a slice of the head's rows in a dtype, for a frozen head that is stored in another
            way; of `weight_VH` only shape and dtype are then used.
        each: return each token's cross-entropy instead of the sum.

    Returns:
        Scalar, or [N] with `each`, float32 (float64 for float64). Its backward can run once.
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden_NH.dtype, weight_VH.dtype)
    with torch.autocast(device, enabled=False):
        narrow = weight_VH.requires_grad and weight_VH.dtype.itemsize < 4 and torch.is_grad_enabled()
        if read_rows is not None or narrow or each:
            slices: Any = VocabularySlices
            losses_N: Tensor = slices.apply(hidden_NH, weight_VH, target_N, transform, dtype, read_rows)
            return losses_N if each else losses_N.sum()
        if not torch.is_grad_enabled():
            return _token_chunks(hidden_NH, weight_VH, target_N, chunk_size, transform, dtype)[0]
        chunks: Any = TokenChunks
        loss: Tensor = chunks.apply(hidden_NH, weight_VH, target_N, chunk_size, transform, dtype)
        return loss


class TokenChunks(torch.autograd.Function):
    """Loss and gradients chunk by chunk, in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        chunk_size: int,
        transform: Transform | None,
        dtype: torch.dtype,
    ) -> Tensor:
        total, *ctx.gradients = _token_chunks(
            hidden_NH, weight_VH, target_N, chunk_size, transform, dtype, *ctx.needs_input_grad[:2]
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward ran through this loss before; compute the loss again")
        # Not kept in ctx: autograd reuses a gradient that nobody else holds, and copies any other.
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        for each in (hidden_grad, weight_grad):
            if each is not None:
                each.mul_(grad)
        return hidden_grad, weight_grad, None, None, None, None


def _token_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    chunk_size: int,
    transform: Transform | None,
    dtype: torch.dtype,
    needs_hidden: bool = False,
    needs_weight: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, ∂h in the dtype of h and ∂W in that of W; None for a gradient that is not needed."""
    weight, hidden = weight_VH.detach().to(dtype), hidden_NH.detach()
    total = torch.zeros((), dtype=_wide(dtype), device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if needs_hidden else None
    weight_grad = torch.zeros_like(weight_VH, dtype=_wide(weight_VH.dtype)) if needs_weight else None
    for rows in cut(len(hidden), chunk_size, like=hidden):
        chunk_CH = hidden[rows].to(dtype)
        logits_CV, pull_back = _logits(chunk_CH, weight, transform)
        total += _softmax_minus_target_(logits_CV, target_N[rows])
        if needs_hidden or needs_weight:
            grad_CV = pull_back(logits_CV).to(dtype)
            del logits_CV, pull_back
            if hidden_grad is not None:
                hidden_grad[rows] = grad_CV @ weight
            if weight_grad is not None:
                _add_product_(weight_grad, grad_CV, chunk_CH)
    return total, hidden_grad, None if weight_grad is None else weight_grad.to(weight_VH.dtype)


def _softmax_minus_target_(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """Turn logits into ∂loss/∂logits in place, and return the loss of the chunk."""
    target_C1 = target_C[:, None]
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    at_target_C1 = logits_CV.gather(1, target_C1)
    sum_C1 = logits_CV.sub_(largest_C1).exp_().sum(dim=1, keepdim=True)
    loss = (sum_C1.log() + largest_C1 - at_target_C1).sum()
    logits_CV.div_(sum_C1).scatter_add_(1, target_C1, torch.full_like(at_target_C1, -1))
    return loss


def _add_product_(total_VH: Tensor, grad_CV: Tensor, chunk_CH: Tensor) -> None:
    """Add gradᵀ @ chunk in the dtype of the total; a product in lower precision is made in pieces."""
    if grad_CV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_CV.T, chunk_CH)
        return
    for start in range(0, len(total_VH), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        total_VH[rows] += grad_CV[:, rows].T @ chunk_CH


class VocabularySlices(torch.autograd.Function):
    """Each token's loss in forward, each slice's logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        transform: Transform | None,
        dtype: torch.dtype,
        read_rows: ReadRows | None = None,
    ) -> Tensor:
        hidden, wide = hidden_NH.to(dtype), _wide(dtype)
        largest_N1 = hidden.new_full((len(hidden), 1), -math.inf, dtype=wide)
        sum_N1, at_target_N1 = (hidden.new_zeros((len(hidden), 1), dtype=wide) for _ in range(2))
        for rows in _slices(hidden, weight_VH):
            logits_NS, _ = _logits(hidden, _read(weight_VH, rows, dtype, read_rows), transform)
            column_N1, is_inside_N1 = _columns(target_N, rows)
            at_target_N1 += logits_NS.gather(1, column_N1) * is_inside_N1
            before_N1, largest_N1 = largest_N1, torch.maximum(largest_N1, logits_NS.amax(1, keepdim=True))
            sum_N1 *= (before_N1 - largest_N1).exp_()
            sum_N1 += logits_NS.sub_(largest_N1).exp_().sum(dim=1, keepdim=True)
        logsumexp_N1 = sum_N1.log_() + largest_N1
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, logsumexp_N1)
        ctx.transform, ctx.dtype, ctx.read_rows = transform, dtype, read_rows
        return (logsumexp_N1 - at_target_N1).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, logsumexp_N1 = ctx.saved_tensors
        hidden = hidden_NH.to(ctx.dtype)
        hidden_grad = torch.zeros_like(hidden, dtype=_wide(ctx.dtype)) if ctx.needs_input_grad[0] else None
        weight_grad = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(hidden, weight_VH):
                weight_SH = _read(weight_VH, rows, ctx.dtype, ctx.read_rows)
                logits_NS, pull_back = _logits(hidden, weight_SH, ctx.transform)
                column_N1, is_inside_N1 = _columns(target_N, rows)
                logits_NS.sub_(logsumexp_N1).exp_()
                logits_NS.scatter_add_(1, column_N1, -is_inside_N1.to(logits_NS.dtype))
                grad_NS = pull_back(logits_NS.mul_(grad_N[:, None])).to(ctx.dtype)
                del logits_NS, pull_back
                if hidden_grad is not None:
                    hidden_grad += grad_NS @ weight_SH
                if weight_grad is not None:
                    weight_grad[rows] = grad_NS.T @ hidden
        hidden_grad = None if hidden_grad is None else hidden_grad.to(hidden_NH.dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _read(weight_VH: Tensor, rows: slice, dtype: torch.dtype, read_rows: ReadRows | None) -> Tensor:
    return weight_VH[rows].to(dtype) if read_rows is None else read_rows(rows, dtype)


def _slices(hidden_NH: Tensor, weight_VH: Tensor) -> list[slice]:
    """Cut the vocabulary so that N × S stays small, into equal slices; only the last may be smaller."""
    step = max(SLICE_ELEMENTS // max(len(hidden_NH), 1), 256)
    return cut(len(weight_VH), step, like=hidden_NH)


def _columns(target_N: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return each target's column in a slice, [N, 1], and whether the target is in the slice."""
    column_N1 = (target_N - rows.start)[:, None]
    width = rows.stop - rows.start
    return column_N1.clamp(0, width - 1), (column_N1 >= 0) & (column_N1 < width)


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, transform: Transform | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return logits in wide precision, free to overwrite, and a map of their gradient to that of h Wᵀ."""
    raw = hidden_NH @ weight_VH.T
    wide = _wide(raw.dtype)
    if transform is None:
        return raw.to(wide), lambda grad: grad
    with torch.enable_grad():
        leaf = raw.detach().requires_grad_()
        changed = transform(leaf).to(wide)
    return changed.detach().clone(), lambda grad: torch.autograd.grad(changed, leaf, grad)[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
