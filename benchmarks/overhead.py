"""Measure the cost of LISA's hooks, as a share of the training step that they run in.

python benchmarks/overhead.py --size smollm2 --tokens 128 --steps 20

1. Step time. One model, three optimizers over the same parameters: AdamW, AdamW with LISA at γ = N (full
   fine-tuning, so that only the hooks differ), and AdamW again. Each round steps with all three in random
   order. The second AdamW shows the noise: without noise, its ratio to the first would be 1.
2. Hooks. Additional hooks before and after LISA's own read the clock at each step. They give the cost of all
   of LISA's work at γ = N as a share of its steps; and at γ = 2 the cost of a draw (freezing, thawing,
   releasing state) and of a period's proof, each as a share of one γ = 2 step.
3. Statistics. The same at γ = 2 with samplers that each read one number of the blocks: the cost of collecting
   it, as a share of the steps of a period.

A step is forward, backward, AdamW and zero_grad in fp32 on one random sequence. Weights are random, because
their values do not affect the time. With one thread the clock is that of the process, which other jobs on the
machine disturb least. With more threads it is wall time. Periods are short, so costs that arise once per
period weigh more than with LISA's default of 10 steps.

A median of steps leaves out what only one step of a period pays, such as the draw. So beside it stands the
mean over whole periods. It counts every step, and every disturbance of one.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any, Literal, NamedTuple

import torch
from common import SHAPES
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA, Sampler, build_adamw, find_layers
from lisatune.lisa.samplers import Permutation

PERIOD = 3
READ = ("weight_norm", "gradient_norm", "update_norm")


class Reader(Sampler):
    """Draws as `Permutation` does, whatever it reads."""

    def __init__(self, num_blocks: int, reads: tuple[Any, ...]) -> None:
        self.num_blocks, self.reads = num_blocks, reads
        self.plain = Permutation(num_blocks, 2)

    def draw(self, period: int, *, seed: int, statistics: object) -> tuple[int, ...]:  # type: ignore[override]
        """Return the permutation's draw."""
        return self.plain.draw(period, seed=seed)

    def inclusion(self) -> tuple[float, ...]:
        """Return the permutation's chances."""
        return self.plain.inclusion()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what LISA's hooks cost.")
    parser.add_argument("--size", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per step")
    parser.add_argument(
        "--steps", type=int, default=20, help="steps per optimizer in part 1, rounded up to whole periods"
    )
    parser.add_argument("--periods", type=int, default=5, help=f"periods of {PERIOD} steps per row of part 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object instead")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.size], tie_word_embeddings=True))
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens))
    figures = {
        "size": args.size,
        "parameters": model.num_parameters(),
        "tokens": args.tokens,
        "threads": args.threads,
        "clock": clock.__name__,
        **measure_steps(model, ids, args.steps, clock),
        **measure_hooks(model, ids, args.periods, clock),
    }
    print(json.dumps(figures) if args.json else table(figures))


def measure_steps(
    model: nn.Module, ids: torch.Tensor, steps: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Time AdamW, AdamW with LISA at γ = N, and AdamW again, interleaved, over whole periods."""
    steps += -steps % PERIOD
    layers = find_layers(model)
    optimizers = {name: build_adamw(model, layers, lr=1e-5) for name in ("bare", "lisa", "bare again")}
    lisa = LISA(model, optimizers["lisa"], active=layers.num_blocks, period=PERIOD)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    rng = random.Random(0)
    for step in range(-1, steps):  # step -1 creates the optimizers' state and is not counted
        for name in rng.sample(list(optimizers), k=3):
            started = clock()
            train_step(model, optimizers[name], ids)
            if step >= 0:
                seconds[name].append(clock() - started)
    lisa.detach()
    medians = {name: median(each) for name, each in seconds.items()}
    means = {name: mean(each) for name, each in seconds.items()}  # whole periods: the draw is counted
    return {
        "steps": steps,
        "bare step seconds": medians["bare"],
        "step ratio": medians["lisa"] / medians["bare"],
        "noise": medians["bare again"] / medians["bare"],
        "mean step ratio": means["lisa"] / means["bare"],
        "mean noise": means["bare again"] / means["bare"],
    }


def measure_hooks(
    model: nn.Module, ids: torch.Tensor, periods: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Measure the cost of all hooks at γ = N, and of a draw and a period's proof at γ = 2."""
    all_blocks = find_layers(model).num_blocks
    full = time_hooks(model, ids, periods, clock, active=all_blocks, verify="sample")
    off = time_hooks(model, ids, periods, clock, active=2, verify="off")
    read = {
        name: time_hooks(model, ids, periods, clock, verify="off", sampler=Reader(all_blocks, (name,)))
        for name in READ
    }
    proofs = {v: time_hooks(model, ids, periods, clock, active=2, verify=v) for v in ("sample", "full")}
    return {
        "periods": periods,
        "lisa step seconds": off.step,
        "mean lisa step seconds": off.mean_step,
        "hooks at γ=N": full.hooks_per_period / (PERIOD * full.step),
        "draw": off.draw / off.step,
        "proof sample": (proofs["sample"].hooks_per_period - off.hooks_per_period) / off.step,
        "proof full": (proofs["full"].hooks_per_period - off.hooks_per_period) / off.step,
        **{
            name: (times.hooks_per_period - off.hooks_per_period) / (PERIOD * off.step)
            for name, times in read.items()
        },
    }


class Times(NamedTuple):
    """Medians in seconds, and a mean over whole periods."""

    step: float
    mean_step: float
    hooks_per_period: float
    draw: float


def time_hooks(
    model: nn.Module,
    ids: torch.Tensor,
    periods: int,
    clock: Callable[[], float],
    *,
    active: int = 2,
    verify: Literal["off", "sample", "full"],
    sampler: str | Sampler = "permutation",
) -> Times:
    """Time a step, all of LISA's hooks in a period, and the hook that ends a period."""
    optimizer = build_adamw(model, find_layers(model), lr=1e-5)
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(clock())

    handles = [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    lisa = LISA(model, optimizer, active=active, period=PERIOD, verify=verify, sampler=sampler)
    handles += [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    steps = []
    for _ in range((1 + periods) * PERIOD):
        started = clock()
        train_step(model, optimizer, ids)
        steps.append(clock() - started)
    lisa.detach()
    for handle in handles:
        handle.remove()

    before = [end - start for start, end in zip(marks[0::4], marks[1::4], strict=True)]
    after = [end - start for start, end in zip(marks[2::4], marks[3::4], strict=True)]
    hooks = [pre + post for pre, post in zip(before, after, strict=True)]
    firsts = range(PERIOD, len(steps), PERIOD)  # the first period warms up
    return Times(
        step=median(steps[PERIOD:]),
        mean_step=mean(steps[PERIOD:]),
        hooks_per_period=median(sum(hooks[first : first + PERIOD]) for first in firsts),
        draw=median(after[first + PERIOD - 1] for first in firsts),
    )


def train_step(model: nn.Module, optimizer: Optimizer, ids: torch.Tensor) -> None:
    """Take one step on one sequence."""
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def table(figures: dict[str, Any]) -> str:
    """Format the figures as text."""
    lines = [
        f"{figures['size']}: {figures['parameters']:,} parameters, {figures['tokens']} tokens per step, "
        f"{figures['threads']} thread(s), {figures['clock']}",
        f"AdamW {figures['bare step seconds']:.3f} s/step ({figures['steps']} steps each); "
        f"LISA γ=2 {figures['lisa step seconds']:.3f} s/step, with the draws "
        f"{figures['mean lisa step seconds']:.3f} on average ({figures['periods']} periods of {PERIOD})",
        "",
    ]
    rows = [
        ("step ratio", "step with LISA at γ=N / step of AdamW", "8.3f", "≤ 1.02"),
        ("noise", "step of AdamW / step of AdamW", "8.3f", ""),
        ("mean step ratio", "the first as means over whole periods", "8.3f", ""),
        ("mean noise", "the second as means over whole periods", "8.3f", ""),
        ("hooks at γ=N", "LISA's hooks at γ=N / steps", "8.2%", "≤ 2 %"),
        ("draw", "a draw / a step, γ=2", "8.2%", "≤ 5 %"),
        ("proof sample", 'verify="sample", per period / a step, γ=2', "8.2%", "≤ 1 %"),
        ("proof full", 'verify="full", per period / a step, γ=2', "8.2%", ""),
        *((name, f"collecting {name} / steps, γ=2", "8.2%", "≤ 1 %") for name in READ),
    ]
    lines += [f"{label:<44}{figures[key]:{form}}   {goal}".rstrip() for key, label, form, goal in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
