"""Optimizer state of LISA, and of callbacks that do no more than toggle `requires_grad`.

    python benchmarks/callback.py
    python benchmarks/callback.py --size tiny

Callbacks of this kind draw γ blocks every K steps, and set `requires_grad` of all blocks. A frozen weight has
no gradient then, and AdamW leaves it alone, but keeps its two moments. So their state grows with each block
that has trained once. Weights are random, because their values do not affect the state.
"""

import argparse
import random

import torch
from common import SHAPES
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA
from lisatune.optim.meter import state_bytes

SHOWN = (1, 2, 5, 10, 15, 20, 30, 50, 100)
"""Numbers of periods that get a row."""

PERIOD = 2
"""K; it does not affect the state."""

Rows = dict[int, tuple[int, int]]
"""After a number of periods: how many blocks have trained, and bytes of optimizer state."""


def main() -> None:
    """Train both ways, and print a row for each number of periods."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="smollm2")
    parser.add_argument("--active", type=int, default=2, help="γ")
    parser.add_argument("--periods", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    args = parser.parse_args()

    torch.set_num_threads(1)
    toggled = train_by_flags(*build(args.size), args.active, args.periods, args.seed)
    lisa = train_by_lisa(*build(args.size), args.active, args.periods, args.seed)
    print("| periods | callback: blocks that have trained | state | LISA: blocks | state |")
    print("| --: | --: | --: | --: | --: |")
    for n, (blocks, size) in toggled.items():
        print(f"| {n} | {blocks} | {mib(size)} | {lisa[n][0]} | {mib(lisa[n][1])} |")
    model, optimizer = build(args.size)
    step(model, optimizer)
    print(f"\nFull fine-tuning: {mib(state_bytes(optimizer))}.")


def train_by_flags(
    model: LlamaForCausalLM, optimizer: Optimizer, active: int, periods: int, seed: int
) -> Rows:
    """Toggle `requires_grad`, and nothing else."""
    blocks, rng = list(model.model.layers), random.Random(seed)
    seen: set[int] = set()
    rows = {}
    for period in range(1, periods + 1):
        drawn = set(rng.sample(range(len(blocks)), active))
        seen |= drawn
        for i, block in enumerate(blocks):
            block.requires_grad_(i in drawn)
        for _ in range(PERIOD):
            step(model, optimizer)
        if period in SHOWN:
            rows[period] = len(seen), state_bytes(optimizer)
    return rows


def train_by_lisa(
    model: LlamaForCausalLM, optimizer: Optimizer, active: int, periods: int, seed: int
) -> Rows:
    """Train with LISA; its state is read before the step that ends a period and draws."""
    lisa, rows = LISA(model, optimizer, active=active, period=PERIOD, seed=seed), {}
    for period in range(1, periods + 1):
        for _ in range(PERIOD - 1):
            step(model, optimizer)
        if period in SHOWN:
            rows[period] = sum(visits > 0 for visits in lisa.visits), state_bytes(optimizer)
        step(model, optimizer)
    return rows


def build(size: str) -> tuple[LlamaForCausalLM, Optimizer]:
    """Build a model and torch's AdamW over all of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[size], tie_word_embeddings=True))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5)


def step(model: LlamaForCausalLM, optimizer: Optimizer) -> None:
    """Train one step on four tokens."""
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def mib(size: int) -> str:
    """Format bytes."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**24 else f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
