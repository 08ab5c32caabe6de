"""Muon for the matrices of blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum M of a matrix by an
orthogonal matrix near it, U Vᵀ of M = U S Vᵀ, approximated by five Newton-Schulz steps. Its moment takes 4
bytes per element, half of AdamW's. Both parts are torch's own. With `match_rms_adamw` (Liu et al., arXiv
2502.16982, section 2.2) an update of a matrix [A, B] is 0.2·√max(A, B) times as long as the orthogonal one,
so that its root mean square is that of AdamW's and one learning rate serves both.

Muon counts no steps, and AdamW counts them per parameter, so a block that thaws anew starts right.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["MuonWithAdamW"]


class MuonWithAdamW(Optimizer):
    """Muon for some param groups and AdamW for the others.

    Args:
        groups: param groups. Those with `"matrices": True` hold parameters of two dimensions, for Muon.
        lr: learning rate of both.
        betas, eps: of AdamW.
        weight_decay: decoupled, of both.
        options: further arguments of `torch.optim.Muon`, such as momentum and ns_steps.

    Raises:
        ValueError: a group for Muon has a parameter that is no matrix, or an option is out of range.
        TypeError: torch's Muon has no such option.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        parts: dict[bool, Optimizer] = {}
        matrices = [group for group in groups if group.get("matrices")]
        others = [group | {"matrices": False} for group in groups if not group.get("matrices")]
        if matrices:
            options = {"adjust_lr_fn": "match_rms_adamw"} | options
            parts[True] = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **options)
        if others:
            # Not foreach, which takes memory for all parameters at once.
            parts[False] = torch.optim.AdamW(
                others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
            )
        self._parts = parts
        super().__init__([group for part in parts.values() for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrices, part in self._parts.items():
            # Groups and state are this optimizer's: loading a checkpoint replaces both.
            part.param_groups = [group for group in self.param_groups if group["matrices"] is matrices]
            part.state = self.state
            inspect.unwrap(type(part).step)(part)  # without hooks: this is one optimizer's step, not two
        return loss
