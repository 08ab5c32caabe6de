"""The section `optimizer` of a recipe."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lisatune.optim.group import Moments, Rounding, StateDevice
from lisatune.recipe.values import at_least, check_choices

__all__ = ["OptimizerConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """Which optimizer: adamw, adafactor, lamb, lars, lion, muon, sgd, sophia, or a class: module.Class."""

    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """More arguments of its class, such as {momentum: 0.9}; for all but adamw."""

    lr: float = 1e-5
    """Peak learning rate."""

    ends_lr: float | None = None
    """Peak learning rate of the ends, which are embedding, head and final norm. Default: `lr`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1). Of adamw, lamb and muon's AdamW."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.0
    """Weight decay, decoupled unless the optimizer adds it to gradients. Adapters have it; of the model's own
    weights all but norms, biases and embeddings."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning rate after warm-up: constant; falling along a cosine or a line; or constant with a fall at the
    end (wsd: warm-up, stable, decay)."""

    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0 to `lr`."""

    warmup_share: float = 0.0
    """The same as a share of the run's steps, 0 <= share < 1. Give one of the two."""

    min_lr_share: float = 0.0
    """Where the learning rate falls to, as a share of `lr`, 0 <= share < 1. wsd warms up from there too."""

    decay_share: float | None = None
    """Share of the run's steps over which wsd falls, 0 < share <= 1. Default: 0.2."""

    max_grad_norm: float | None = 1.0
    """Clip the global norm of the gradients to this value. null: do not clip."""

    rounding: Rounding = "exact"
    """How bf16 weights are updated. exact: as float32 would be, for 2 more bytes per element."""

    moments: Moments = "fp32"
    """How moments are stored: in 8, 4 or 2.03 bytes per trained element, or as means of rows and columns."""

    state_device: StateDevice | None = None
    """cpu: keep moments and remainders in host memory and copy them in pieces. Default: with the weights."""

    in_backward: bool = False
    """Update each parameter as soon as its gradient exists, then free it. Needs max_grad_norm: null."""

    def __post_init__(self) -> None:
        check_choices("optimizer", self)
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "optimizer.in_backward updates weights before all gradients are known, so their global norm "
                f"cannot be clipped to optimizer.max_grad_norm={self.max_grad_norm}; set it to null"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"optimizer.lr must be a positive number, got {self.lr}")
        if self.ends_lr is not None and not (self.ends_lr > 0 and math.isfinite(self.ends_lr)):
            raise ValueError(f"optimizer.ends_lr must be a positive number or null, got {self.ends_lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), got {self.betas}")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ValueError(f"optimizer.eps must be a positive number, got {self.eps}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"optimizer.weight_decay must be a number >= 0, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"optimizer.max_grad_norm must be > 0 or null, got {self.max_grad_norm}")
        at_least(0, "optimizer.warmup_steps", self.warmup_steps)
        self._check_options()
        self._check_schedule()

    def _check_options(self) -> None:
        if not (isinstance(self.options, dict) and all(isinstance(key, str) for key in self.options)):
            raise ValueError(f"optimizer.options must be keys and values, got {self.options!r}")
        if self.options and self.name == "adamw":
            raise ValueError(
                f"optimizer.options {self.options} does nothing with optimizer.name adamw, whose settings "
                "are keys of their own"
            )
        own = {"lr", "weight_decay", "params"} | (
            {"betas", "eps"} if self.name in ("lamb", "muon") else set()
        )
        if clash := own & self.options.keys():
            raise ValueError(
                f"optimizer.options may not have {min(clash)}; it is a key of optimizer itself, which "
                f"optimizer.name {self.name} reads"
            )

    def _check_schedule(self) -> None:
        for name, share in (("warmup_share", self.warmup_share), ("min_lr_share", self.min_lr_share)):
            if not 0 <= share < 1:
                raise ValueError(f"optimizer.{name} must be >= 0 and below 1, got {share}")
        if self.decay_share is not None and not 0 < self.decay_share <= 1:
            raise ValueError(f"optimizer.decay_share must be above 0 and at most 1, got {self.decay_share}")
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} and optimizer.warmup_share="
                f"{self.warmup_share:g} both say how long the warm-up is; give one of them"
            )
        if self.min_lr_share and self.schedule == "constant":
            raise ValueError(
                f"optimizer.min_lr_share={self.min_lr_share:g} does nothing, because the learning rate of "
                "optimizer.schedule=constant does not fall; choose cosine, linear or wsd, or set it to 0"
            )
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_share={self.decay_share:g} belongs to optimizer.schedule=wsd, and the "
                f"schedule is {self.schedule}; set it to null"
            )
        if self.warmup_share + (self.decay_share or 0) > 1:
            raise ValueError(
                f"optimizer.warmup_share={self.warmup_share:g} and optimizer.decay_share="
                f"{self.decay_share:g} are more than the whole run together; lower one of them"
            )
