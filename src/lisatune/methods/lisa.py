"""LISA as a method of a recipe. The algorithm is in `lisatune.lisa`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, final

import torch
from torch import nn

from lisatune.lisa.correction import READ, Corrected, Correction
from lisatune.lisa.ends import Ends, EndsPolicy
from lisatune.lisa.frozen_state import StatePolicy
from lisatune.lisa.frozen_weights import FrozenWeights
from lisatune.lisa.importance import Measured
from lisatune.lisa.lisa import LISA
from lisatune.lisa.proof import Verify
from lisatune.lisa.rates import Scaling
from lisatune.lisa.samplers import Independent, Sampler, SamplerName
from lisatune.methods.base import Alternatives, Method, halve
from lisatune.methods.optimizers import build_optimizer, check_thaw
from lisatune.methods.sampler_file import STUDIES, FromFile, describe_layers, read_sampler_file
from lisatune.nn.coded import Masters
from lisatune.nn.codes import Scales
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.nn.nf4 import check_nf4
from lisatune.nn.units import divide_blocks
from lisatune.recipe import DataConfig, LossConfig, OptimizerConfig, RunConfig

__all__ = ["Lisa"]


@final
@dataclass(frozen=True, kw_only=True)
class Lisa(Method):
    """Ends and a few drawn blocks train, all other blocks are frozen until they are drawn."""

    name = "lisa"
    shards = True

    active: int = 2
    """Blocks that train at once, γ in the paper."""

    unit: Literal["block", "module"] = "block"
    """What is drawn: blocks, or modules of blocks (q, k, …, down) with as many parameters as γ blocks."""

    period: int | Literal["auto"] = 10
    """Optimizer steps between two draws, K in the paper. auto: every block trains at least twice."""

    sampler: Literal[SamplerName, Measured, FromFile, "weighted", "independent"] = "permutation"
    """How blocks are drawn. weighted, independent: `probabilities`; file, weight-norm, outlier: that file."""

    probabilities: tuple[float, ...] | None = None
    """One number per block, or unit, for the samplers `weighted` and `independent`."""

    sampler_file: str | None = None
    """JSON or safetensors with a probability per block: `lisatune study` writes it for `weight-norm`, …"""

    seed: int = 0
    """Seed of the draws alone. `ascending` and `descending` draw nothing at random."""

    state: StatePolicy = "drop"
    """What happens to the optimizer state of a block that freezes."""

    warmup: int = 0
    """Steps at the start of a period over which a thawed block's learning rate ramps up."""

    lr_scaling: Scaling = "sqrt"
    """A block's learning rate is lr/√π, lr/π or lr, π its chance to train; `lr` is full fine-tuning's."""

    ends: str = "train"
    """Which ends train, when, with what state: train head frozen every:M 8bit factored cpu rows, by +. Or
    rows:A-B alone: these rows of embedding and head."""

    frozen_weights: Literal["exact", "int8", "mixed", "nf4"] = "exact"
    """What the device holds of frozen blocks and ends: exact weights, or codes, with exact ones elsewhere."""

    frozen_scales: Scales = "8bit"
    """How NF4 stores its scales."""

    master: Literal["auto", "ram", "disk"] = "auto"
    """Where exact frozen weights are; auto: in RAM if they take less than 40 % of what is free."""

    correction: Literal["none", "lora", "sign"] = "none"
    """How frozen blocks learn in every step: lora, adapters that are merged at the end; sign, signSGD."""

    correction_rank: int = 8
    """Rank of the adapters."""

    correction_lr: float = 1e-3
    """Learning rate of the adapters; it follows `optimizer.schedule`."""

    correction_lr_ratio: float = 1.0
    """Learning rate of an adapter's matrix B, as a multiple of A's (LoRA+)."""

    correction_blocks: Corrected = "all"
    """`above`: only adapters of the lowest active block and above it train, so that backward ends there.
    `frozen`: adapters of active blocks rest."""

    correction_matrices: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as o_proj. Default: all of the blocks."""

    correction_share: float = 0.1
    """Under sign: a frozen number moves by this share of the learning rate."""

    verify: Verify = "sample"
    """How much of every block is hashed each period to prove that drawn blocks moved and no other did."""

    def __post_init__(self) -> None:
        try:
            EndsPolicy.parse(self.ends)
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        self._check_correction()
        if self.correction == "sign" and self.frozen_weights != "exact":
            raise ValueError(
                "method.correction sign moves frozen weights by less than the spacing of codes; set "
                "method.frozen_weights: exact, or method.correction: lora"
            )
        for key, codes in (("frozen_scales", ("mixed", "nf4")), ("master", ("int8", "mixed", "nf4"))):
            if self.frozen_weights not in codes and getattr(self, key) != getattr(Lisa, key):
                raise ValueError(
                    f"method.{key} {getattr(self, key)} does nothing with method.frozen_weights "
                    f"{self.frozen_weights}; leave it out, or use {', '.join(codes[:-1])} or {codes[-1]}"
                )
        reads_probabilities = self.sampler in ("weighted", "independent")
        if reads_probabilities and self.probabilities is None:
            raise ValueError(
                f"method.sampler {self.sampler} needs method.probabilities, one number per block"
            )
        if not reads_probabilities and self.probabilities is not None:
            raise ValueError(
                f"method.probabilities does nothing with method.sampler {self.sampler}; leave it out, or use "
                "weighted or independent"
            )
        reads_file = self.sampler in ("file", *STUDIES)
        if reads_file and self.sampler_file is None:
            made = f", which lisatune study {STUDIES[self.sampler]} writes" if self.sampler in STUDIES else ""
            raise ValueError(f"method.sampler {self.sampler} needs method.sampler_file{made}")
        if not reads_file and self.sampler_file is not None:
            raise ValueError(
                f"method.sampler_file does nothing with method.sampler {self.sampler}; leave it out, or use "
                "file, weight-norm or outlier"
            )
        if self.unit == "module" and self.sampler == "window":
            raise ValueError(
                "method.sampler window draws neighbouring blocks and does not know modules; use permutation, "
                "or method.unit: block"
            )

    def _check_correction(self) -> None:
        try:
            self._correction()
        except ValueError as error:
            raise ValueError(f"method.{error}") from error
        read = () if self.correction == "none" else READ[self.correction]
        for field in fields(self):
            name = field.name.removeprefix("correction_")
            if name != field.name and name not in read and getattr(self, field.name) != field.default:
                others = " or ".join(kind for kind, names in READ.items() if name in names)
                raise ValueError(
                    f"method.{field.name} does nothing with method.correction {self.correction}; leave it "
                    f"out, or set method.correction: {others}"
                )

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse what cannot work beside `unit: module` or `correction: sign`, and a bad `sampler_file`."""
        if self.sampler_file is not None:
            read_sampler_file(self.sampler_file, self.sampler)
        if self.unit == "module" and run.compile is True:
            raise ValueError(
                "run.compile builds graphs of whole blocks, frozen or active, and method.unit: module trains "
                "parts of them, so each draw would compile anew; set run.compile: false, or use method.unit: "
                "block"
            )
        if self.correction == "sign" and run.accumulation > 1:
            raise ValueError(
                "method.correction sign moves frozen weights in backward, before the next micro-step could "
                f"add to their gradients, so run.accumulation={run.accumulation} is impossible; set it to 1"
            )

    def check_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Refuse clipping, and updates in backward, beside the correction `sign`."""
        if self.correction == "sign" and optimizer.max_grad_norm is not None:
            raise ValueError(
                "method.correction sign moves frozen weights before all gradients are known, so their global "
                f"norm cannot be clipped to optimizer.max_grad_norm={optimizer.max_grad_norm}; set it to null"
            )
        if self.correction == "sign" and optimizer.in_backward:
            raise ValueError(
                "method.correction sign and optimizer.in_backward would both use the gradients of frozen "
                "blocks; set optimizer.in_backward: false"
            )

    @property
    def masters(self) -> Literal["auto", "ram", "disk"] | None:
        """Where exact frozen weights are kept; None if the device holds them."""
        return None if self.frozen_weights == "exact" else self.master

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse losses that need a score, if the ends do not train: it is one of them."""
        super().check_loss(loss)
        if loss.has_score and EndsPolicy.parse(self.ends).trains in ("none", "rows"):
            raise ValueError(
                f"method.ends={self.ends} cannot work with loss.name={loss.name}: the score would stay "
                "random; set it to head"
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a device on which bitsandbytes cannot store NF4, and an environment without it."""
        if self.frozen_weights in ("mixed", "nf4"):
            check_nf4(device, otherwise="method.frozen_weights: int8")

    @property
    def freezes_ends(self) -> bool:
        """Whether no end trains. Rows of new tokens then train alone (`ends: rows:A-B`)."""
        return EndsPolicy.parse(self.ends).trains == "none"

    def place(self, model: nn.Module, device: torch.device, masters: Masters | None = None) -> None:
        """Move a model onto the device: blocks and resting ends as codes, one weight at a time."""
        if self.frozen_weights != "exact":
            layers = find_layers(model)
            frozen = FrozenWeights(
                model, layers, self.frozen_weights, scales=self.frozen_scales, masters=masters, device=device
            )
            ends = Ends(EndsPolicy.parse(self.ends), model, layers)
            resting = ends.resting if ends.policy.trains_in(0) else (*ends.resting, *ends.parameters)
            for parameter in (*resting, *(p for b in layers.block_parameters(model) for p in b.values())):
                frozen.freeze(parameter, device)
        super().place(model, device)

    def build_optimizer(
        self, model: nn.Module, layers: LayerMap, config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        """Build the recipe's optimizer: `ends` decides the ends' state.

        Raises:
            ValueError: the optimizer would give blocks that thaw a wrong first step.
        """
        check_thaw(config, self.state)
        return build_optimizer(model, layers, config, ends=self.ends)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: LayerMap,
        *,
        total_steps: int,
    ) -> LISA:
        """Attach LISA to the optimizer. It draws the first blocks and freezes the rest."""
        return self.attach_with(self._sampler(model, layers), model, optimizer, layers, total_steps)

    def attach_with(
        self,
        sampler: str | Sequence[float] | Sampler,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: LayerMap,
        total_steps: int,
    ) -> LISA:
        """Attach LISA as `attach` does, but let this sampler draw the blocks and not the one of the keys."""
        return LISA(
            model,
            optimizer,
            active=self.active,
            unit=self.unit,
            period=self.period,
            sampler=sampler,
            seed=self.seed,
            state=self.state,
            ends=self.ends,
            warmup=self.warmup,
            lr_scaling=self.lr_scaling,
            frozen_weights=self.frozen_weights,
            correction=self._correction() or "none",
            verify=self.verify,
            total_steps=total_steps,
            layers=layers,
        )

    def without_proof(self) -> Self:
        """Return LISA without fingerprints."""
        return replace(self, verify="off")

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Return cheaper ends, and fewer or more blocks at once.

        The ends: 8-bit moments, then factored ones, then a head that trains alone, then frozen ends. Blocks:
        half as many, and half of that, down to one; one more, and another, up to all of them. The sampler
        `independent` decides by itself how many train.
        """
        order = ("train", "8bit", "factored", "head+factored", "frozen")
        later = order[order.index(self.ends) + 1 :] if self.ends in order else ("frozen",)
        formats = ("exact", "int8", "mixed", "nf4")
        coarser = formats[formats.index(self.frozen_weights) + 1 :]
        is_free = self.sampler != "independent"
        return Alternatives(
            cheaper_ends=tuple({"ends": ends} for ends in later),
            coarser_weights=tuple({"frozen_weights": name} for name in coarser),
            fewer_weights=tuple({"active": active} for active in halve(self.active) if is_free),
            more_weights=tuple(
                {"active": active} for active in range(self.active + 1, num_blocks + 1) if is_free
            ),
        )

    def _correction(self) -> Correction | None:
        if self.correction == "none":
            return None
        return Correction(
            kind=self.correction,
            rank=self.correction_rank,
            lr=self.correction_lr,
            lr_ratio=self.correction_lr_ratio,
            blocks=self.correction_blocks,
            matrices=self.correction_matrices,
            share=self.correction_share,
        )

    def _sampler(self, model: nn.Module, layers: LayerMap) -> str | tuple[float, ...] | Independent:
        if self.sampler_file is not None:
            drawn = layers if self.unit == "block" else divide_blocks(layers, model)
            file = read_sampler_file(self.sampler_file, self.sampler)
            sizes = [sum(p.numel() for p in each.values()) for each in drawn.block_parameters(model)]
            file.check_model(describe_layers(drawn.blocks, sizes), self.unit)
            return file.probabilities
        if self.sampler == "independent":
            assert self.probabilities is not None
            return Independent(self.probabilities)
        return self.probabilities if self.probabilities is not None else self.sampler
