"""Plan how much memory a run takes, before any weights load.

A plan traces one training step with fake tensors: the model is built from its config and prepared by the
method, and the loss, the optimizer with its state and the step are those of `train`. `StorageTracker` adds up
the live tensors. Memory outside of tensors comes on top: `RESERVE_BYTES` and `RESERVE_SHARE`.
"""

import math
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.console import first_line
from lisatune.distributed.ranks import fake_ranks, name_kind, pick_device, ranks_are_fake
from lisatune.distributed.shards import count_copies, shard
from lisatune.lisa.correction import count_trainable
from lisatune.lisa.frozen_weights import FrozenWeights, ShapeMasters
from lisatune.losses import Loss
from lisatune.memory.estimate import divide_among_ranks, estimate_step, explain_untraced
from lisatune.memory.fake import fake_storage, fake_tensors, norms_are_one
from lisatune.memory.trace import make_state, trace_costliest
from lisatune.memory.tracker import StepMemory
from lisatune.methods.build import Built, Prepared, attach, check_recipe, make_loss, prepare, weight_dtype
from lisatune.models.load import load_config, meta_model, model_from_config
from lisatune.models.shapes import shape_config
from lisatune.nn.hidden import max_positions, unwrap_adapters
from lisatune.nn.layers import find_layers
from lisatune.optim.adamw import AdamW, default_chunk_size
from lisatune.recipe import Recipe, RunConfig
from lisatune.runs.checkpoint import copied_bytes

__all__ = [
    "RESERVE_BYTES",
    "RESERVE_SHARE",
    "MemoryPlan",
    "make_batch",
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
    """Weights as they load into host memory, before a method quantises them; 0 on several ranks, or if they
    stay in their files."""

    copy_bytes: int
    """Bytes of `host_bytes` that `run.save_async` takes while a checkpoint is written."""

    switch_bytes: int
    """Bytes of exact weights that a draw moves onto the device, and off it; 0 if no weight is codes."""

    disk_bytes: int
    """Bytes of exact weights for which `method.master: disk` needs room on the disk of the run; else 0."""

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
    device = name_kind(recipe.run.device)
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
        asked = _Asked(recipe, length, blocks, ranks=ranks, too_many_bytes=too_many_bytes)
        planned, why_divided = None, ""
        if ranks > 1:
            with fake_ranks(ranks):
                asked = replace(asked, shards=ranks // count_copies(run.sharding, run.copies))
            try:
                with fake_ranks(ranks):
                    check_recipe(recipe)
                    planned = _plan(asked, config)
            except Exception as error:  # as in _measure; and a recipe that ranks refuse can be estimated
                why_divided = f"one rank's figures, divided by arithmetic ({first_line(error)})"
        planned = planned or _plan(asked, config)
    notes = [each for each in (note, planned.note, why_divided) if each]
    return replace(planned, note="; ".join(notes) or None, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Asked:
    """What `plan_memory` was asked for. `shards` is among how many ranks each weight is divided."""

    recipe: Recipe
    length: int | None
    blocks: tuple[int, ...] | None
    ranks: int = 1
    shards: int = 1
    too_many_bytes: float = math.inf

    @property
    def steps(self) -> int:
        return self.recipe.run.steps or PLANNED_STEPS

    @property
    def divides_figures(self) -> bool:
        """Whether figures of one rank are divided, because ranks are not faked."""
        return self.ranks > 1 and not ranks_are_fake()


@dataclass(frozen=True)
class _Measured:
    """The costliest step, how it was found, and the host memory of a checkpoint's copy in bytes."""

    memory: StepMemory
    kind: str = "traced"
    note: str | None = None
    copied: int = 0


def _plan(asked: _Asked, config: Any) -> MemoryPlan:
    """Trace a step, on rank 0 if ranks are faked; otherwise divide the figures of one rank."""
    recipe = asked.recipe
    if config is None and not Path(recipe.model.name).exists():
        config = shape_config(recipe.model.name)
    model = _build_meta_model(recipe, config)
    is_read = asked.ranks == 1 and not _stays_in_files(recipe, config)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    loaded_bytes = weight_bytes if is_read else 0
    length = asked.length or recipe.data.max_length
    length = min(length, max_positions(model) or length)
    batches = [make_batch(recipe, model, length)] * min(recipe.run.accumulation, 2)
    with torch.random.fork_rng(devices=[]):  # tensors are not fake yet, because PEFT cannot adapt fake ones
        loss = None if ranks_are_fake() else make_loss(recipe, model)
        prepared = prepare(recipe, model)
    with fake_tensors():
        built = _build(asked, prepared, loss)
        measured = _measure(asked, built, batches, loaded_bytes)
        if asked.divides_figures:
            measured = _divide(measured, built, asked.shards)
        memory = measured.memory
        return MemoryPlan(
            **asdict(replace(memory, host_bytes=memory.host_bytes + measured.copied)),
            kind=measured.kind,
            batch_size=len(batches[0]["input_ids"]),
            length=length,
            device=recipe.run.device,
            ranks=asked.ranks,
            active_blocks=built.schedule.active_blocks,
            num_blocks=built.drawn.num_blocks,
            word=built.schedule.word,
            trainable=count_trainable(built.model) - built.schedule.idle_row_numbers,
            loaded_bytes=loaded_bytes,
            copy_bytes=measured.copied,
            switch_bytes=_count_switch(built),
            disk_bytes=weight_bytes if recipe.method.masters == "disk" else 0,
            seconds=0.0,
            note=measured.note,
        )


def _build(asked: _Asked, prepared: Prepared, loss: Loss | None) -> Built:
    """Build what `train` builds, of fake tensors, divided if ranks are faked."""
    recipe, device = asked.recipe, torch.device("cpu")
    run = recipe.run
    fake_storage(prepared.model)
    if ranks_are_fake():
        inside = unwrap_adapters(prepared.model)
        shard(inside, find_layers(inside).blocks, device=device, how=run.sharding, copies=run.copies)
    else:
        masters = ShapeMasters(is_pinned=run.device == "cuda", on_disk=recipe.method.masters == "disk")
        recipe.method.place(prepared.model, device, masters)
    with norms_are_one():  # bitsandbytes reads the values of its codes
        built = attach(recipe, prepared, loss, steps=asked.steps, device=device)
    if isinstance(built.step.optimizer, AdamW):
        built.step.optimizer.chunk_size = default_chunk_size(run.device)
    return built


def _measure(asked: _Asked, built: Built, batches: list[dict[str, Tensor]], loaded_bytes: int) -> _Measured:
    """Trace the costliest step, or estimate it if the model cannot run without values."""
    run = asked.recipe.run

    def is_too_large(memory: StepMemory) -> bool:
        needed = _count_needed(memory, run.device, loaded_bytes)
        return not asked.divides_figures and needed >= asked.too_many_bytes

    try:
        memory = trace_costliest(built, batches, asked.blocks, asked.steps, run.accumulation, is_too_large)
        return _Measured(memory, copied=_count_copy(built, batches, run) if run.save_async else 0)
    except Exception as error:  # on tensors without values a model's own code can raise anything
        if ranks_are_fake():
            raise
        note = explain_untraced(built, batches, error)
    ids = batches[0]["input_ids"]
    has_state = False
    with suppress(Exception):  # an optimizer's own code can raise anything too
        make_state(built, ids.numel() * run.accumulation)
        has_state = True
    memory = estimate_step(built, asked.recipe, ids.shape[1], has_state=has_state)
    kept = memory.at_peak["weights"] + memory.at_peak["optimizer state"]
    return _Measured(memory, "arithmetic", note, copied=kept if run.save_async else 0)


def _divide(measured: _Measured, built: Built, shards: int) -> _Measured:
    """Divide the figures of one rank by arithmetic."""
    return _Measured(
        divide_among_ranks(measured.memory, built.model, built.layers, shards),
        f"{measured.kind}, divided by ranks",
        measured.note,
        copied=-(-measured.copied // shards),
    )


def _count_copy(built: Built, batches: list[dict[str, Tensor]], run: RunConfig) -> int:
    """Count the host memory of a checkpoint's copy, once the active blocks have made their state."""
    make_state(built, batches[0]["input_ids"].numel() * run.accumulation)
    return copied_bytes(built.model, built.step.optimizer, run.device)


def _count_switch(built: Built) -> int:
    """Count the exact weights of the active blocks that become codes when they freeze."""
    frozen, active = FrozenWeights.of(built.model), built.schedule.active_blocks
    if frozen is None or not active or len(active) == built.drawn.num_blocks:
        return 0
    units = built.drawn.block_parameters(built.model)
    return sum(p.nbytes for index in active for p in units[index].values() if frozen.has(p))


def _stays_in_files(recipe: Recipe, config: Any) -> bool:
    """Whether `train` maps weights from their files into memory, and so loads none that has its dtype."""
    masters = recipe.method.masters
    if masters is None or (masters != "disk" and recipe.run.device == "cpu"):
        return False
    config = config or load_config(**recipe.model.location, needs_weights=False)
    return (config.get_text_config().dtype or config.dtype) in (None, weight_dtype(recipe))


def _build_meta_model(recipe: Recipe, config: Any) -> Any:
    """Build the recipe's model on the meta device; `config` is None if it is that of `model.name`."""
    dtype, scores = weight_dtype(recipe), recipe.loss.has_score
    if config is None:
        return meta_model(**recipe.model_source, dtype=dtype, needs_weights=False)
    return model_from_config(config, attention=recipe.model.attention, scores=scores, dtype=dtype)


def make_batch(recipe: Recipe, model: nn.Module, length: int) -> dict[str, Tensor]:
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
