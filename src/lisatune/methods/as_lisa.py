"""The bases of methods that are LISA with other settings: a block at a time, blocks that freeze for good."""

import warnings
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from lisatune.lisa.lisa import LISA
from lisatune.lisa.proof import Verify
from lisatune.lisa.samplers import Sampler
from lisatune.methods.base import Method
from lisatune.methods.lisa import Lisa
from lisatune.nn.layers import LayerMap
from lisatune.recipe import LossConfig, OptimizerConfig

__all__ = ["AsLisa", "FreezesByInterval"]


@dataclass(frozen=True, kw_only=True)
class AsLisa(Method):
    """LISA with settings of its own, which a subclass gives in `as_lisa`: the base of `BAdam` and others."""

    shards = True

    verify: Verify = "sample"
    """How much of every block is hashed each period to prove that what trains moved and nothing else did."""

    def as_lisa(self) -> Lisa:
        """Return the LISA that this method is."""
        raise NotImplementedError

    @property
    def freezes_ends(self) -> bool:
        """Whether no end trains. Rows of new tokens then train alone, as in LISA."""
        return self.as_lisa().freezes_ends

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse what that LISA refuses."""
        super().check_loss(loss)
        self.as_lisa().check_loss(loss)

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build that LISA's optimizer."""
        return self.as_lisa().build_optimizer(model, layers, config)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach that LISA."""
        return self.as_lisa().attach(model, optimizer, layers, total_steps=total_steps)

    def without_proof(self) -> Self:
        """Return the method without fingerprints."""
        return replace(self, verify="off")


@dataclass(frozen=True, kw_only=True)
class FreezesByInterval(AsLisa):
    """All blocks train at first, and some freeze for good after an interval of the run.

    The base of `AutoFreeze` and `SmartFRZ`. A subclass gives the sampler, which draws what is not frozen yet.
    """

    intervals: int = 20
    """Number of intervals of a run; blocks may freeze at the end of each, from the second on."""

    ends: str = "head"
    """Which ends train, in the words of LISA's key. With `train` backward always goes to the embedding."""

    def __post_init__(self) -> None:
        if self.intervals < 1:
            raise ValueError(f"method.intervals must be >= 1, got {self.intervals}")
        self.as_lisa()
        try:
            self.make_sampler(1)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error

    def make_sampler(self, num_blocks: int) -> Sampler:
        """Return the sampler that says which blocks still train."""
        raise NotImplementedError

    def as_lisa(self) -> Lisa:
        """Return the LISA with these ends; `attach` gives it sampler and period."""
        return Lisa(ends=self.ends, lr_scaling="none", verify=self.verify)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Attach that LISA with the sampler, and an interval as its period. Warns if no block can freeze."""
        period = -(-total_steps // self.intervals)
        if total_steps <= 2 * period:
            warnings.warn(
                f"method {self.name} will freeze no block: blocks freeze from the end of the second interval "
                f"on, and with method.intervals={self.intervals} the run of {total_steps} steps ends before; "
                "set method.intervals >= 3, and run.steps too",
                stacklevel=2,
            )
        sampler = self.make_sampler(layers.num_blocks)
        lisa = replace(self.as_lisa(), period=period)
        return lisa.attach_with(sampler, model, optimizer, layers, total_steps)
