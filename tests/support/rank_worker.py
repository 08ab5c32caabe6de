"""One rank of a test: makes the runs and checks that a file lists, and writes down what came of them.

A job is {"recipe": path, "overrides": […], "flags": {…}}, or {"check": "draws"}; with "free_bytes" so much
memory is found free, and "plan" is what a process of its own would have planned. Results go to
JOBS.json.RANK.
"""

import errno
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import rank_copies
import tiny
import toy_members
from lisatune import LISA, find_layers, param_groups
from lisatune.distributed import ranks
from lisatune.distributed.shards import full_tensor, local_part, shard
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import make_batch
from lisatune.memory.tracker import measure
from lisatune.methods.optimizers import build_from_groups, build_optimizer
from lisatune.models import sharded
from lisatune.models.load import load_model, load_tokenizer
from lisatune.models.sharded import load_for_ranks, save_from_ranks
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.optim.adamw import AdamW
from lisatune.optim.meter import state_bytes, tensors_bytes
from lisatune.recipe import OptimizerConfig
from lisatune.runs.checkpoint import begin_checkpoint, load_checkpoint, save_checkpoint
from lisatune.runs.manifest import DamagedCheckpointError
from lisatune.train.assemble import assemble
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from live_bytes import LiveBytes

UPDATES: dict[str, Any] = {
    f"{moments} {rounding}": {"moments": moments, "rounding": rounding}
    for moments in ("fp32", "bf16", "8bit", "factored")
    for rounding in ("exact", "stochastic")
} | {
    "sgd": {"name": "sgd", "options": {"momentum": 0.9}},
    "lion": {"name": "lion"},
    "nadam": {"name": "torch.optim.NAdam"},
}


def draws() -> dict[str, Any]:
    """Train a bare loop with LISA while the ranks' global generators drift apart."""
    model = tiny.llama(seed=0)
    layers = find_layers(model)
    shard(model, find_layers(model).blocks, device=torch.device("cpu"), how="fsdp")
    optimizer = build_optimizer(model, layers, OptimizerConfig(lr=1e-3))
    lisa = LISA(model, optimizer, active=2, period=2, ends="every:2", verify="full")
    torch.manual_seed(100 + ranks.rank())
    random.seed(100 + ranks.rank())
    drawn, strangers = [], []
    for step in range(8):
        random.random()
        torch.rand(ranks.rank() + 1)
        drawn.append(lisa.active_blocks)
        resting = {
            name
            for index, block in enumerate(layers.block_parameters(model))
            for name in block
            if index not in lisa.active_blocks
        }
        if not lisa.ends_train:
            resting |= set(layers.ends)
        tiny.backward(model, step)
        strangers += [name for name, p in model.named_parameters() if name in resting and p.grad is not None]
        with torch.no_grad():  # leaves the ends whole: a draw has to take them apart first
            model(input_ids=tiny.tokens(0), use_cache=False)
        optimizer.step()
        optimizer.zero_grad()
        named = dict(model.named_parameters())
        active = {name for index in lisa.active_blocks for name in layers.block_parameters(model)[index]}
        strangers += [name for name in resting - active if named[name] in optimizer.state]
    parts = sum(local_part(p).numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    return {"drawn": drawn, "strangers": strangers, "parts": parts, "whole": whole}


def statistics() -> dict[str, Any]:
    """Draw by the gradients of a divided model; without other ranks, by those of a whole one."""
    model = tiny.llama(seed=0)
    layers = find_layers(model)
    if ranks.count() > 1:
        shard(model, layers.blocks, device=torch.device("cpu"), how="fsdp")
    optimizer = build_optimizer(model, layers, OptimizerConfig(lr=1e-3))
    lisa = LISA(model, optimizer, sampler=toy_members.LargestGradient(6, 2), period=2)
    drawn = []
    for step in range(9):
        drawn.append(lisa.active_blocks)
        tiny.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    saved = optimizer.state_dict()["lisa"]["statistics"]
    norms = {name: values.tolist() for name, values in saved["norms"].items()}
    history = {block: kept.tolist() for block, kept in saved["history"].items()}
    return {"drawn": drawn, "norms": norms, "history": history, "steps": saved["steps"]}


def seeds() -> None:
    """Give each rank a seed of its own."""
    model = tiny.llama(seed=0)
    layers = find_layers(model)
    shard(model, find_layers(model).blocks, device=torch.device("cpu"), how="fsdp")
    LISA(model, build_optimizer(model, layers, OptimizerConfig()), seed=ranks.rank())


def updates() -> dict[str, float]:
    """Update a divided matrix and a whole one with the same gradients; say by how much they then differ."""
    apart = {}
    for name, options in UPDATES.items():
        kind = options.get("name")
        dtype = torch.bfloat16 if kind is None else torch.float32
        matrix = torch.nn.Linear(512, 24, bias=False, dtype=dtype)
        torch.nn.init.normal_(matrix.weight, generator=torch.Generator().manual_seed(0))
        whole = torch.nn.Parameter(matrix.weight.detach().clone())
        shard(matrix, [], device=torch.device("cpu"), how="fsdp")
        weight: Any = matrix.weight
        if kind is None:
            both: Any = [AdamW([p], lr=1e-2, chunk_size=2048, **options) for p in (whole, weight)]
        else:
            config = OptimizerConfig(lr=1e-2, **options)
            both = [build_from_groups([{"params": [("weight", p)]}], config) for p in (whole, weight)]
        for step in range(3):
            gradient = torch.randn(24, 512, generator=torch.Generator().manual_seed(step)).to(dtype)
            whole.grad = gradient
            weight.grad = distribute_tensor(
                gradient, weight.device_mesh, weight.placements, src_data_rank=None
            )
            for optimizer in both:
                optimizer.step()
        apart[name] = float((full_tensor(weight) - whole.detach()).abs().max())
    return apart


def resumed(folder: str, few: int, name: str) -> list[list[float]]:
    """Train six steps, from the folder's checkpoint if it has one; return the embedding.

    Without one, a checkpoint is saved after three steps.

    Args:
        folder: of checkpoints.
        few: how many different ids the steps have. With many, rows fall out of a table of moments.
        name: an optimizer, or of AdamW "factored" moments, or "rows" of the embedding that a step reads.
    """
    model = tiny.llama(seed=0)
    layers, ends = find_layers(model), "rows" if name == "rows" else "train"
    if ranks.count() > 1:
        shard(model, layers.blocks, device=torch.device("cpu"))
    if name == "rows":
        optimizer: Any = AdamW(param_groups(model, layers, ends=ends), lr=1e-2, eps=1e-3)
    elif name == "factored":
        optimizer = build_optimizer(model, layers, OptimizerConfig(moments=name, lr=1e-2, eps=1e-3))
    else:
        optimizer = build_optimizer(model, layers, OptimizerConfig(name=name, lr=1e-2, options={"eps": 1e-3}))
    LISA(model, optimizer, active=2, period=2, state="keep", ends=ends)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    saved = Path(folder) / "step-000003"
    begins = saved.is_dir()
    if begins:
        load_checkpoint(saved, **parts)
    for step in range(3 if begins else 0, 6):
        ids = tiny.tokens(step) % few * (tiny.VOCABULARY // few)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            save_checkpoint(folder, step=3, **parts)
    weights: list[list[float]] = full_tensor(model.get_input_embeddings().weight).tolist()
    return weights


@contextmanager
def compiling_with(backend: str) -> Iterator[None]:
    """Let `run.compile` use a backend that needs no compiler of C++."""

    def make(*args: Any, **options: Any) -> BlockForward:
        return BlockForward(*args, **options | {"backend": backend})

    with (
        mock.patch("lisatune.methods.build.BlockForward", make),
        mock.patch("lisatune.train.assemble.check_compiler"),
    ):
        yield


@contextmanager
def infinite_loss() -> Iterator[None]:
    """Let the loss of rank 1 be infinite in the second step."""
    plain, calls = CausalLMLoss.__call__, []

    def call(self: CausalLMLoss, batch: Any) -> Any:
        loss_sum, count = plain(self, batch)
        if torch.is_grad_enabled():
            calls.append(count)
        is_broken = torch.is_grad_enabled() and len(calls) == 2 and ranks.rank() == 1
        return loss_sum * float("inf") if is_broken else loss_sum, count

    with mock.patch.object(CausalLMLoss, "__call__", call):
        yield


def held(folder: str, largest_file: str) -> dict[str, Any]:
    """Load, write, train, save and load again; say what this rank held and whether all is equal."""
    device, report = torch.device("cpu"), {}
    expected = load_model(folder).state_dict()
    with LiveBytes() as live:
        model, fill = load_for_ranks(folder)
        shard(model, find_layers(model).blocks, device=device, how="fsdp", fill=fill)
    report["load"] = live.peak
    report["shard"] = tensors_bytes([*model.parameters(), *model.buffers()])
    report["whole"] = sum(p.nbytes for p in model.parameters())
    report["tensor"] = max(p.nbytes for p in model.parameters())
    report["is whole"] = fill is None
    layers = find_layers(model)
    units = [layers.end_parameters(model), *layers.block_parameters(model)]
    report["unit"] = max(sum(p.nbytes for p in unit.values()) for unit in units)
    got = {name: full_tensor(t) for name, t in model.state_dict(keep_vars=True).items()}
    report["equal"] = got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)
    computed = dict(load_model(folder).named_buffers())
    report["buffers"] = sorted(n for n, b in model.named_buffers() if torch.equal(b, computed[n]))
    with LiveBytes() as live:
        kept = {name: full_tensor(t).clone() for name, t in model.state_dict(keep_vars=True).items()}
    report["all at once"] = live.peak
    del kept, got
    with LiveBytes() as live:
        sharded.LARGEST_FILE = largest_file
        save_from_ranks(model, load_tokenizer(folder), Path(f"{folder}-out"))
    report["export"] = live.peak
    optimizer = build_optimizer(model, layers, OptimizerConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    report["state"] = state_bytes(optimizer)
    with LiveBytes() as live:
        for tensor in (
            *model.parameters(),
            *model.buffers(),
            *(s for e in optimizer.state.values() for s in e.values()),
        ):
            if isinstance(tensor, torch.Tensor):
                live.note(local_part(tensor))
        path = save_checkpoint(f"{folder}-checkpoints", step=1, model=model, optimizer=optimizer)
    report["save"] = live.peak
    before = [local_part(p).clone() for p in model.parameters()]
    moments = [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in optimizer.state.values()]
    for p in model.parameters():
        p.grad = -torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    with LiveBytes() as live:
        load_checkpoint(path, model=model, optimizer=optimizer)
    report["resume"] = live.peak
    same = [torch.equal(local_part(p), was) for p, was in zip(model.parameters(), before, strict=True)]
    for entry, was in zip(optimizer.state.values(), moments, strict=True):
        same += [torch.equal(torch.as_tensor(entry[key]), was[key]) for key in was]
    report["restored"] = all(same)
    return report


def saving(folder: str) -> dict[str, Any]:
    """Save a checkpoint and damage it, fail to save one on rank 1, and let rank 1 die while it saves one.

    All but the first are written by a thread that may not send anything to another rank.
    """
    model = tiny.llama(seed=0)
    shard(model, find_layers(model).blocks, device=torch.device("cpu"))
    optimizer = build_optimizer(model, find_layers(model), OptimizerConfig(lr=1e-3))
    tiny.backward(model, 0)
    optimizer.step()
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    path = save_checkpoint(folder, step=1, **parts)
    file = path / "optimizer-00002-of-00002.safetensors"
    intact = file.read_bytes()
    ranks.on_rank0(lambda: file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1])))
    with pytest.raises(DamagedCheckpointError, match=f"{file.name} changed after it was written"):
        load_checkpoint(path, **parts)
    ranks.on_rank0(lambda: file.write_bytes(intact))

    def fail(path: Path, *args: Any, **kwargs: Any) -> None:
        path.write_bytes(b"half of it")
        if path.parent.name.startswith(".step-000003"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")

    errors = {}
    on_rank_1 = mock.patch("lisatune.files.parts.write_stream", fail) if ranks.rank() == 1 else nullcontext()
    with on_rank_1:
        for step in (2, 3):
            try:
                writer = begin_checkpoint(folder, step=step, **parts, copies=True)
                thread = threading.Thread(target=writer.write)
                with mock.patch.multiple(
                    "torch.distributed", all_reduce=None, all_gather=None, broadcast=None
                ):
                    thread.start()
                    thread.join()
                writer.finish()
            except (OSError, RuntimeError) as error:
                errors[step] = f"{type(error).__name__}: {error}"
            errors[f"left after {step}"] = sorted(path.name for path in Path(folder).iterdir())
    return errors


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the second training step of a recipe with the given blocks active. All its ids differ."""
    recipe = load_recipe(Path(job["measured"]), job["overrides"])
    parts = assemble(recipe)
    batches = []
    for number in range(recipe.run.accumulation):
        batch = make_batch(recipe, parts.built.model, recipe.data.max_length)
        ids, place = batch["input_ids"], ranks.rank() * recipe.run.accumulation + number
        ids = (torch.arange(ids.numel()).view(ids.shape) + place * ids.numel()) % job["vocabulary"]
        batches.append(batch | {"input_ids": ids, "labels": ids})
    for _ in range(2):
        if job["blocks"] is not None:
            parts.built.schedule.hold(job["blocks"])
        with measure(parts.built.model, parts.built.step.optimizer) as tracker:
            parts.built.step.backward(batches)
            parts.built.step.clip()
            parts.built.step.update()
            step = tracker.end_step()
    return asdict(step)


def work(job: dict[str, Any]) -> Any:
    if "plan" in job:
        with mock.patch("lisatune.memory.check._plan_in_new_process", return_value=job.pop("plan")):
            return work(job)
    if "free_bytes" in job:
        with mock.patch("lisatune.memory.process.available_bytes", return_value=job.pop("free_bytes")):
            return work(job)
    if "backend" in job:
        graphs: list[int] = []
        job["flags"]["after_step"] = lambda state: graphs.append(num_graphs())
        with compiling_with(job.pop("backend")):
            return work(job) | {"graphs": graphs}
    if job.pop("breaks", False):
        with infinite_loss():
            return work(job)
    if "recipe" in job:
        return train(load_recipe(Path(job["recipe"]), job["overrides"]), **job.get("flags", {}))
    if "measured" in job:
        return measured(job)
    if "resumed" in job:
        return resumed(job["resumed"], job["few"], job["name"])
    if "saving" in job:
        return saving(job["saving"])
    if "held" in job:
        return held(job["held"], job["largest_file"])
    if "loop" in job:
        return rank_copies.loop(job["loop"], job["folder"])
    if "trainer" in job:
        return rank_copies.trainer(job["trainer"], job["folder"])
    checks = {"draws": draws, "statistics": statistics, "seeds": seeds, "strangers": rank_copies.strangers}
    checks["updates"] = updates
    return checks[job["check"]]()


def main(jobs: Path) -> int:
    """Make the jobs of a file as the rank that the environment names."""
    results = []
    out = jobs.with_name(f"{jobs.name}.{os.environ.get('RANK', '0')}")
    with ranks.process_group("cpu"):
        for job in json.loads(jobs.read_text()):
            try:
                results.append(work(job))
            except (ValueError, RuntimeError) as error:
                results.append({"error": f"{type(error).__name__}: {error}"})
            out.write_text(json.dumps(results))
            if "saving" in job:  # the last job: without rank 1 the group cannot end in good order
                os._exit(0)
    return 0
