"""Corrected frozen blocks: what frozen blocks learn while a few others train.

LISA and its relatives minimise the loss over the drawn blocks, while all others are held where they are.
BREAD ("Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Expansion", NeurIPS 2025,
https://openreview.net/forum?id=DBybUx7ARy) lets frozen blocks follow at little cost. With W_l the frozen
weight of a linear layer,

    lora    y = W_l x + s·B_l(A_l x)          A_l [r, in], B_l [out, r], trained by AdamW in every step
    sign    W_l ← W_l - lr·c·sign(dL/dW_l)    in backward, as soon as the gradient is there

`lora`: A and B live for the whole run with their moments, in float32. B is zero at first, so training begins
from the model as it is. A block that thaws keeps its adapters: they stay added, and train beside its weights
unless `blocks` says frozen. Nothing is merged before the end, so codes of frozen weights (QLISA) stay valid,
and a block's weights change only while it is drawn. The model's `state_dict` gives merged weights,
round(W + s·BA), so everything that saves the model saves a plain one.

`sign` is what FRUGAL (Zmushko et al., arXiv 2411.07837) does with all that its optimizer holds no state of.
It stores nothing: the gradient of a frozen weight is freed once it has moved it. A frozen block then moves
too, so a proof can say nothing of it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune.optim.adamw import AdamW

__all__ = [
    "READ",
    "Corrected",
    "Correction",
    "FrozenCorrection",
    "Kind",
    "count_trainable",
    "find_correction",
    "trainable_parameters",
]

Kind = Literal["lora", "sign"]
"""Ways to correct frozen blocks."""

READ: dict[Kind, tuple[str, ...]] = {
    "lora": ("rank", "lr", "lr_ratio", "blocks", "matrices"),
    "sign": ("share",),
}
"""Settings that each kind reads."""

Corrected = Literal["all", "above", "frozen"]
"""Blocks whose adapters train in a step."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How frozen blocks are corrected while others train.

    Example:
        >>> Correction(rank=16, blocks="above")
        Correction(kind='lora', rank=16, lr=0.001, lr_ratio=1.0, blocks='above', matrices=(), share=0.1)
    """

    kind: Kind = "lora"
    """`lora`: low-rank adapters. `sign`: small steps of equal size; it reads `share` alone."""

    rank: int = 8
    """Rank r of the adapters, at most the smaller side of every corrected matrix."""

    lr: float = 1e-3
    """Learning rate of the adapters, > 0. It follows the schedule of the optimizer's own rates."""

    lr_ratio: float = 1.0
    """B's learning rate is `lr_ratio` times A's, > 0 (LoRA+, Hayou et al., arXiv 2402.12354)."""

    blocks: Corrected = "all"
    """`above`: only adapters of the lowest active block and of those above it train. `frozen`: only those of
    frozen blocks. Adapters that rest stay added."""

    matrices: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as o_proj. Default: all of the blocks."""

    share: float = 0.1
    """c of `sign`: a frozen number moves by this share of the optimizer's learning rate, > 0."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"correction must be 'none', 'lora' or 'sign', got {self.kind!r}")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"correction_rank must be a whole number >= 1, got {self.rank!r}")
        for name in ("lr", "lr_ratio", "share"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"correction_{name} must be > 0 and finite, got {value!r}")
        if self.blocks not in get_args(Corrected):
            raise ValueError(f"correction_blocks must be all, above or frozen, got {self.blocks!r}")
        if isinstance(self.matrices, str) or not isinstance(self.matrices, Sequence):
            raise ValueError(
                f"correction_matrices must be a list of names such as ['o_proj'], got {self.matrices!r}"
            )
        object.__setattr__(self, "matrices", tuple(self.matrices))

    @classmethod
    def parse(cls, text: "str | Correction") -> "Correction | None":
        """Read `none`, `lora`, `sign`, or a correction that is made already."""
        if isinstance(text, Correction):
            return text
        return None if text == "none" else cls(kind=text)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Say what a checkpoint compares: the kind, and the settings that it reads."""
        return ", ".join([self.kind, *(f"{name} {getattr(self, name)}" for name in READ[self.kind])])


class FrozenCorrection:
    """What corrects the frozen blocks of a model: the contract that LISA calls. The base corrects nothing.

    LISA calls `train` after each draw and `step` after each step of the optimizer, and saves `state_dict`
    with its own position.
    """

    says = ""
    """What a proof says of the correction, in words."""

    moves_frozen = False
    """Whether the weights of frozen blocks move, so that a proof can say nothing of them."""

    optimizer: Optimizer | None = None
    """Trains what was added to the model; None if nothing was."""

    def __init__(self, model: nn.Module, follows: Optimizer, correction: Correction) -> None:
        self.correction, self._follows = correction, follows
        follows.zero_grad = self._zero_grad  # type: ignore[method-assign]
        model._correction = self  # type: ignore[assignment]
        self._forward_hook = model.register_forward_pre_hook(_forget_left_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """Become None in a copy of the model and in one that is saved whole: nobody trains these."""
        return type(None), ()

    def all_parameters(self) -> list[nn.Parameter]:
        """Return what was added to the model."""
        return []

    def parameters(self) -> list[nn.Parameter]:
        """Return what was added to the model and trains now."""
        return [p for p in self.all_parameters() if p.requires_grad]

    def layers(self) -> dict[str, list[nn.Parameter]]:
        """Return what was added, in parts that a proof names."""
        return {}

    def moving(self, active: Sequence[int]) -> set[str]:
        """Return the names of the `layers` that must move while these blocks train."""
        return set()

    def train(self, active: Sequence[int]) -> None:
        """Correct the other blocks from now on, now that these train."""

    def is_stateless(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the model has gradients now, and the optimizer must not train it."""
        return False

    def groups(self) -> Iterable[Any]:
        """Return the param groups of what was added, with the learning rates of this step."""
        return ()

    def step(self) -> None:
        """End a step: the optimizer has made its own."""

    def make_state(self) -> None:
        """Make the state that the steps to come have."""

    def has_gradients(self) -> bool:
        """Whether a backward pass has left something that belongs to a step to come."""
        return False

    def drop_gradients(self) -> None:
        """Release the gradients of a step that is left out."""

    def forget_left_out(self) -> None:
        """Release the gradients if those of the model's own parameters are gone: the step was left out.

        `optimizer.zero_grad` releases both, `model.zero_grad` and `p.grad = None` the model's alone. An
        update in backward takes the model's gradients too, and no step can be left out after it.
        """
        follows = self._follows
        if isinstance(follows, AdamW) and follows.in_backward is not None:
            return
        if not self.has_gradients():
            return
        if all(p.grad is None for group in follows.param_groups for p in group["params"]):
            self.drop_gradients()

    def merge(self) -> None:
        """Put what was added into the weights, once."""

    def detach(self, model: nn.Module) -> None:
        """Put what was added into the weights, once, and leave the model as it is."""
        vars(self._follows).pop("zero_grad", None)
        self._forward_hook.remove()
        if find_correction(model) is self:
            del model._correction

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError if what `state_dict` returned does not belong to this model."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""

    def load_weights(self, saved: Mapping[str, Any]) -> None:
        """Take what was added to the model out of what `state_dict` returned, and nothing else."""

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Replace the optimizer's `zero_grad`: a step that is left out must not leave gradients behind."""
        self.drop_gradients()
        type(self._follows).zero_grad(self._follows, set_to_none)


def _forget_left_out(model: nn.Module, *_: Any) -> None:
    """Tell the correction that a forward pass begins, as a hook of the model, which a copy keeps too."""
    correction = find_correction(model)
    if correction is not None and not torch.compiler.is_compiling():
        correction.forget_left_out()


def find_correction(model: nn.Module) -> FrozenCorrection | None:
    """Return what corrects a model's frozen blocks; None if nothing does."""
    return vars(model).get("_correction")


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train now, those of adapters beside frozen blocks included."""
    correction = find_correction(model)
    own = [p for p in model.parameters() if p.requires_grad]
    return own if correction is None else own + correction.parameters()


def count_trainable(model: nn.Module) -> int:
    """Count the numbers that train now, those of adapters beside frozen blocks included."""
    return sum(p.numel() for p in trainable_parameters(model))
