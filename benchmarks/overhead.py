"""What LISA's hooks cost, measured against the training step they run in.

python benchmarks/overhead.py --size smollm2 --tokens 128 --steps 20

1. Step time. One model, three optimizers over the same parameters: AdamW, AdamW with LISA at γ = N (full
   fine-tuning, so that nothing but the hooks differs), and AdamW again. Each round steps with all three in
   random order. The second AdamW shows the noise: its ratio to the first would be 1.
2. Hooks. LISA at γ = 2. Further hooks stand before and after LISA's own and read the clock, step by step:
   the cost of a draw (freezing, thawing and releasing state), and of proof, as a share of one γ = 2 step.

A step is forward, backward, AdamW and zero_grad in fp32 on one random sequence. Weights are random: their
values don't matter to the clock. With one thread the clock is that of the process, which other jobs on
the machine disturb least; with more it is wall time.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA, build_adamw, find_layers

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
GOALS = {"step ratio": 1.02, "draw": 0.05, "proof sample": 0.01}
PERIOD = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what LISA's hooks cost.")
    parser.add_argument("--size", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per step")
    parser.add_argument("--steps", type=int, default=20, help="steps per optimizer in part 1")
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
    """Step seconds of AdamW, AdamW with LISA at γ = N, and AdamW again, interleaved."""
    layers = find_layers(model)
    optimizers = {name: build_adamw(model, layers, lr=1e-5) for name in ("bare", "lisa", "bare again")}
    lisa = LISA(model, optimizers["lisa"], active=layers.num_blocks, period=PERIOD)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    rng = random.Random(0)
    for step in range(-1, steps):  # step -1 makes the optimizers' state and is not counted
        for name in rng.sample(list(optimizers), k=3):
            started = clock()
            train_step(model, optimizers[name], ids)
            if step >= 0:
                seconds[name].append(clock() - started)
    lisa.detach()
    bare = median(seconds["bare"])
    return {
        "steps": steps,
        "bare step seconds": bare,
        "step ratio": median(seconds["lisa"]) / bare,
        "step ratio of means": mean(seconds["lisa"]) / mean(seconds["bare"] + seconds["bare again"]),
        "noise": median(seconds["bare again"]) / bare,
    }


def measure_hooks(
    model: nn.Module, ids: torch.Tensor, periods: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Cost of a draw and of a period's proof, as shares of a step at γ = 2."""
    per_verify = {
        verify: time_hooks(model, ids, periods, clock, verify) for verify in ("off", "sample", "full")
    }
    step, without, draw = per_verify["off"]
    return {
        "periods": periods,
        "lisa step seconds": step,
        "draw": draw / step,
        "hooks per period": without / step,
        "proof sample": (per_verify["sample"][1] - without) / step,
        "proof full": (per_verify["full"][1] - without) / step,
    }


def time_hooks(
    model: nn.Module,
    ids: torch.Tensor,
    periods: int,
    clock: Callable[[], float],
    verify: Literal["off", "sample", "full"],
) -> tuple[float, float, float]:
    """Median seconds of a step, of all hooks in a period, and of the hook that draws."""
    optimizer = build_adamw(model, find_layers(model), lr=1e-5)
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(clock())

    handles = [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    lisa = LISA(model, optimizer, active=2, period=PERIOD, verify=verify)
    handles += [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    steps = []
    for _ in range((1 + periods) * PERIOD):
        started = clock()
        train_step(model, optimizer, ids)
        steps.append(clock() - started)
    lisa.check()
    lisa.detach()
    for handle in handles:
        handle.remove()

    before = [end - start for start, end in zip(marks[0::4], marks[1::4], strict=True)]
    after = [end - start for start, end in zip(marks[2::4], marks[3::4], strict=True)]
    hooks = [pre + post for pre, post in zip(before, after, strict=True)]
    firsts = range(PERIOD, len(steps), PERIOD)  # the first period warms up
    return (
        median(steps[PERIOD:]),
        median(sum(hooks[first : first + PERIOD]) for first in firsts),
        median(after[first + PERIOD - 1] for first in firsts),
    )


def train_step(model: nn.Module, optimizer: Optimizer, ids: torch.Tensor) -> None:
    """One step on one sequence."""
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def table(figures: dict[str, Any]) -> str:
    """Lay the figures out for reading."""
    lines = [
        f"{figures['size']}: {figures['parameters']:,} parameters, {figures['tokens']} tokens per step, "
        f"{figures['threads']} thread(s), {figures['clock']}",
        f"AdamW {figures['bare step seconds']:.3f} s/step ({figures['steps']} steps each); "
        f"LISA γ=2 {figures['lisa step seconds']:.3f} s/step ({figures['periods']} periods of {PERIOD})",
        "",
        f"{'step with LISA, γ=N / AdamW, medians':<44}{figures['step ratio']:>9.4f}   goal ≤ {GOALS['step ratio']}",
        f"{'  the same, means':<44}{figures['step ratio of means']:>9.4f}",
        f"{'  AdamW / AdamW: the noise':<44}{figures['noise']:>9.4f}",
    ]
    rows = {
        "draw": "a draw / step, γ=2",
        "proof sample": 'verify="sample", a whole period / one step',
        "proof full": 'verify="full", a whole period / one step',
        "hooks per period": "all hooks without proof, a period / one step",
    }
    for key, label in rows.items():
        goal = f"   goal ≤ {GOALS[key]:.0%}" if key in GOALS else ""
        lines.append(f"{label:<44}{figures[key]:>9.2%}{goal}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
