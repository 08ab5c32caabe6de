"""How much memory a run takes, known before any weights load.

The plan makes a training step with fake tensors: the model from its config, prepared by the method, our
loss, our optimizer with the state it has by then, the step that `train` runs. What is added up are live
tensors (`StorageTracker`); an accelerator's own context, what kernels allocate inside and fragmentation
come on top, see `RESERVE_BYTES` and `RESERVE_SHARE`.
"""

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lisatune.distributed.ranks import fake_ranks, pick_device, ranks_are_fake
from lisatune.distributed.shards import part_to_update, shard
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.estimate import divided, estimate, why_untraced
from lisatune.memory.fake import fake_storage, fake_tensors
from lisatune.memory.tracker import StepMemory, StorageTracker
from lisatune.methods.build import Built, build, check_recipe, weight_dtype
from lisatune.models.load import meta_model, model_from_config
from lisatune.models.shapes import shape_config
from lisatune.nn.hidden import max_positions
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import CHUNK, CHUNK_ELSEWHERE, AdamW
from lisatune.optim.group import Group
from lisatune.optim.rows import sparse_rows
from lisatune.optim.state import prepare
from lisatune.recipe import Recipe

__all__ = ["RESERVE_BYTES", "RESERVE_SHARE", "MemoryPlan", "costly_draws", "plan_memory"]

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
    """`traced`, or `arithmetic` where the model can't be; `…, divided by ranks` where several ranks can't."""

    batch_size: int
    """Sequences per micro-step."""

    length: int
    """Tokens per sequence."""

    device: str
    """Kind of device that the plan is for: cpu, cuda, …"""

    ranks: int
    """Devices that share weights, gradients and optimizer state."""

    active_blocks: tuple[int, ...] | None
    """Blocks that train in the planned period, the costliest of the run; None for methods without draws."""

    num_blocks: int
    """N, the model's blocks."""

    trainable: int
    """Parameters that train in it."""

    loaded_bytes: int
    """Weights as they load into host memory, before a method stores them otherwise; 0 on several ranks."""

    seconds: float
    """What making the plan took."""

    note: str | None = None
    """What keeps the plan from being exact."""

    @property
    def needed_bytes(self) -> int:
        """What a device must have free: tensors and the reserve; on a CPU also the weights as they load."""
        tensors = round(self.tensor_bytes * (1 + RESERVE_SHARE))
        return max(tensors, self.loaded_bytes) if self.device == "cpu" else tensors + RESERVE_BYTES

    @property
    def tensor_bytes(self) -> int:
        """Most bytes of tensors in the device's memory; on a CPU with those in host memory."""
        return self.peak_bytes + (self.host_bytes if self.device == "cpu" else 0)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, numbers and strings."""
        values = asdict(self) | {"needed_bytes": self.needed_bytes}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryPlan":
        """Read what `as_dict` gave."""
        fields = {key: values[key] for key in cls.__dataclass_fields__}
        active = fields["active_blocks"]
        return cls(**fields | {"active_blocks": None if active is None else tuple(active)})


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
        recipe: the recipe; its data isn't read, and `run.device` need not be here.
        ranks: devices among which the model is divided, as `run.sharding` says. The plan is that of each.
        length: tokens per sequence. Default: `data.max_length`, or what the model can read.
        blocks: blocks that train, for a method that draws. Default: the costliest draw of the run.
        config: the model's transformers config. Default: that of `model.name`.

    Raises:
        ValueError, OSError, RuntimeError: the recipe can't be used, as in `train`.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1, got {ranks}")
    started = time.perf_counter()
    device = recipe.run.device.partition(":")[0]
    device = pick_device("auto").type if device == "auto" else device
    compiles, run = recipe.run.compile, replace(recipe.run, compile=False, device=device)
    recipe = replace(recipe, method=recipe.method.without_proof(), run=run)
    note = "planned uncompiled: compiled blocks keep as much, or less" if compiles else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they come with the run
        planned, why_divided = None, ""
        if ranks > 1:
            try:
                with fake_ranks(ranks):
                    check_recipe(recipe)
                    planned = _plan(recipe, length, blocks, config, ranks)
            except Exception as error:  # as below; and what does not run on several ranks can be estimated
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                why_divided = f"one rank's figures, divided by arithmetic ({reason})"
        planned = planned or _plan(recipe, length, blocks, config, ranks)
    notes = [each for each in (note, planned.note, why_divided) if each]
    return replace(planned, note="; ".join(notes) or None, seconds=time.perf_counter() - started)


def _plan(
    recipe: Recipe, length: int | None, blocks: tuple[int, ...] | None, config: Any, ranks: int
) -> MemoryPlan:
    """Trace a step, on the first of fake_ranks ranks where there are; else divide what one rank takes."""
    run, device = recipe.run, torch.device("cpu")
    model = _shapes(recipe, config)
    loaded_bytes = sum(p.nbytes for p in model.parameters()) if ranks == 1 else 0
    length = length or recipe.data.max_length
    length = min(length, max_positions(model) or length)
    batches = [_batch(recipe, model, length)] * min(run.accumulation, 2)
    steps, is_divided = run.steps or UNKNOWN_STEPS, ranks_are_fake()
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:

        def materialise(
            prepared: nn.Module, layers: LayerMap
        ) -> None:  # not before: PEFT can't adapt fake tensors
            stack.enter_context(fake_tensors())
            fake_storage(prepared)
            if is_divided:
                shard(prepared, layers.blocks, device=device, how=run.sharding)

        loss = None if is_divided else CausalLMLoss(model)
        built = build(recipe, model, loss, steps=steps, device=device, materialise=materialise)
        if isinstance(built.step.optimizer, AdamW):
            built.step.optimizer.chunk_size = CHUNK.get(run.device, CHUNK_ELSEWHERE)
        kind, note = "traced", None
        try:
            memory = _trace_costliest(built, batches, blocks, steps, run.accumulation)
        except Exception as error:  # a model's own code can raise anything on tensors without values
            if is_divided:
                raise
            kind, note = "arithmetic", why_untraced(built, batches, error)
            memory = estimate(built, recipe, length)
        if ranks > 1 and not is_divided:
            kind = f"{kind}, divided by ranks"
            memory = divided(memory, built.model, built.layers, ranks)
        return MemoryPlan(
            **asdict(memory),
            kind=kind,
            batch_size=run.batch_size,
            length=length,
            device=run.device,
            ranks=ranks,
            active_blocks=built.schedule.active_blocks,
            num_blocks=built.layers.num_blocks,
            trainable=sum(p.numel() for p in built.model.parameters() if p.requires_grad),
            loaded_bytes=loaded_bytes,
            seconds=0.0,
            note=note,
        )


def _shapes(recipe: Recipe, config: Any) -> Any:
    """The recipe's model on the meta device."""
    dtype = weight_dtype(recipe)
    name, attention = recipe.model, recipe.model.attention
    if config is None and not Path(name.name).exists():
        config = shape_config(name.name)
    if config is None:
        return meta_model(
            name.name,
            revision=name.revision,
            trust_remote_code=name.trust_remote_code,
            attention=attention,
            dtype=dtype,
            needs_weights=False,
        )
    return model_from_config(config, attention=attention, dtype=dtype)


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


def _trace_costliest(
    built: Built,
    batches: list[dict[str, Tensor]],
    blocks: tuple[int, ...] | None,
    steps: int,
    micro_steps: int,
) -> StepMemory:
    """Trace a step of each draw that may need most, leave that draw active which does."""
    schedule = built.schedule
    possible = schedule.possible_draws(steps)
    if not possible:
        return _trace(built, batches, micro_steps)
    draws = (
        [blocks]
        if blocks is not None
        else costly_draws(possible, built.block_sizes(), ends_rest=schedule.ends_rest)
    )
    # A block that freezes may leave state behind, so each that can train has made its state once.
    schedule.hold(sorted({block for draw in possible for block in draw}))
    _make_state(built, batches[0]["input_ids"].numel() * micro_steps)
    traced = {}
    for draw in draws:
        schedule.hold(draw)
        traced[draw] = replace(_trace(built, batches, micro_steps), host_bytes=schedule.host_bytes())
    costliest = max(traced, key=lambda draw: traced[draw].peak_bytes)
    schedule.hold(costliest)
    return traced[costliest]


def _trace(built: Built, batches: list[dict[str, Tensor]], micro_steps: int) -> StepMemory:
    ids = batches[0]["input_ids"].numel()
    _make_state(built, ids * micro_steps)
    for p in _row_parameters(built) if micro_steps > len(batches) else ():
        p.grad = sparse_rows(p, ids * (micro_steps - len(batches)))  # what came before
    with StorageTracker(built.model, built.step.optimizer) as tracker:
        built.step.backward(batches)
        built.step.clip()
        built.step.update()
        return tracker.end_step()


def _row_parameters(built: Built) -> list[nn.Parameter]:
    """What trains by the rows that a step reads."""
    groups = [group for group in built.step.optimizer.param_groups if group.get("rows")]
    return [p for group in groups for p in group["params"] if p.requires_grad]


def _make_state(built: Built, ids: int) -> None:
    """Let the optimizer make the state of everything that trains in a step of so many ids, all different."""
    optimizer = built.step.optimizer
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.grad = sparse_rows(p, ids) if group.get("rows") else torch.empty_like(p)
                if isinstance(optimizer, AdamW):
                    prepare(cast(Group, group), part_to_update(p), optimizer.state[p])
    if not isinstance(optimizer, AdamW):
        optimizer.step()
    built.step.skip()


def costly_draws(
    possible: set[tuple[int, ...]], sizes: Sequence[int], *, ends_rest: bool
) -> list[tuple[int, ...]]:
    """Pick the draws that could have the highest peak.

    Which one does depends on where the peak falls, so a few candidates are returned. The more numbers train,
    the more memory a step takes. Among equal draws, the highest blocks have their gradients while the
    activations below are still there; the lowest keep their activations until the end; the lowest block with
    high others has some of both. Where backward stops at the lowest active block, a smaller draw can need
    more if it reaches lower.

    Args:
        possible: a schedule's `possible_draws`.
        sizes: number of parameters of each block.
        ends_rest: whether backward can stop at the lowest active block.
    """

    def size(draw: tuple[int, ...]) -> int:
        return sum(sizes[block] for block in draw)

    def lowest(draw: tuple[int, ...]) -> int:
        return min(draw, default=len(sizes))

    draws = sorted(possible)
    most = max(map(size, draws))
    largest = [draw for draw in draws if size(draw) == most]
    costly = [
        max(largest, key=sum),
        min(largest, key=sum),
        min(largest, key=lambda draw: (lowest(draw), -sum(draw))),
    ]
    if ends_rest:
        costly.append(min(draws, key=lambda draw: (lowest(draw), -size(draw))))
    return list(dict.fromkeys(costly))
