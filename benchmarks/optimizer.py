"""Compare a step of lisatune.AdamW with torch.optim.AdamW(fused=True): time, and bytes of state.

python benchmarks/optimizer.py --elements 30000000 --repeats 15
python benchmarks/optimizer.py --device cuda --lora 16          # many small parameters: launches on a GPU

Every kind of rounding and moments updates parameters of the same shapes (matrices of 1536 x 576 and one norm
each) from the same gradients. Kinds take turns. The figures are medians over the repeats, and their ratios to
torch's fused AdamW on weights of the same dtype. A second copy of that optimizer shows the noise.

With --lora R the parameters are the two adapters of rank R at each of the 224 linear layers in Llama 3.1 8B's
blocks. "One launch each" puts every parameter into a param group of its own, so that none shares a launch.
Not run on a GPU yet.

Without bitsandbytes the kinds with 8-bit moments are left out.
"""

import argparse
import importlib.util
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisatune import AdamW
from lisatune.optim.meter import state_bytes

KINDS: list[tuple[str, torch.dtype, dict[str, Any] | None]] = [
    ("torch fused, fp32 weights", torch.float32, None),
    ("torch fused, fp32, again", torch.float32, None),
    ("fp32 weights, fp32 moments", torch.float32, {}),
    ("fp32 weights, bf16 moments", torch.float32, {"moments": "bf16"}),
    ("fp32 weights, 8bit moments", torch.float32, {"moments": "8bit"}),
    ("fp32 weights, factored", torch.float32, {"moments": "factored"}),
    ("torch fused, bf16 weights", torch.bfloat16, None),
    ("exact, fp32 moments", torch.bfloat16, {}),
    ("stochastic, fp32 moments", torch.bfloat16, {"rounding": "stochastic"}),
    ("nearest, fp32 moments", torch.bfloat16, {"rounding": "nearest"}),
    ("exact, bf16 moments", torch.bfloat16, {"moments": "bf16"}),
    ("exact, 8bit moments", torch.bfloat16, {"moments": "8bit"}),
    ("exact, factored", torch.bfloat16, {"moments": "factored"}),
    ("stochastic, 8bit moments", torch.bfloat16, {"rounding": "stochastic", "moments": "8bit"}),
    ("stochastic, factored", torch.bfloat16, {"rounding": "stochastic", "moments": "factored"}),
    ("exact, fp32 moments on the host", torch.bfloat16, {"state_device": "cpu"}),
]

LORA_KINDS: list[tuple[str, torch.dtype, dict[str, Any] | None]] = [
    ("torch fused, bf16 weights", torch.bfloat16, None),
    ("exact, fp32 moments", torch.bfloat16, {}),
    ("exact, 8bit moments", torch.bfloat16, {"moments": "8bit"}),
    ("exact, fp32 moments, one launch each", torch.bfloat16, {"alone": True}),
]

LLAMA_8B = [*[(4096, 4096)] * 2, *[(4096, 1024)] * 2, *[(4096, 14336)] * 2, (14336, 4096)]
"""Inputs and outputs of a block's linear layers."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what a step of lisatune.AdamW costs.")
    parser.add_argument("--elements", type=int, default=30_000_000, help="approximate number of weights")
    parser.add_argument("--lora", type=int, metavar="R", help="update adapters of rank R, see above")
    parser.add_argument("--blocks", type=int, default=32, help="blocks that have these adapters")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, default=None, help="elements per chunk")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    kinds = LORA_KINDS if args.lora else KINDS
    if importlib.util.find_spec("bitsandbytes") is None:
        kinds = [kind for kind in kinds if "8bit" not in kind[0]]
    seconds: list[list[float]] = [[] for _ in kinds]
    held = [0.0] * len(kinds)
    optimizers = [build(dtype, options, args) for _, dtype, options in kinds]
    for repeat in range(-1, args.repeats):  # the first creates the state and is not counted
        for i in random.Random(repeat).sample(range(len(kinds)), k=len(kinds)):
            elapsed = step(optimizers[i], args.device)
            if repeat >= 0:
                seconds[i].append(elapsed)
            elements = sum(p.numel() for group in optimizers[i].param_groups for p in group["params"])
            held[i] = state_bytes(optimizers[i]) / elements
    base = {dtype: median(seconds[i]) for i, (_, dtype, o) in reversed([*enumerate(kinds)]) if o is None}
    print(f"{'kind':<37}{'ms':>9}{'ns/element':>11}{'ratio':>8}{'bytes/element':>15}{'launches':>10}")
    figures = {}
    for i, (name, dtype, _) in enumerate(kinds):
        elements = sum(p.numel() for group in optimizers[i].param_groups for p in group["params"])
        time_s, launches = median(seconds[i]), count_launches(optimizers[i], args.device)
        print(
            f"{name:<37}{time_s * 1e3:>9.3f}{time_s / elements * 1e9:>11.2f}{time_s / base[dtype]:>8.2f}"
            f"{held[i]:>15.2f}{'' if launches is None else launches:>10}"
        )
        figures[name] = {"seconds": seconds[i], "elements": elements, "launches": launches}
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


def build(dtype: torch.dtype, options: dict[str, Any] | None, args: argparse.Namespace) -> Optimizer:
    """Make weights with gradients, and an optimizer for them."""
    torch.manual_seed(0)
    parameters = []
    shapes = [(1536, 576), (576,)] * max(1, args.elements // (1536 * 576))
    if args.lora:
        adapters = [((args.lora, inputs), (outputs, args.lora)) for inputs, outputs in LLAMA_8B]
        shapes = [shape for pair in adapters for shape in pair] * args.blocks
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, device=args.device).mul_(0.02).to(dtype))
        p.grad = torch.randn_like(p).mul_(1e-3)
        parameters.append(p)
    if options is None:
        return torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    groups = [{"params": [p]} for p in parameters] if "alone" in options else parameters
    options = {name: value for name, value in options.items() if name != "alone"}
    return AdamW(groups, lr=1e-5, chunk_size=args.chunk, **options)


def step(optimizer: Optimizer, device: str) -> float:
    """Take one step, and return its seconds."""
    if device != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    optimizer.step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def count_launches(optimizer: Optimizer, device: str) -> int | None:
    """Count the kernels that a step launches on a CUDA device."""
    if device == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as log:
        step(optimizer, device)
    return sum(event.count for event in log.key_averages() if "LaunchKernel" in event.key)


if __name__ == "__main__":
    main()
