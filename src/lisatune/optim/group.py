"""A param group of `lisatune.AdamW`: its keys and the values that they take."""

from typing import Literal, NotRequired, TypedDict

from torch import Tensor, nn

__all__ = ["Group", "Moments", "Rounding", "StateDevice"]

Rounding = Literal["exact", "stochastic", "nearest"]
"""How an update goes into bf16 weights; the table in `lisatune.optim.adamw` compares them."""


Moments = Literal["fp32", "bf16", "8bit", "factored"]
"""How moments are stored."""


StateDevice = Literal["cpu"]
"""Device of moments and remainders if it is not the weight's."""


class Group(TypedDict):
    """What every part of the optimizer reads; checked by `lisatune.optim.state.check_group`."""

    params: list[nn.Parameter]
    lr: float | Tensor
    """>= 0; a tensor is a scalar."""
    betas: tuple[float, float]
    """Decay of the first and the second moment, each in [0, 1)."""
    eps: float
    weight_decay: float
    """λ of w ← w - lr·λ·w, >= 0."""
    rounding: Rounding
    moments: Moments
    state_device: StateDevice | None
    rows: bool
    """Whether gradients are sparse and only their rows are updated (`lisatune.optim.rows`)."""
    span: NotRequired[tuple[int, int]]
    """First and last row that train, if `rows` are always the same; the rest of the gradient is dropped."""
    seed: int
    """Names the random numbers of stochastic rounding."""
    steps_done: int
    """Steps before this one."""
    rank: NotRequired[int]
    """r, if gradients are projected (`lisatune.optim.galore`); such a group also has `gap` and `scale`."""
    gap: NotRequired[int]
    """T, steps from one basis to the next."""
    scale: NotRequired[float]
    """α."""
