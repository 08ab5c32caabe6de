"""Put a run together, in the one order that works.

Everything still requires grad while the optimizer is built. The schedule of blocks attaches last and freezes.
"""

import dataclasses
import hashlib
import random
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lisatune.console import byte_text
from lisatune.data.batches import collate
from lisatune.data.mixture import SourceLosses
from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.rows import TokenRow
from lisatune.distributed import ranks
from lisatune.distributed.ranks import pick_device
from lisatune.distributed.shards import shard
from lisatune.files.masters import DiskMasters
from lisatune.lisa.schedule import BlockSchedule
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.process import available_bytes
from lisatune.methods.build import (
    Built,
    attach,
    attach_method,
    check_recipe,
    make_loss,
    prepare,
    save_dtype,
    weight_dtype,
)
from lisatune.models.hf import announce_remote_code, check_attention
from lisatune.models.load import load_model, load_tokenizer, meta_model, stored_dtype
from lisatune.models.sharded import load_for_ranks, load_mapped, zero_weights
from lisatune.nn.blocks import check_compiler
from lisatune.nn.coded import Masters
from lisatune.nn.hidden import max_positions, unwrap_adapters
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.recipe import Recipe
from lisatune.train.compiling import CompileChoice, build_graphs, choose_compile
from lisatune.train.idle import (
    warn_of_idle_checkpointing,
    warn_of_idle_evaluations,
    warn_of_idle_settings,
)
from lisatune.train.schedule import make_scheduler, warn_of_long_warmup

__all__ = [
    "Parts",
    "assemble",
    "batch_length",
    "check_fits",
    "multiplies_bf16_slowly",
    "rehearse",
    "seed_generators",
    "seed_step",
    "warn_of_slow_bf16",
]

MASTERS_SHARE = 0.4
"""Share of free host memory that exact weights may take under `method.master: auto`."""


@dataclass
class Parts:
    """Everything that a run needs."""

    recipe: Recipe
    device: torch.device
    tokenizer: Any
    data: RunData
    scheduler: LambdaLR
    built: Built
    compiling: CompileChoice
    """Whether the blocks are compiled; `recipe.run.compile` says so too."""
    compile_seconds: float | None = None
    """Wall time of compiling the blocks before the first step; None if nothing was compiled."""
    source_losses: SourceLosses | None = None
    """Collects the loss of each source of a mixture."""
    save_dtype: torch.dtype | None = None
    """Dtype in which the result is written; None: the one that the weights were trained in."""

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Make a batch on the CPU: int64 [B, T], T a multiple of 32 unless that is too long for the model.

        On the CPU every new length leaves kernels in oneDNN's cache, so resident memory would grow for
        hundreds of steps.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        return collate(rows, length=batch_length(longest, self.recipe, self.built.model))

    def set_learning_rates(self) -> None:
        """Set the rates of the current step, after a resume with another `run.steps`."""
        at, groups = self.scheduler, self.built.step.optimizer.param_groups
        for group, lr, factor in zip(groups, at.base_lrs, at.lr_lambdas, strict=True):
            group["lr"] = lr * factor(at.last_epoch)

    def learning_rates(self) -> dict[str, float]:
        """Return the next step's rates: `lr`, and those of the ends and the last block if they differ."""
        lr, at = self.recipe.optimizer.lr, self.scheduler
        groups = self.built.step.optimizer.param_groups
        kinds = (("ends_lr", 0, 1.0), ("block_lr", -1, self.built.schedule.lr_factor(-1)))
        own = {key: groups[i]["lr"] * by for key, i, by in kinds if at.base_lrs[i] * by != lr}
        return {"lr": lr * at.lr_lambdas[0](at.last_epoch)} | own

    def advance_learning_rates(self) -> None:
        """Move on to the next step's rates."""
        with warnings.catch_warnings():
            # torch warns if the first step was left out, because the optimizer has not stepped then.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler", UserWarning)
            self.scheduler.step()


def batch_length(longest: int, recipe: Recipe, model: nn.Module) -> int:
    """Return the length in tokens that each row of a batch is padded to, from that of its longest row."""
    rounded = min(-(-longest // 32) * 32, recipe.data.max_length)
    return max(longest, min(rounded, max_positions(model) or rounded))


def assemble(
    recipe: Recipe,
    before_load: Callable[..., None] | None = None,
    places: Sequence[Mapping[str, int]] = (),
) -> Parts:
    """Build everything a run needs: data, model, layers, optimizer, schedule of blocks, learning rates.

    On several ranks the model is divided among them before the optimizer is built. A rehearsal without
    weights comes first, so that a mistake is found before a large model loads.

    Args:
        recipe: what to build.
        before_load: called as `before_load(device, steps=…, length=…, masters=…)` before the weights load,
            with the number of optimizer steps, the tokens of the longest batch, and where exact weights of
            frozen blocks will be: ram or disk, or None if the device holds them.
        places: as for `prepare_data`.
    """
    run, source = recipe.run, recipe.model
    announce_remote_code(source.name, source.trust_remote_code)
    check_attention(source.attention)
    device = pick_device(run.device)
    recipe.method.check_device(device)
    warn_of_slow_bf16(recipe, device)
    warn_of_idle_settings(recipe)
    if ranks.count() > 1:
        check_recipe(recipe)
    if run.compile is True and device.type == "cpu":
        check_compiler()
    tokenizer = load_tokenizer(**source.tokenizer)
    data = prepare_data(recipe, tokenizer, places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the real model
        rehearsed, layers, _ = rehearse(recipe, data.steps, device)
        check_fits(rehearsed, data, recipe.data.max_length)
    compiling = choose_compile(recipe, device, rehearsed, layers, data)
    run = dataclasses.replace(run, compile=compiling.compiles)
    recipe = dataclasses.replace(recipe, run=run)
    masters = None if ranks.count() > 1 else _choose_masters(recipe, rehearsed)
    if before_load is not None:
        longest = data.train.longest if data.stream is None else recipe.data.max_length
        length = batch_length(longest, recipe, rehearsed)
        before_load(device, steps=data.steps, length=length, masters=masters)
    seed_generators(run.seed)
    dtype = weight_dtype(recipe)
    loss, fill = None, None
    if ranks.count() == 1:
        model, store = _load(recipe, device, masters)
        recipe.method.place(model, device, store)
        loss = make_loss(recipe, model)
    else:  # block by block, each rank its part
        model, fill = load_for_ranks(**recipe.model_source, dtype=dtype)
    _warn_of_widened_weights(recipe, model, device)
    with zero_weights(model):
        prepared = prepare(recipe, model)
    if ranks.count() > 1:
        inside = unwrap_adapters(prepared.model)
        blocks, how, copies = find_layers(inside).blocks, run.sharding, run.copies
        shard(inside, blocks, how=how, copies=copies, device=device, fill=fill)
    if fill is not None:
        recipe.method.take_weights(prepared.model)
    built = attach(recipe, prepared, loss, steps=data.steps, device=device)
    warn_of_idle_checkpointing(recipe, built.model, built.layers, built.schedule)
    if recipe.data.packing:
        assert isinstance(built.step.loss, CausalLMLoss)
        built.step.loss.check_packing()
    warn_of_long_warmup(recipe.optimizer, data.steps)
    warn_of_idle_evaluations(recipe, data.steps)
    scheduler = make_scheduler(recipe.optimizer, built.step.optimizer, data.steps)
    parts = Parts(recipe, device, tokenizer, data, scheduler, built, compiling)
    parts.save_dtype = save_dtype(recipe, built.model)
    if data.sources and data.rows_per_record == 1:
        parts.source_losses = SourceLosses([source.name for source in data.sources])
        assert isinstance(built.step.loss, CausalLMLoss)
        built.step.loss.watch = parts.source_losses
    if run.compile and built.blocks is not None:
        parts.compile_seconds = build_graphs(recipe, built, device)
    return parts


def _load(
    recipe: Recipe, device: torch.device, masters: Literal["ram", "disk"] | None
) -> tuple[Any, Masters | None]:
    """Load the weights onto the CPU, and make a store for the exact weights of frozen blocks.

    Returns:
        The model, and the store; None if weights stay on the device or in host memory.
    """
    source, dtype = recipe.model_source, weight_dtype(recipe)
    if masters is None or (masters == "ram" and device.type == "cpu"):
        return load_model(**source, dtype=dtype), None
    model, mapped = load_mapped(**source, dtype=dtype)
    return model, DiskMasters(_run_folder(recipe), mapped) if masters == "disk" else None


def _run_folder(recipe: Recipe) -> Path:
    """Return the run's folder, or the folder above it that is there already."""
    assert recipe.run.output is not None
    folder = Path(recipe.run.output).absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _choose_masters(recipe: Recipe, model: nn.Module) -> Literal["ram", "disk"] | None:
    """Choose where the exact weights of frozen blocks are kept; None if the device holds them.

    Raises:
        ValueError: host memory or disk is too small for them.
    """
    asked: Literal["auto", "ram", "disk"] | None = recipe.method.masters
    if asked is None:
        return None
    folder, needed = _run_folder(recipe), sum(p.nbytes for p in model.parameters())
    free = available_bytes(torch.device("cpu"))
    if asked == "auto":
        asked = "ram" if free is None or needed < MASTERS_SHARE * free else "disk"
    room = free if asked == "ram" else shutil.disk_usage(folder).free
    if room is not None and needed > room:
        place = "of host memory" if asked == "ram" else f"on the disk of {folder}"
        other = "disk" if asked == "ram" else "ram, or run.output to a larger disk"
        raise ValueError(
            f"the exact weights of frozen blocks need {byte_text(needed)} {place} and {byte_text(room)} are "
            f"free; set method.master to {other}"
        )
    if asked == "disk" and recipe.run.save_async:
        raise ValueError(
            f"the exact weights of frozen blocks ({byte_text(needed)}) go to disk because host memory is "
            "short, and run.save_async would copy them there; set it to false, or method.master to ram"
        )
    return asked


def rehearse(
    recipe: Recipe, steps: int, device: torch.device | None = None
) -> tuple[nn.Module, LayerMap, BlockSchedule]:
    """Build the model without weights, its optimizer and its method, as `assemble` will on a device.

    Raises:
        ValueError, RuntimeError, OSError: what `assemble` would raise with the weights loaded.
    """
    warn_of_long_warmup(recipe.optimizer, steps)
    model = meta_model(**recipe.model_source, dtype=weight_dtype(recipe))
    _warn_of_widened_weights(recipe, model, device)
    if ranks.count() == 1:
        recipe.method.place(model, torch.device("meta"))
    model = recipe.method.prepare(model)
    layers = find_layers(model)
    _, _, schedule = attach_method(recipe, model, layers, steps)
    warn_of_idle_checkpointing(recipe, model, layers, schedule)
    embedding: nn.Module = model.get_input_embeddings()
    if recipe.model.new_tokens and not any(p.requires_grad for p in embedding.parameters()):
        raise ValueError(
            f"model.new_tokens adds rows to the embedding, which method {recipe.method.name} does not train "
            "as it is set, so they would stay what they are; use method lisa, also with frozen ends, or full"
        )
    return model, layers, schedule


def warn_of_slow_bf16(recipe: Recipe, device: torch.device) -> None:
    """Warn if a run multiplies bf16 numbers on a CPU that has no fast way to."""
    if recipe.run.precision != "fp32" and multiplies_bf16_slowly(device):
        warnings.warn(
            "this CPU has no AVX-512, so that torch multiplies bf16 numbers about ten times as slowly as "
            f"float32; run.precision: fp32 is faster here than {recipe.run.precision}",
            stacklevel=2,
        )


def multiplies_bf16_slowly(device: torch.device) -> bool:
    """Whether this is a CPU on which products of bf16 matrices take about ten times as long as of float32."""
    capability = torch.backends.cpu.get_cpu_capability()
    return device.type == "cpu" and capability in ("AVX2", "NO AVX")


def _warn_of_widened_weights(recipe: Recipe, model: nn.Module, device: torch.device | None) -> None:
    """Warn if 16-bit weights of a model are loaded as float32, in twice the memory, and need not be."""
    if weight_dtype(recipe) != torch.float32 or (device is not None and multiplies_bf16_slowly(device)):
        return
    stored = stored_dtype(**recipe.model.location)
    if stored not in (torch.bfloat16, torch.float16):
        return
    more = 2 * sum(p.numel() for p in model.parameters())
    warnings.warn(
        f"{recipe.model.name} is stored in {str(stored).removeprefix('torch.')} and run.precision: "
        f"{recipe.run.precision} loads it in float32, which takes {more:,} bytes more; run.precision: bf16 "
        f"keeps weights in 16 bits, with updates that are as exact",
        stacklevel=2,
    )


def check_fits(model: nn.Module, data: RunData, max_length: int) -> None:
    """Refuse token ids and lengths that the model has no embedding for; they would end in an IndexError.

    A stream checks the ids of its further windows itself, and may have rows of `max_length` in them.

    Raises:
        ValueError: the tokenizer belongs to another model, or a row is longer than the model can read.
    """
    rows = [examples.rows for examples in (data.train, data.validation) if len(examples.rows)]
    highest = max(*(each.highest for each in rows), *(max(question.ids) for question in data.questions), 0)
    embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    if highest >= embedding.weight.shape[0]:
        raise ValueError(
            f"the tokenizer makes token {highest}, and the model has {embedding.weight.shape[0]} (from 0); "
            "give the model the tokenizer that it was trained with"
        )
    longest = max(int(each.piece_lengths.max()) for each in rows)
    if data.stream is not None:
        data.stream.vocabulary = embedding.weight.shape[0]
        longest = max_length
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a record has {longest} tokens and the model reads at most {limit}; set data.max_length={limit}"
        )


def seed_step(seed: int, step: int) -> None:
    """Seed the generators of one of several ranks for a step, so that it needs no checkpoint to draw alike.

    Each rank has rows of its own lengths and so draws another amount of random numbers than the others, such
    as for dropout. A checkpoint holds the states of the first rank alone.
    """
    key = hashlib.blake2b(f"{seed}/{step}/{ranks.rank()}".encode(), digest_size=7).digest()
    seed_generators(int.from_bytes(key, "big"))


def seed_generators(seed: int) -> None:
    """Seed every generator that a model may draw from; checkpoints hold the state of each."""
    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
