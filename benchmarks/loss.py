"""Time and memory of the next-token loss and its gradients, against full logits.

python benchmarks/loss.py --dtype float32 --hidden 576 --vocabulary 49152

Each way computes loss and gradients for the same hidden states. Ways are interleaved, and figures are medians
of the process's clock over --repeats. Memory is the highest sum of live allocations above the inputs, from
torch's allocation log in a separate run. It includes both gradients.

    full          plain cross-entropy over all logits
    checkpointed  chunks of tokens under torch.utils.checkpoint, as for heads with biases or adapters
    tokens C      `cross_entropy.TokenChunks`: gradients in forward, chunks of C tokens
    vocabulary S  `cross_entropy.VocabularySlices`: slices of S rows of the head
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import peak_of_allocations
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lisatune.losses import cross_entropy as ours

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute plain cross-entropy."""
    return cross_entropy((hidden @ weight.T).float(), target, reduction="sum")


def checkpointed(size: int) -> Way:
    """Compute chunks that are recomputed in backward."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        pairs = zip(hidden.split(size), target.split(size), strict=True)
        return sum(checkpoint(full, h, weight, y, use_reentrant=False) for h, y in pairs)

    return loss


def tokens(size: int) -> Way:
    """Compute chunks of tokens, with gradients in forward."""
    return lambda h, w, y: ours.TokenChunks.apply(h, w, y, size, None, h.dtype)


def vocabulary(size: int) -> Way:
    """Compute slices of the vocabulary."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ours.SLICE_ELEMENTS = size * len(hidden)
        return ours.VocabularySlices.apply(hidden, weight, target, None, hidden.dtype).sum()

    return loss


def peak_bytes(run: Callable[[], None]) -> int:
    """Find the highest sum of live bytes while `run` runs."""
    with torch.profiler.profile(profile_memory=True) as log:
        run()
    return peak_of_allocations(log)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time and memory of the next-token loss.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=1023)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--frozen-head", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocabulary, args.hidden)).to(dtype).requires_grad_(not args.frozen_head)
    target = torch.randint(0, args.vocabulary, (args.tokens,))
    ways: dict[str, Way] = {"full": full}
    ways |= {f"checkpointed {size}": checkpointed(size) for size in (128, 512)}
    ways |= {f"tokens {size}": tokens(size) for size in (64, 128, 256, 512)}
    ways |= {f"vocabulary {size}": vocabulary(size) for size in (1024, 4096, 8192)}

    def run(way: Way) -> None:
        hidden.grad = weight.grad = None
        (way(hidden, weight, target) / args.tokens).backward()

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + args.repeats):
        for name, way in ways.items():
            started = time.process_time()
            run(way)
            seconds[name].append(time.process_time() - started)
    print(f"{args}\n\n| way | seconds | ÷ full | peak MiB |\n|---|---|---|---|")
    first = median(seconds["full"][1:])
    for name, way in ways.items():
        hidden.grad = weight.grad = None
        peak = peak_bytes(partial(run, way))
        each = median(seconds[name][1:])
        print(f"| {name} | {each:.3f} | {each / first:.2f} | {peak / 2**20:.0f} |")


if __name__ == "__main__":
    main()
