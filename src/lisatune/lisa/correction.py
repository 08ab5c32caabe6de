"""Corrected frozen blocks: what frozen blocks learn while a few others train.

LISA and its relatives minimise the loss over the drawn blocks, while all others are held where they are.
BREAD ("Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Expansion", NeurIPS 2025,
https://openreview.net/forum?id=DBybUx7ARy) lets frozen blocks follow at little cost. With W_l the frozen
weight of a linear layer,

    lora    y = W_l x + s·B_l(A_l x)          A_l [r, in], B_l [out, r], trained by AdamW in every step

A and B live for the whole run with their moments, in float32. B is zero at first, so training begins from the
model as it is. A block that thaws keeps its adapters: they stay added and go on training beside its weights.
Nothing is merged before the end, so codes of frozen weights (QLISA) stay valid, and a block's weights change
only while it is drawn. The model's `state_dict` gives merged weights, round(W + s·BA), so everything that
saves the model saves a plain one.
"""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Corrected", "Correction"]

Corrected = Literal["all", "above"]
"""Blocks whose adapters train in a step."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How frozen blocks are corrected while others train.

    Example:
        >>> Correction(rank=16, blocks="above")
        Correction(kind='lora', rank=16, lr=0.001, lr_ratio=1.0, blocks='above', matrices=())
    """

    kind: Literal["lora"] = "lora"
    """`lora`: low-rank adapters."""

    rank: int = 8
    """Rank r of the adapters, at most the smaller side of every corrected matrix."""

    lr: float = 1e-3
    """Learning rate of the adapters, > 0. It follows the schedule of the optimizer's own rates."""

    lr_ratio: float = 1.0
    """B's learning rate is `lr_ratio` times A's, > 0 (LoRA+, Hayou et al., arXiv 2402.12354)."""

    blocks: Corrected = "all"
    """`above`: only adapters of the lowest active block and of those above it train, the others rest."""

    matrices: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as o_proj. Default: all of the blocks."""

    def __post_init__(self) -> None:
        if self.kind != "lora":
            raise ValueError(f"correction must be none or lora, got {self.kind!r}")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"correction_rank must be a whole number >= 1, got {self.rank!r}")
        for name in ("lr", "lr_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"correction_{name} must be > 0, got {getattr(self, name)}")
        if self.blocks not in get_args(Corrected):
            raise ValueError(f"correction_blocks must be all or above, got {self.blocks!r}")
        object.__setattr__(self, "matrices", tuple(self.matrices))

    @classmethod
    def parse(cls, text: "str | Correction") -> "Correction | None":
        """Read `none`, `lora`, or a correction that is made already."""
        if isinstance(text, Correction):
            return text
        return None if text == "none" else cls(kind=text)  # type: ignore[arg-type]
