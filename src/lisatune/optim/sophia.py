r"""SophiaG (Liu et al., arXiv 2305.14342, algorithms 2 and 3): steps clipped by an estimate of curvature.

With g the gradient, ĝ that of the loss on labels which the model itself has drawn, B labels in a batch (the
loss is their mean), and ĝ only every k = 10 steps:

    m ← β1 m + (1 - β1) g
    h ← β2 h + (1 - β2) B ĝ²                           every k steps      (Gauss-Newton-Bartlett, algorithm 2)
    θ ← θ - lr λ θ
    θ ← θ - lr sign(m) min(|m| / max(ρ h, 1e-15), 1)

Where h is small every element moves by lr, as in sign descent; ρ is to be chosen so that between 10 % and
50 % of elements are not clipped (section 3.1). The estimate needs a forward pass to draw labels and a
forward and backward pass with them; `lisatune.methods.sampled_labels` makes them.

Two things differ from the authors' code. A parameter without an estimate takes the first one whole, not
1 - β2 of it. And the estimate is made anew whenever a parameter that trains has none: a block that LISA thaws
has lost it, and with h = 0 all of its elements would step by lr.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["SophiaG"]


class SophiaG(Optimizer):
    """Sign momentum, clipped by an estimate of the diagonal of the Hessian.

    Args:
        params: parameters or param groups, float32 or float64.
        lr: learning rate, the largest change of an element in a step.
        betas: decay rates of the moment and of the estimate, each in [0, 1).
        rho: ρ > 0, how strongly curvature shortens steps.
        weight_decay: decoupled.
        every: k >= 1, steps between two estimates.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.0,
        every: int = 10,
    ) -> None:
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("rho", rho, rho > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("every", every, isinstance(every, int) and every >= 1),
        ):
            if not fits:
                raise ValueError(f"{name} of SophiaG is out of range, got {value}")
        # The count is in the groups so that it is part of state_dict; no update depends on it.
        options = {"lr": lr, "betas": tuple(betas), "rho": rho, "weight_decay": weight_decay}
        super().__init__(params, options | {"every": every, "steps": 0})

    @property
    def steps_done(self) -> int:
        """Steps that were made; a new estimate's random numbers depend on it."""
        return int(self.param_groups[0]["steps"])

    @property
    def wants_estimate(self) -> bool:
        """Whether curvature must be estimated before the next step."""
        training = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        is_due = self.steps_done % self.param_groups[0]["every"] == 0
        return is_due or any("hessian" not in self.state.get(p, {}) for p in training)

    @torch.no_grad()
    def update_hessian(self, num_labels: int) -> None:
        """Take `.grad` as ĝ, the gradient of the mean loss over `num_labels` labels drawn by the model."""
        for group in self.param_groups:
            beta = group["betas"][1]
            for p in group["params"]:
                if p.grad is None:
                    continue
                estimate = num_labels * p.grad.square()
                state = self.state[p]
                if "hessian" in state:
                    state["hessian"].lerp_(estimate, 1 - beta)
                else:
                    state["hessian"] = estimate

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)
            group["steps"] += 1
        return loss

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        moment = state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
        hessian = state.get("hessian")
        curvature = torch.zeros_like(p) if hessian is None else group["rho"] * hessian
        share = (moment.abs() / curvature.clamp_min(1e-15)).clamp_max(1)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcmul_(moment.sign(), share, value=-group["lr"])
