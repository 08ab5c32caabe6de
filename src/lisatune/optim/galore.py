r"""AdamW on gradients that are projected to a low rank (GaLore: Zhao et al., arXiv 2403.03507).

Every T steps (`gap`) a matrix W [m, n] gets a new basis from the singular vectors of its gradient G = U S Vᵀ
(sections 3 and 4, Algorithm 1). Only the smaller side is projected (section 4.2):

    m >= n      Q = V[:, :r]    R = G Q         [m, r]      W ← W + α N Qᵀ
    m <  n      P = U[:, :r]    R = Pᵀ G        [r, n]      W ← W + α P N

N is AdamW's step for the gradient R, -lr·m̂/(√v̂ + eps). Its moments have the shape of R and are kept
through a change of basis, as in the paper. α is `scale`. Weight decay acts on W, not on N.

For a matrix r·max(m, n) numbers are kept for each moment and r·min(m, n) for the basis, instead of 2·m·n.
Gradients are whole: all of them exist at once unless updates are made in backward.

Shapes: m, n rows and columns of a weight, r its rank; a basis is [min(m, n), r].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed.shards import part_of, part_to_update
from lisatune.optim import codecs
from lisatune.optim.adamw import AdamW
from lisatune.optim.chunks import flatten, on_device
from lisatune.optim.group import Group
from lisatune.optim.state import low_rank_shape, prepare, unprojected

__all__ = ["GaLoreAdamW", "basis_of", "is_projected"]


class GaLoreAdamW(AdamW):
    """AdamW whose param groups may hold matrices to be projected; any other group is `lisatune.AdamW`'s.

    A group of matrices says so by `rank` (r, below both sides of its matrices), `gap` (T, steps from one
    basis to the next) and `scale` (α). All options of `lisatune.AdamW` hold, those of moments for moments of
    the projected gradient. State of a matrix: these, the remainder of a bf16 weight, and `basis` (float32,
    or float64 beside float64 weights).

    Raises:
        ValueError: as in `lisatune.AdamW`; a rank or a gap is out of range.

    Example:
        >>> matrix, vector = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(4))
        >>> projected = {"params": [matrix], "rank": 2, "gap": 200, "scale": 0.25}
        >>> optimizer = GaLoreAdamW([projected, {"params": [vector]}], lr=1e-3)
        >>> (matrix @ vector).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[matrix]["exp_avg"].shape, optimizer.state[matrix]["basis"].shape
        (torch.Size([8, 2]), torch.Size([4, 2]))
    """

    def _update(self, group: Group, ready: Sequence[tuple[int, nn.Parameter]]) -> None:
        if "rank" not in group:
            super()._update(group, ready)
            return
        for place, parameter in ready:
            state, p = self.state[parameter], part_to_update(parameter)
            is_new = "basis" not in state or group["steps_done"] % group["gap"] == 0
            prepare(group, p, state)
            if is_new:
                assert p.grad is not None
                state["basis"].copy_(basis_of(p.grad, group["rank"]))
            key = codecs.key_of(group["seed"], group["steps_done"], place)
            self._update_projected(group, p, state, key)

    def _update_projected(self, group: Group, p: Tensor, state: dict[str, Any], key: int) -> None:
        assert p.grad is not None
        basis = state["basis"]
        gradient = p.grad.to(basis.dtype)
        is_tall = p.shape[0] >= p.shape[1]
        step = torch.zeros(low_rank_shape(group, p), dtype=basis.dtype, device=p.device)
        step.grad = gradient @ basis if is_tall else basis.T @ gradient
        del gradient
        plain = unprojected(group)
        plain["weight_decay"] = 0.0
        moments = {name: value for name, value in state.items() if name not in ("basis", "remainder")}
        self._update_alone(plain, step, moments, key, part_of(step))  # from zero: what is left in `step` is N
        step.grad = None

        left, right = (step, basis.T) if is_tall else (basis, step)
        kept = {"remainder": state["remainder"].view(-1)} if "remainder" in state else {}
        rounding, key = group["rounding"], codecs.key_of(key, 1)
        with flatten(p) as weight:
            for _, here in on_device(kept, p.numel(), p.numel(), p.device):
                with codecs.in_float32(weight, here.get("remainder"), rounding, key) as exact:
                    exact.mul_(1 - group["lr"] * group["weight_decay"])
                    exact.view(p.shape).addmm_(left, right, alpha=group["scale"])


def is_projected(p: Tensor, rank: int) -> bool:
    """Whether projecting a parameter to `rank` saves memory: a matrix with both sides larger."""
    return p.ndim == 2 and min(p.shape) > rank


def basis_of(gradient: Tensor, rank: int) -> Tensor:
    """Return the leading singular vectors of the gradient's smaller side, [min(m, n), rank].

    Computed in float32, or float64 for such a gradient. If the gradient is not finite, they are NaN,
    as any update from it would be.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    try:
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in its __all__
        if torch.isfinite(wide).all():
            raise
        return wide.new_full((min(wide.shape), rank), torch.nan)
    basis: Tensor = right[:rank].T if wide.shape[0] >= wide.shape[1] else left[:, :rank]
    return basis
