"""Compare a step of lisatune.AdamW with torch.optim.AdamW(fused=True): time, and bytes of state.

python benchmarks/optimizer.py --elements 30000000 --repeats 15

Every kind of rounding and moments updates parameters of the same shapes (matrices of 1536 x 576 and one norm
each) from the same gradients. Kinds take turns. The figures are medians over the repeats, and their ratios to
torch's fused AdamW on weights of the same dtype. A second copy of that optimizer shows the noise.
"""

import argparse
import random
import time
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what a step of lisatune.AdamW costs.")
    parser.add_argument("--elements", type=int, default=30_000_000, help="approximate number of weights")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, default=None, help="elements per chunk")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    seconds: list[list[float]] = [[] for _ in KINDS]
    held = [0.0] * len(KINDS)
    optimizers = [build(dtype, options, args) for _, dtype, options in KINDS]
    for repeat in range(-1, args.repeats):  # the first creates the state and is not counted
        for i in random.Random(repeat).sample(range(len(KINDS)), k=len(KINDS)):
            elapsed = step(optimizers[i], args.device)
            if repeat >= 0:
                seconds[i].append(elapsed)
            elements = sum(p.numel() for group in optimizers[i].param_groups for p in group["params"])
            held[i] = state_bytes(optimizers[i]) / elements
    base = {dtype: median(seconds[i]) for i, (_, dtype, o) in reversed([*enumerate(KINDS)]) if o is None}
    print(f"{'kind':<34}{'ns/element':>11}{'ratio':>8}{'bytes/element':>15}")
    for i, (name, dtype, _) in enumerate(KINDS):
        elements = sum(p.numel() for group in optimizers[i].param_groups for p in group["params"])
        time_ns = median(seconds[i]) / elements * 1e9
        print(f"{name:<34}{time_ns:>11.2f}{median(seconds[i]) / base[dtype]:>8.2f}{held[i]:>15.2f}")


def build(dtype: torch.dtype, options: dict[str, Any] | None, args: argparse.Namespace) -> Optimizer:
    """Make weights with gradients, and an optimizer for them."""
    torch.manual_seed(0)
    parameters = []
    for _ in range(max(1, args.elements // (1536 * 576))):
        for shape in ((1536, 576), (576,)):
            p = nn.Parameter(torch.randn(shape, device=args.device).mul_(0.02).to(dtype))
            p.grad = torch.randn_like(p).mul_(1e-3)
            parameters.append(p)
    if options is None:
        return torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    return AdamW(parameters, lr=1e-5, chunk_size=args.chunk, **options)


def step(optimizer: Optimizer, device: str) -> float:
    """Take one step, and return its seconds."""
    if device != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    optimizer.step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
