"""How much memory a run takes, known before any weights load.

The plan makes two training steps with fake tensors: the model from its config, prepared by the method, our
loss, our optimizer, the step that `train` runs. The second step counts: the optimizer's state exists by then.
What is added up are live tensors (`lisatune.storage`); an accelerator's own context, what kernels allocate
inside and fragmentation come on top, see `RESERVE_BYTES` and `RESERVE_SHARE`.
"""

import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune import models
from lisatune.assemble import Built, build, weight_dtype
from lisatune.estimate import divided, estimate
from lisatune.fake import fake_storage, fake_tensors
from lisatune.lisa import LISA
from lisatune.loss import CausalLMLoss
from lisatune.prepare import max_positions
from lisatune.recipe import Recipe
from lisatune.shapes import shape_config
from lisatune.storage import StepMemory, StorageTracker

__all__ = ["RESERVE_BYTES", "RESERVE_SHARE", "MemoryPlan", "plan_memory"]

RESERVE_BYTES = 600 * 2**20
"""Kept free on an accelerator: its context, its libraries' workspaces."""

RESERVE_SHARE = 0.05
"""Kept free on top, as a share of the plan: what kernels allocate inside, fragmentation."""

UNKNOWN_STEPS = 1000
"""Steps assumed for a run whose length isn't given: enough for LISA to draw every block."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(StepMemory):
    """Memory of a training step on one device, and of which step that is."""

    kind: str
    """`traced`; `traced, divided by ranks`; or `arithmetic` where the model can't be traced."""

    batch_size: int
    """Sequences per micro-step."""

    length: int
    """Tokens per sequence."""

    ranks: int
    """Devices that share weights, gradients and optimizer state."""

    active_blocks: tuple[int, ...] | None
    """Blocks that train in the planned period, the costliest of the run; None for methods without draws."""

    trainable: int
    """Parameters that train in it."""

    seconds: float
    """What making the plan took."""

    note: str | None = None
    """What keeps the plan from being exact."""

    @property
    def needed_bytes(self) -> int:
        """What a device must have free: the peak and the reserve."""
        return round(self.peak_bytes * (1 + RESERVE_SHARE)) + RESERVE_BYTES

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, numbers and strings."""
        values = asdict(self) | {"needed_bytes": self.needed_bytes}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def plan_memory(
    recipe: Recipe,
    *,
    ranks: int = 1,
    length: int | None = None,
    blocks: tuple[int, ...] | None = None,
    config: Any = None,
) -> MemoryPlan:
    """Plan the memory of a recipe's training step.

    Every sequence is taken as long as `length`, with loss on every token: the most a batch can be.

    Args:
        recipe: the recipe; its data isn't read.
        ranks: devices among which weights, gradients and optimizer state are divided.
        length: tokens per sequence. Default: `data.max_length`, or what the model can read.
        blocks: blocks that train, for a method that draws. Default: the costliest draw of the run.
        config: the model's transformers config. Default: that of `model.name`.

    Raises:
        ValueError, OSError, RuntimeError: the recipe can't be used, as in `train`.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1, got {ranks}")
    started = time.perf_counter()
    run = replace(recipe.run, compile=False)  # compiled blocks keep what these keep, or less
    recipe = replace(recipe, method=recipe.method.without_proof(), run=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they come with the run
        model = _shapes(recipe, config)
        length = length or recipe.data.max_length
        length = min(length, max_positions(model) or length)
        batches = [_batch(recipe, model, length)] * min(recipe.run.accumulation, 2)
        with torch.random.fork_rng(devices=[]), ExitStack() as stack:

            def materialise(prepared: nn.Module) -> None:  # not before: PEFT can't adapt fake tensors
                stack.enter_context(fake_tensors())
                fake_storage(prepared)

            built = build(
                recipe,
                model,
                CausalLMLoss(model, prove=False),
                steps=recipe.run.steps or UNKNOWN_STEPS,
                device=torch.device("cpu"),
                materialise=materialise,
            )
            if built.lisa is not None:
                built.lisa.activate(blocks or costliest_draw(built.lisa, recipe.run.steps or UNKNOWN_STEPS))
            kind, note = "traced", None
            try:
                memory = _trace(built, batches)
            except Exception as error:  # a model's own code can raise anything on tensors without values
                kind, note = "arithmetic", _why_untraced(built, batches, error)
                memory = estimate(built, recipe, length)
            if ranks > 1:
                kind = f"{kind}, divided by ranks"
                memory = divided(memory, built.model, built.layers, ranks)
            return MemoryPlan(
                **asdict(memory),
                kind=kind,
                batch_size=recipe.run.batch_size,
                length=length,
                ranks=ranks,
                active_blocks=None if built.lisa is None else built.lisa.active_blocks,
                trainable=sum(p.numel() for p in built.model.parameters() if p.requires_grad),
                seconds=time.perf_counter() - started,
                note=note,
            )


def costliest_draw(lisa: LISA, steps: int) -> tuple[int, ...]:
    """Of a run's draws, the one that needs most memory.

    That is one of the most blocks, with the lowest block: backward goes down to it where the embedding rests.
    """
    periods = range(min(-(-steps // lisa.period), UNKNOWN_STEPS))
    draws = {lisa.sampler.draw(period, seed=lisa.seed) for period in periods}
    return max(draws, key=lambda draw: (len(draw), -min(draw, default=0), draw))


def _shapes(recipe: Recipe, config: Any) -> Any:
    """The recipe's model on the meta device."""
    dtype = weight_dtype(recipe)
    name, attention = recipe.model, recipe.model.attention
    if config is None and not Path(name.name).exists():
        config = shape_config(name.name)
    if config is None:
        return models.meta_model(
            name.name,
            revision=name.revision,
            trust_remote_code=name.trust_remote_code,
            attention=attention,
            dtype=dtype,
            needs_weights=False,
        )
    return models.model_from_config(config, attention=attention, dtype=dtype)


def _batch(recipe: Recipe, model: nn.Module, length: int) -> dict[str, Tensor]:
    """A real batch of the largest kind, each id int64 [B, T]; packed, each row holds two records."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    positions_T = torch.arange(length)
    ids_BT = (positions_T % embedding.weight.shape[0]).expand(recipe.run.batch_size, -1)
    if recipe.data.packing:
        positions_T = positions_T % max(length // 2, 1)
    return {
        "input_ids": ids_BT,
        "labels": ids_BT,
        "position_ids": positions_T.expand(recipe.run.batch_size, -1),
    }


def _trace(built: Built, batches: list[dict[str, Tensor]]) -> StepMemory:
    with StorageTracker(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            built.step.backward(batches)
            built.step.clip()
            built.step.update()
            memory = tracker.end_step()
    return memory


def _why_untraced(built: Built, batches: list[dict[str, Tensor]], error: Exception) -> str:
    """Run the step once more to see which module fails."""
    inside: list[str] = []
    handles = []
    for name, module in built.model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
            module.register_forward_hook(lambda *_: inside.pop() and None),
        ]
    try:
        built.step.backward(batches)
    except Exception as again:
        error = again
    finally:
        for handle in handles:
            handle.remove()
        built.step.skip()
    where = (
        f"module {inside[-1]} ({type(built.model.get_submodule(inside[-1])).__name__})"
        if inside
        else "the step"
    )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{where} can't be traced ({reason}); the figures are arithmetic, and rough in activations"
