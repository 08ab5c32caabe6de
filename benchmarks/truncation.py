"""Measure what a step saves when backward stops at the lowest active block.

python benchmarks/truncation.py --size smollm2 --tokens 1024 --repeats 5 [--checkpointing] [--json]

γ = 2: the highest block trains, and block 0, N/4, N/2 or 3N/4. The policies of the ends differ:

    train     embedding and head train: backward reaches the embedding, whichever blocks are active
    head      the head trains; nothing below the lower of the two blocks is recorded
    frozen    as head, and the head has no gradient either

Seconds are those of a complete step (forward, backward, AdamW, zero_grad) in fp32 with chunked loss, the
median over the repeats. Each repeat visits the settings in random order, and the first step of a visit is not
counted. Saved bytes are those of the storages that autograd holds between forward and backward, without
parameters. Ratios are to `train` with the same blocks, in the same run. Weights are random, because their
values do not affect the time. With one thread the clock is that of the process; with more it is wall time.
"""

import argparse
import gc
import json
import random
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import SHAPES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA, build_adamw, find_layers
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.nn.blocks import enable_activation_checkpointing

ENDS = ("train", "head", "frozen")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what backward truncation saves.")
    parser.add_argument("--size", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per step, one sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="counted steps per visit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--untied", action="store_true", help="a head that is not tied to the embedding")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model and one repeat, to see that it runs"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object instead")
    args = parser.parse_args()
    if args.smoke:
        args.size, args.tokens, args.repeats, args.steps = "tiny", 32, 1, 1

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.size], tie_word_embeddings=not args.untied))
    if args.checkpointing:
        enable_activation_checkpointing(model)
    model.train()
    figures = {
        "size": args.size,
        "tokens": args.tokens,
        "tied": not args.untied,
        "checkpointing": args.checkpointing,
        "threads": args.threads,
        "clock": clock.__name__,
        "repeats": args.repeats,
        "rows": measure(model, args.tokens, args.repeats, args.steps, clock),
    }
    print(json.dumps(figures) if args.json else table(figures))


def measure(
    model: Any, tokens: int, repeats: int, steps: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Time every setting in each repeat, and count its saved bytes once."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    positions = torch.arange(tokens).expand_as(ids)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    loss = CausalLMLoss(model)
    num_blocks = find_layers(model).num_blocks
    lowest = sorted({0, num_blocks // 4, num_blocks // 2, 3 * num_blocks // 4})
    settings = [(block, ends) for block in lowest for ends in ENDS]
    seconds: dict[tuple[int, str], list[float]] = {setting: [] for setting in settings}
    saved: dict[tuple[int, str], int] = {}
    rng = random.Random(0)
    for _ in range(repeats):
        for setting in rng.sample(settings, k=len(settings)):
            block, ends = setting
            optimizer = build_adamw(model, find_layers(model), lr=1e-5)
            chances = tuple(float(i in (block, num_blocks - 1)) for i in range(num_blocks))
            lisa = LISA(model, optimizer, sampler=chances, period=steps + 2, ends=ends, verify="off")
            for step in range(steps + 1):
                started = clock()
                loss(batch)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
                if step:
                    seconds[setting].append(clock() - started)
            if setting not in saved:
                saved[setting] = saved_bytes(model, lambda: loss(batch)[0])
            lisa.detach()
            del lisa, optimizer
            gc.collect()  # they refer to each other, and hold the moments of this setting
    rows = []
    for block, ends in settings:
        mine, full = median(seconds[block, ends]), median(seconds[block, "train"])
        rows.append(
            {
                "lowest": block,
                "blocks": num_blocks,
                "ends": ends,
                "seconds": mine,
                "seconds ratio": mine / full,
                "saved bytes": saved[block, ends],
                "saved ratio": saved[block, ends] / saved[block, "train"],
            }
        )
    return rows


class Held:
    """A tensor that autograd keeps for backward, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Count the bytes that autograd holds after a forward pass. Shared storages count once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        out = forward()
    storages = {storage._cdata: storage for storage in (kept.tensor.untyped_storage() for kept in held)}
    total = sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
    del out  # which holds them all
    return total


def table(figures: dict[str, Any]) -> str:
    """Format the figures as a Markdown table."""
    lines = [
        f"{figures['size']}, {figures['tokens']} tokens, tied: {figures['tied']}, checkpointing: "
        f"{figures['checkpointing']}, {figures['threads']} thread(s), {figures['clock']}, "
        f"{figures['repeats']} repeats",
        "",
        "| lowest active block | ends | s/step | of `train` | saved, MiB | of `train` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['lowest']} of {row['blocks']} | {row['ends']} | {row['seconds']:.3f} "
        f"| {row['seconds ratio']:.2f} | {row['saved bytes'] / 2**20:.1f} | {row['saved ratio']:.2f} |"
        for row in figures["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
