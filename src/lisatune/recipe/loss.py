"""The section `loss` of a recipe."""

import math
from dataclasses import dataclass
from typing import Literal

from lisatune.recipe.values import check_choices

__all__ = ["LossConfig"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    name: Literal["causal_lm", "dpo", "reward"] = "causal_lm"
    """causal_lm: the next token of every answer. dpo: prefer one answer of a pair (chosen, rejected).
    reward: give the chosen answer a higher score; the result is a reward model."""

    beta: float = 0.1
    """β of dpo, > 0: how strongly the model is held to what it was before training."""

    center: float = 0.0
    """c of reward, >= 0: how strongly the mean of a pair's scores is drawn to 0."""

    def __post_init__(self) -> None:
        check_choices("loss", self)
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"loss.beta must be a positive number, got {self.beta}")
        if self.name != "dpo" and self.beta != LossConfig.beta:
            raise ValueError(
                f"loss.beta={self.beta:g} does nothing with loss.name={self.name}; leave it out, or use dpo"
            )
        if not (self.center >= 0 and math.isfinite(self.center)):
            raise ValueError(f"loss.center must be a number >= 0, got {self.center}")
        if not self.has_score and self.center:
            raise ValueError(
                f"loss.center={self.center:g} does nothing with loss.name={self.name}; leave it out, or use "
                "reward"
            )

    @property
    def rows_per_record(self) -> int:
        """Sequences that a record makes: 2 if records are pairs of answers, else 1."""
        return 1 if self.name == "causal_lm" else 2

    @property
    def has_reference(self) -> bool:
        """Whether it compares with the model before training."""
        return self.name == "dpo"

    @property
    def has_score(self) -> bool:
        """Whether the model gives a score to a whole answer, and writes no text."""
        return self.name == "reward"

    @property
    def text(self) -> str:
        """The loss and its settings for a reader."""
        if self.has_reference:
            return f"{self.name} with β {self.beta:g}"
        return f"{self.name} centred with c {self.center:g}" if self.center else self.name
