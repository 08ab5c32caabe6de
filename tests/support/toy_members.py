"""Members that a user could add from outside: a schedule, a step and a sampler, each in a few lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune import LISA, LayerMap, Sampler
from lisatune.lisa import BlockSchedule, BlockStatistics
from lisatune.methods import Method, TrainingStep

EVERY = 3


class FreezeUpwards(BlockSchedule):
    """Block 0 freezes for good after `EVERY` steps, block 1 after twice as many, and so on."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, layers: LayerMap) -> None:
        self.blocks = [tuple(block.values()) for block in layers.block_parameters(model)]
        self.optimizer = optimizer
        self.steps = 0
        self.held = False
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_post_hook(self._freeze)
        optimizer.register_load_state_dict_pre_hook(self._load)
        self._freeze()

    def describe(self) -> dict[str, Any]:
        return {"active_blocks": self.active_blocks}

    def summarize(self) -> dict[str, Any]:
        return {"proof": f"{self.steps} steps: frozen from below"}

    def possible_draws(self, total_steps: int) -> set[tuple[int, ...]]:
        last = len(self.blocks)
        return {tuple(range(first, last)) for first in range(min(total_steps // EVERY + 1, last))}

    def hold(self, blocks: Sequence[int]) -> None:
        self.held, self.active_blocks = True, tuple(blocks)
        self._set()

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self._freeze()

    def _freeze(self, *_: Any) -> None:
        if not self.held:
            first = min(self.steps // EVERY, len(self.blocks) - 1)
            self.active_blocks = tuple(range(first, len(self.blocks)))
            self._set()

    def _set(self) -> None:
        for index, block in enumerate(self.blocks):
            for p in block:
                p.requires_grad_(index in self.active_blocks)
                if not p.requires_grad:
                    p.grad = None
                    self.optimizer.state.pop(p, None)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["freeze_upwards"] = {"steps": self.steps}

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["freeze_upwards"]["steps"]


@dataclass(frozen=True, kw_only=True)
class FreezeMethod(Method):
    """The schedule as a method of recipes."""

    name = "freeze_upwards"

    def attach(
        self, model: nn.Module, optimizer: Optimizer, layers: LayerMap, *, total_steps: int
    ) -> BlockSchedule:
        return FreezeUpwards(model, optimizer, layers)


class TwoForwards(TrainingStep):
    """MeZO in short: the slope along a random direction, from two forward passes without backward."""

    distance: ClassVar[float] = 1e-2

    @torch.no_grad()
    def backward(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        directions = [torch.randn_like(p) for p in parameters]
        losses = []
        for far in (self.distance, -2 * self.distance):
            torch._foreach_add_(parameters, directions, alpha=far)
            sums = [self.loss({name: ids.to(self.device) for name, ids in b.items()}) for b in batches]
            losses.append(sum(loss for loss, _ in sums) / sum(int(count) for _, count in sums))
        torch._foreach_add_(parameters, directions, alpha=self.distance)
        slope = (losses[0] - losses[1]) / (2 * self.distance)
        for p, direction in zip(parameters, directions, strict=True):
            p.grad = direction * slope
        return losses[0]


@dataclass(frozen=True, kw_only=True)
class ForwardMethod(Method):
    """The step as a method of recipes."""

    name = "two_forwards"

    def build_step(self, model: nn.Module, loss: Any, optimizer: Optimizer, **options: Any) -> TrainingStep:
        return TwoForwards(model=model, loss=loss, optimizer=optimizer, **options)


@dataclass(frozen=True)
class LargestGradient(Sampler):
    """The blocks whose gradients were largest when they last trained; those never tried come first."""

    num_blocks: int
    active: int
    reads = ("gradient_norm", "update_norm", "weight_norm", "visits", "weight_history")

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics) -> tuple[int, ...]:  # type: ignore[override]
        norms = statistics.gradient_norm
        assert norms is not None
        order = norms.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)
        return tuple(sorted(order[: self.active].tolist()))

    def inclusion(self) -> tuple[float, ...]:
        return (self.active / self.num_blocks,) * self.num_blocks


@dataclass(frozen=True, kw_only=True)
class SamplerMethod(Method):
    """LISA with the sampler, as a method of recipes."""

    name = "largest_gradient"

    def attach(
        self, model: nn.Module, optimizer: Optimizer, layers: LayerMap, *, total_steps: int
    ) -> BlockSchedule:
        sampler = LargestGradient(layers.num_blocks, 2)
        return LISA(model, optimizer, period=2, sampler=sampler, layers=layers, total_steps=total_steps)
