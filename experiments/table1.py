"""The LISA paper's Table 1 and Figure 3, peak memory by model and method, planned instead of measured.

python experiments/table1.py [--json table1.json] [--models gpt2 tinyllama-1.1b]

Setting of the paper (arXiv 2403.17919, section 4.1): one sequence of 1024 tokens, no activation
checkpointing, LoRA's adapters also on embedding and head, 70B on 4 GPUs. All weights, gradients and moments
are bf16 here: only with these does full fine-tuning of 7B come near the paper's 59 GB. LoRA's adapters are
the exception, which PEFT keeps in float32 with float32 moments. Every figure is a plan (`lisatune.plan`) of
a training step with our loss; it holds live tensors only, in GB of 10^9 bytes.
"""

import argparse
import json
from pathlib import Path

from lisatune.methods import Full, Lisa, Lora, Method
from lisatune.plan import MemoryPlan, plan_memory
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

METHODS: dict[str, Method] = {
    "full": Full(),
    "LoRA 128": Lora(rank=128, ends=True),
    "LoRA 256": Lora(rank=256, ends=True),
    "LoRA 512": Lora(rank=512, ends=True),
    "LISA E+H": Lisa(active=0),
    "LISA +2L": Lisa(active=2),
    "LISA +4L": Lisa(active=4),
}

PAPER: dict[str, tuple[str, ...]] = {
    "gpt2": ("3.8", "3.3", "3.5", "3.7", "3.3", "3.3", "3.4"),
    "tinyllama-1.1b": ("13", "7.9", "8.6", "10", "7.4", "8.0", "8.3"),
    "mistral-7b": ("59", "23", "26", "28", "21", "23", "24"),
    "llama-2-7b": ("59", "23", "26", "28", "21", "23", "24"),
    "llama-2-70b": ("OOM", "79", "OOM", "OOM", "71", "75", "79"),
}
"""GB, in the order of METHODS."""

RANKS = {"llama-2-70b": 4}


def main() -> None:
    """Plan every cell, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Plan the cells of the LISA paper's Table 1.")
    parser.add_argument("--models", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--json", type=Path, help="write the plans here")
    args = parser.parse_args()
    plans = {model: {name: plan(model, method) for name, method in METHODS.items()} for model in args.models}
    print(f"| planned / paper, GB | {' | '.join(METHODS)} |")
    print(f"|---|{'---|' * len(METHODS)}")
    for model, row in plans.items():
        cells = [
            f"{each.peak_bytes / 1e9:.1f} / {paper}"
            for each, paper in zip(row.values(), PAPER[model], strict=True)
        ]
        print(f"| {model} | {' | '.join(cells)} |")
    if args.json:
        values = {model: {name: each.as_dict() for name, each in row.items()} for model, row in plans.items()}
        args.json.write_text(json.dumps(values, indent=1) + "\n")


def plan(model: str, method: Method) -> MemoryPlan:
    """Plan one cell."""
    recipe = Recipe(
        model=ModelConfig(name=model),
        data=DataConfig(train="not read", max_length=1024),
        method=method,
        optimizer=OptimizerConfig(rounding="nearest", moments="bf16"),
        run=RunConfig(batch_size=1, precision="bf16", steps=1000),
    )
    return plan_memory(recipe, ranks=RANKS.get(model, 1))


if __name__ == "__main__":
    main()
