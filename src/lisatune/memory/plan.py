"""Plan how much memory a run takes, before any weights load.

A plan traces one training step with fake tensors: the model is built from its config and prepared by the
method, and the loss, the optimizer with its state and the step are those of `train`. `StorageTracker` adds up
the live tensors. Memory outside of tensors comes on top: `RESERVE_BYTES` and `RESERVE_SHARE`.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lisatune.console import first_line
from lisatune.distributed.ranks import fake_ranks, pick_device, ranks_are_fake
from lisatune.distributed.shards import count_copies, part_of, part_to_update, shard
from lisatune.lisa.correction import count_trainable, find_correction
from lisatune.lisa.frozen_weights import FrozenWeights, ShapeMasters
from lisatune.memory.costly_draws import list_costly_draws
from lisatune.memory.equal_blocks import FewerBlocks, set_aside
from lisatune.memory.estimate import divide_among_ranks, estimate_step, explain_untraced
from lisatune.memory.fake import fake_storage, fake_tensors, norms_are_one
from lisatune.memory.tracker import StepMemory
from lisatune.methods.build import Built, attach, check_recipe, make_loss, prepare, weight_dtype
from lisatune.models.load import meta_model, model_from_config
from lisatune.models.shapes import shape_config
from lisatune.nn.hidden import max_positions, unwrap_adapters
from lisatune.nn.layers import find_layers
from lisatune.optim.adamw import AdamW, default_chunk_size
from lisatune.optim.group import Group
from lisatune.optim.rows import make_gradient
from lisatune.optim.state import prepare as prepare_state
from lisatune.recipe import Recipe, RunConfig
from lisatune.runs.checkpoint import copied_bytes

__all__ = [
    "RESERVE_BYTES",
    "RESERVE_SHARE",
    "MemoryPlan",
    "plan_memory",
]

RESERVE_BYTES = 600 * 2**20
"""Kept free on an accelerator for its context and the workspaces of its libraries."""

RESERVE_SHARE = 0.05
"""Kept free on top, as a share of the plan, for memory that kernels allocate inside and fragmentation."""

PLANNED_STEPS = 1000
"""Steps assumed for a run whose `run.steps` is not given. Enough for LISA to draw every block."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(StepMemory):
    """Memory of the costliest training step of a run, on one device."""

    kind: str
    """`traced`, or `arithmetic` if the model cannot be traced; `…, divided by ranks` if ranks cannot be."""

    batch_size: int
    """Sequences per micro-step; of a loss of pairs, two for each pair."""

    length: int
    """Tokens per sequence."""

    device: str
    """Kind of device that the plan is for: cpu, cuda, …"""

    ranks: int
    """Number of devices that share weights, gradients and optimizer state."""

    active_blocks: tuple[int, ...] | None
    """Blocks or units that train in the planned step; None for methods that draw none."""

    num_blocks: int
    """Number of blocks of the model, or of the units that they are divided into."""

    word: str
    """What `num_blocks` counts: block or unit."""

    trainable: int
    """Number of parameters that train in the planned step."""

    loaded_bytes: int
    """Weights as they load into host memory, before a method quantises them; 0 on several ranks."""

    copy_bytes: int
    """Bytes of `host_bytes` that `run.save_async` takes while a checkpoint is written."""

    switch_bytes: int
    """Bytes of exact weights that a draw moves onto the device, and off it; 0 if no weight is codes."""

    seconds: float
    """Wall time of making the plan."""

    note: str | None = None
    """Why the plan is not exact; None if it is."""

    @property
    def needed_bytes(self) -> int:
        """Bytes that must be free on the device: tensors and the reserve.

        On a CPU, at least `loaded_bytes`.
        """
        return _count_needed(self, self.device, self.loaded_bytes)

    @property
    def tensor_bytes(self) -> int:
        """Peak bytes of tensors on the device; on a CPU with those in host memory."""
        return _count_tensors(self, self.device)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists, numbers and strings."""
        values = asdict(self) | {"needed_bytes": self.needed_bytes}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryPlan":
        """Read a plan that `as_dict` wrote."""
        fields = {key: values[key] for key in cls.__dataclass_fields__}
        active = fields["active_blocks"]
        return cls(**fields | {"active_blocks": None if active is None else tuple(active)})


def _count_tensors(memory: StepMemory, device: str) -> int:
    return memory.peak_bytes + (memory.host_bytes if device == "cpu" else 0)


def _count_needed(memory: StepMemory, device: str, loaded_bytes: int) -> int:
    tensors = round(_count_tensors(memory, device) * (1 + RESERVE_SHARE))
    return max(tensors, loaded_bytes) if device == "cpu" else tensors + RESERVE_BYTES


def plan_memory(
    recipe: Recipe,
    *,
    ranks: int = 1,
    length: int | None = None,
    blocks: tuple[int, ...] | None = None,
    config: Any = None,
    too_many_bytes: float = math.inf,
) -> MemoryPlan:
    """Plan the memory of a recipe's training step, without its weights or data.

    The batch is the largest possible: every sequence has `length` tokens, and all of them carry loss.

    Args:
        recipe: the recipe. Its data is not read, and this machine need not have its `run.device`.
        ranks: number of devices among which `run.sharding` divides the model. The plan is for each of them.
        length: tokens per sequence. Default: `data.max_length`, or what the model can read.
        blocks: indices of the blocks that train, for a method that draws them. Default: the run's draw that
            needs the most memory.
        config: the model's transformers config. Default: that of `model.name`.
        too_many_bytes: stop at the first draw of the run that needs this many bytes, and plan that one. Saves
            time if only a plan that needs less is of use.

    Returns:
        Bytes of the step by category and by phase, and the bytes that the device must have free.

    Raises:
        ValueError, OSError, RuntimeError: the recipe cannot be used, as in `train`.

    Example:
        >>> plan = plan_memory(recipe, length=2048)
        >>> plan.needed_bytes, plan.phase, plan.at_peak["activations"]
    """
    if ranks < 1:
        raise ValueError(f"ranks must be >= 1, got {ranks}")
    started = time.perf_counter()
    device = recipe.run.device.partition(":")[0]
    device = pick_device("auto").type if device == "auto" else device
    compiles, run = recipe.run.compile is True, replace(recipe.run, compile=False, device=device)
    recipe = replace(recipe, method=recipe.method.without_proof(), run=run)
    note = (
        "planned without run.compile: compiled blocks keep as many activations, or fewer"
        if compiles
        else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they come with the run
        planned, why_divided, shards = None, "", 1
        if ranks > 1:
            with fake_ranks(ranks):
                shards = ranks // count_copies(run.sharding, run.copies)
            try:
                with fake_ranks(ranks):
                    check_recipe(recipe)
                    planned = _plan(recipe, length, blocks, config, ranks, shards, too_many_bytes)
            except Exception as error:  # as in _plan; and a recipe that several ranks refuse can be estimated
                why_divided = f"one rank's figures, divided by arithmetic ({first_line(error)})"
        planned = planned or _plan(recipe, length, blocks, config, ranks, shards, too_many_bytes)
    notes = [each for each in (note, planned.note, why_divided) if each]
    return replace(planned, note="; ".join(notes) or None, seconds=time.perf_counter() - started)


def _plan(
    recipe: Recipe,
    length: int | None,
    blocks: tuple[int, ...] | None,
    config: Any,
    ranks: int,
    shards: int,
    too_many_bytes: float,
) -> MemoryPlan:
    """Trace a step, on rank 0 if ranks are faked; otherwise divide the figures of one rank by `shards`."""
    run, device = recipe.run, torch.device("cpu")
    model = _build_meta_model(recipe, config)
    loaded_bytes = sum(p.nbytes for p in model.parameters()) if ranks == 1 else 0
    length = length or recipe.data.max_length
    length = min(length, max_positions(model) or length)
    batches = [_batch(recipe, model, length)] * min(run.accumulation, 2)
    steps, is_divided = run.steps or PLANNED_STEPS, ranks_are_fake()
    with torch.random.fork_rng(devices=[]):  # tensors are not fake yet, because PEFT cannot adapt fake ones
        loss = None if is_divided else make_loss(recipe, model)
        prepared = prepare(recipe, model)
    with fake_tensors():
        fake_storage(prepared.model)
        if is_divided:
            inside = unwrap_adapters(prepared.model)
            blocks_of, how = find_layers(inside).blocks, run.sharding
            shard(inside, blocks_of, device=device, how=how, copies=run.copies)
        else:
            recipe.method.place(prepared.model, device, ShapeMasters(is_pinned=run.device == "cuda"))
        with norms_are_one():  # bitsandbytes reads the values of its codes
            built = attach(recipe, prepared, loss, steps=steps, device=device)
        if isinstance(built.step.optimizer, AdamW):
            built.step.optimizer.chunk_size = default_chunk_size(run.device)

        def is_too_large(memory: StepMemory) -> bool:
            if ranks > 1 and not is_divided:  # these figures are of one rank
                return False
            return _count_needed(memory, run.device, loaded_bytes) >= too_many_bytes

        kind, note = "traced", None
        try:
            memory = _trace_costliest(built, batches, blocks, steps, run.accumulation, is_too_large)
            copied = _count_copy(built, batches, run) if run.save_async else 0
        except Exception as error:  # on tensors without values a model's own code can raise anything
            if is_divided:
                raise
            kind, note = "arithmetic", explain_untraced(built, batches, error)
            memory = estimate_step(built, recipe, length)
            kept = memory.at_peak["weights"] + memory.at_peak["optimizer state"]
            copied = kept if run.save_async else 0
        if ranks > 1 and not is_divided:
            kind = f"{kind}, divided by ranks"
            memory = divide_among_ranks(memory, built.model, built.layers, shards)
            copied = -(-copied // shards)
        memory = replace(memory, host_bytes=memory.host_bytes + copied)
        return MemoryPlan(
            **asdict(memory),
            kind=kind,
            batch_size=len(batches[0]["input_ids"]),
            length=length,
            device=run.device,
            ranks=ranks,
            active_blocks=built.schedule.active_blocks,
            num_blocks=built.drawn.num_blocks,
            word=built.schedule.word,
            trainable=count_trainable(built.model) - built.schedule.idle_row_numbers,
            loaded_bytes=loaded_bytes,
            copy_bytes=copied,
            switch_bytes=_count_switch(built),
            seconds=0.0,
            note=note,
        )


def _count_copy(built: Built, batches: list[dict[str, Tensor]], run: RunConfig) -> int:
    """Count the host memory of a checkpoint's copy, once the active blocks have made their state."""
    _make_state(built, batches[0]["input_ids"].numel() * run.accumulation)
    return copied_bytes(built.model, built.step.optimizer, run.device)


def _count_switch(built: Built) -> int:
    """Count the exact weights of the active blocks that become codes when they freeze."""
    frozen, active = FrozenWeights.of(built.model), built.schedule.active_blocks
    if frozen is None or not active or len(active) == built.drawn.num_blocks:
        return 0
    units = built.drawn.block_parameters(built.model)
    return sum(p.nbytes for index in active for p in units[index].values() if frozen.has(p))


def _build_meta_model(recipe: Recipe, config: Any) -> Any:
    """Build the recipe's model on the meta device."""
    name, dtype, scores = recipe.model.name, weight_dtype(recipe), recipe.loss.has_score
    if config is None and not Path(name).exists():
        config = shape_config(name)
    if config is None:
        return meta_model(**recipe.model_source, dtype=dtype, needs_weights=False)
    return model_from_config(config, attention=recipe.model.attention, scores=scores, dtype=dtype)


def _batch(recipe: Recipe, model: nn.Module, length: int) -> dict[str, Tensor]:
    """Make a real batch, int64 [B, T] each. Under packing each row holds two records; a pair is two rows."""
    num_rows = recipe.run.batch_size * recipe.loss.rows_per_record
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    positions_T = torch.arange(length)
    ids_BT = (positions_T % embedding.weight.shape[0]).expand(num_rows, -1)
    if recipe.data.packing:
        positions_T = positions_T % max(length // 2, 1)
    return {
        "input_ids": ids_BT,
        "labels": ids_BT,
        "position_ids": positions_T.expand(num_rows, -1),
    }


def _trace_costliest(
    built: Built,
    batches: list[dict[str, Tensor]],
    blocks: tuple[int, ...] | None,
    steps: int,
    micro_steps: int,
    is_too_large: Callable[[StepMemory], bool],
) -> StepMemory:
    """Trace a step of each draw that could need most memory. The draw that does stays active.

    The first draw that is too large ends the search.
    """
    schedule = built.schedule
    possible = schedule.possible_draws(steps)
    if not possible:
        return _trace(built, batches, micro_steps)
    draws = [blocks] if blocks is not None else list_costly_draws(possible, built)
    # A block that freezes may leave state behind, so every block that can train makes its state first.
    schedule.hold(sorted({block for draw in possible for block in draw}))
    _make_state(built, batches[0]["input_ids"].numel() * micro_steps)
    traced = {}
    for draw in draws:
        schedule.hold(draw)
        traced[draw] = replace(_trace(built, batches, micro_steps), host_bytes=schedule.host_bytes())
        if is_too_large(traced[draw]):
            break
    costliest = max(traced, key=lambda draw: traced[draw].peak_bytes)
    schedule.hold(costliest)
    return traced[costliest]


def _trace(
    built: Built, batches: list[dict[str, Tensor]], micro_steps: int, *, leaves_out: bool = True
) -> StepMemory:
    """Trace a step. Of more micro-steps than batches, the last ones are traced.

    `leaves_out`: trace a few blocks of each run of equal frozen ones, if that is exact.
    """
    ids = batches[0]["input_ids"].numel()
    _make_state(built, ids * micro_steps)
    if micro_steps > len(batches):
        for group, p in _find_row_parameters(built):  # of the micro-steps before
            make_gradient(group, p, ids * (micro_steps - len(batches)))
    paths = built.layers.blocks if leaves_out and not ranks_are_fake() else ()
    blocks = [built.model.get_submodule(path) for path in paths]
    with FewerBlocks(built.model, built.step.optimizer, blocks) as tracker:
        built.step.backward(batches)
        built.step.clip()
        aside = set_aside(built.step.optimizer) if blocks else []
        with norms_are_one():
            built.step.update()
        aside.clear()
        memory = tracker.end_step()
    return memory if tracker.is_exact else _trace(built, batches, micro_steps, leaves_out=False)


def _find_row_parameters(built: Built) -> Iterator[tuple[Mapping[str, Any], nn.Parameter]]:
    """Yield the parameters of which only rows train, each with its param group."""
    for group in built.step.optimizer.param_groups:
        yield from ((group, p) for p in group["params"] if group.get("rows") and p.requires_grad)


def _make_state(built: Built, ids: int) -> None:
    """Let the optimizer make the state of every parameter that trains.

    Args:
        built: the model and its optimizer.
        ids: number of token ids in a step; all count as different.
    """
    optimizer, correction = built.step.optimizer, find_correction(built.model)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and not (correction is not None and correction.is_stateless(p)):
                if group.get("rows"):
                    make_gradient(group, p, ids)
                else:
                    p.grad = torch.empty_like(p)
                if isinstance(optimizer, AdamW):
                    state, size = optimizer.state[p], part_of(p).size
                    prepare_state(cast(Group, group), part_to_update(p), state, size=size)
    if not isinstance(optimizer, AdamW):
        with norms_are_one():
            optimizer.step()
    if correction is not None:
        correction.make_state()
    built.step.skip()
