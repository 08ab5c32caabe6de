"""One rank of a test: makes the runs and checks that a file lists, and writes down what came of them.

    RANK=0 WORLD_SIZE=2 … python tests/rank_worker.py JOBS.json

A job is {"recipe": path, "overrides": […], "flags": {…}}, or {"draws": true}. Results go to JOBS.json.RANK.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

import tiny
from lisatune import LISA, find_layers, ranks
from lisatune.optim import build_adamw, build_optimizer
from lisatune.recipe import OptimizerConfig
from lisatune.recipe_file import load_recipe
from lisatune.sharding import shard
from lisatune.shards import local_part
from lisatune.train import train


def draws() -> dict[str, Any]:
    """Train a bare loop with LISA while the ranks' global generators drift apart."""
    model = tiny.llama(seed=0)
    layers = find_layers(model)
    shard(model, device=torch.device("cpu"), how="fsdp")
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


def seeds() -> None:
    """Give each rank a seed of its own."""
    model = tiny.llama(seed=0)
    layers = find_layers(model)
    shard(model, device=torch.device("cpu"), how="fsdp")
    LISA(model, build_optimizer(model, layers, OptimizerConfig()), seed=ranks.rank())


def unsharded() -> None:
    """Attach LISA to a model that DistributedDataParallel holds."""
    model = tiny.llama(seed=0)
    optimizer = build_adamw(model, find_layers(model), lr=1e-3)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    LISA(wrapped.module, optimizer)


def work(job: dict[str, Any]) -> Any:
    if "recipe" in job:
        return train(load_recipe(Path(job["recipe"]), job["overrides"]), **job.get("flags", {}))
    return {"draws": draws, "seeds": seeds, "unsharded": unsharded}[job["check"]]()


def main() -> None:
    torch.set_num_threads(1)
    jobs = Path(sys.argv[1])
    results = []
    with ranks.joined("cpu"):
        for job in json.loads(jobs.read_text()):
            try:
                results.append(work(job))
            except (ValueError, RuntimeError) as error:
                results.append({"error": f"{type(error).__name__}: {error}"})
    rank = os.environ.get("RANK", "0")
    jobs.with_name(f"{jobs.name}.{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
