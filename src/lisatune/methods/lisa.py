"""LISA as a method of a recipe. The algorithm is in `lisatune.lisa`."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from torch import nn

from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.groups import Scaling, lr_factors, scale_block_lr
from lisatune.lisa.lisa import LISA
from lisatune.lisa.samplers import Independent, Sampler, make_sampler
from lisatune.methods.base import Method
from lisatune.methods.optimizers import build_optimizer
from lisatune.nn.layers import LayerMap
from lisatune.recipe import OptimizerConfig

__all__ = ["AsLisa", "Lisa"]


@dataclass(frozen=True, kw_only=True)
class Lisa(Method):
    """Ends and a few drawn blocks train, all other blocks are frozen until they are drawn."""

    shards = True

    name: Literal["lisa"] = "lisa"
    """Way to fine-tune."""

    active: int = 2
    """Blocks that train at once, γ in the paper."""

    period: int | Literal["auto"] = 10
    """Optimizer steps between two draws, K in the paper. auto: every block trains at least twice."""

    sampler: Literal[
        "permutation", "uniform", "window", "ascending", "descending", "weighted", "independent"
    ] = "permutation"
    """How blocks are drawn, `window` neighbours; `weighted` and `independent` read `probabilities`."""

    probabilities: tuple[float, ...] | None = None
    """One number per block for the samplers `weighted` and `independent`."""

    seed: int = 0
    """Seed of the draws alone."""

    state: Literal["drop", "reset", "second_moment", "cpu", "keep"] = "drop"
    """What happens to the optimizer state of a block that freezes."""

    warmup: int = 0
    """Steps at the start of a period over which a thawed block's learning rate ramps up."""

    lr_scaling: Scaling = "sqrt"
    """A block's learning rate is lr/√π, lr/π or lr, π its chance to train; `lr` is full fine-tuning's."""

    ends: str = "train"
    """Which ends train, when, with what state: train head frozen every:M 8bit factored cpu rows, by +."""

    verify: Literal["sample", "full", "off"] = "sample"
    """How much of every block is hashed each period to prove that drawn blocks moved and no other did."""

    def __post_init__(self) -> None:
        try:
            EndsPolicy.parse(self.ends)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        reads_probabilities = self.sampler in ("weighted", "independent")
        if reads_probabilities and self.probabilities is None:
            raise ValueError(
                f"method.sampler {self.sampler} needs method.probabilities, one number per block"
            )
        if not reads_probabilities and self.probabilities is not None:
            raise ValueError(
                f"method.probabilities has no use with method.sampler {self.sampler}; "
                f"choose weighted or independent"
            )

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build AdamW over ends and blocks, the ends' state as `ends` says, rates as `lr_scaling` does."""
        optimizer = build_optimizer(model, layers, config, ends=self.ends)
        scale_block_lr(optimizer, self._chances(layers.num_blocks), self.lr_scaling)
        return optimizer

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: LayerMap,
        *,
        total_steps: int,
    ) -> LISA:
        """Attach LISA to the optimizer: draws the first blocks and freezes the rest."""
        return LISA(
            model,
            optimizer,
            active=self.active,
            period=self.period,
            sampler=self._sampler(),
            seed=self.seed,
            state=self.state,
            ends=self.ends,
            warmup=self.warmup,
            verify=self.verify,
            total_steps=total_steps,
            layers=layers,
        )

    def block_lr_factors(self, num_blocks: int) -> tuple[float, ...]:
        """As `lr_scaling` says."""
        return lr_factors(self._chances(num_blocks), self.lr_scaling)

    def without_proof(self) -> Self:
        """LISA that takes no fingerprints."""
        return replace(self, verify="off")

    def cheaper_ends(self) -> tuple[dict[str, Any], ...]:
        """8-bit moments, then factored ones, then a head that trains alone, then frozen ends."""
        order = ("train", "8bit", "factored", "head+factored", "frozen")
        later = order[order.index(self.ends) + 1 :] if self.ends in order else ("frozen",)
        return tuple({"ends": ends} for ends in later)

    def fewer_weights(self) -> tuple[dict[str, Any], ...]:
        """Half the blocks, and half of that, down to one."""
        if self.sampler == "independent":
            return ()
        halves = (self.active >> shift for shift in range(1, self.active.bit_length()))
        return tuple({"active": active} for active in halves)

    def more_weights(self, num_blocks: int) -> tuple[dict[str, Any], ...]:
        """One block more, and another, up to all of them."""
        if self.sampler == "independent":
            return ()
        return tuple({"active": active} for active in range(self.active + 1, num_blocks + 1))

    def _chances(self, num_blocks: int) -> tuple[float, ...]:
        return _inclusion(make_sampler(self._sampler(), self.active, num_blocks))

    def _sampler(self) -> str | tuple[float, ...] | Independent:
        if self.sampler == "independent":
            assert self.probabilities is not None
            return Independent(self.probabilities)
        return self.probabilities if self.probabilities is not None else self.sampler


@lru_cache(maxsize=8)
def _inclusion(sampler: Sampler) -> tuple[float, ...]:
    """A second of work for `Weighted` with 80 blocks, asked for by optimizer, outline and each plan."""
    return sampler.inclusion()


@dataclass(frozen=True, kw_only=True)
class AsLisa(Method):
    """What is LISA with settings of its own: a subclass says which in `as_lisa`."""

    shards = True

    name: str = ""
    """Way to fine-tune."""

    verify: Literal["sample", "full", "off"] = "sample"
    """How much of every block is hashed each period to prove that what trains moved and nothing else did."""

    def as_lisa(self) -> Lisa:
        """The LISA that this is."""
        raise NotImplementedError

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
        """The same without fingerprints."""
        return replace(self, verify="off")
