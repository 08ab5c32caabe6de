"""Plan the LISA paper's Table 1 and Figure 3: peak memory by model and method.

python experiments/table1.py [--json table1.json] [--models gpt2 tinyllama-1.1b]

Setting of the paper (arXiv 2403.17919, section 4.1): one sequence of 1024 tokens, no activation
checkpointing, LoRA adapters also on embedding and head, 70B on 4 GPUs. All weights, gradients and moments are
bf16 here, because only then does full fine-tuning of 7B come near the paper's 59 GB. LoRA has two rows: bf16
adapters, and float32 adapters, which are PEFT's default. Every figure is a plan (`plan_memory`) of a training
step with lisatune's loss. It counts live tensors only, in GB of 10^9 bytes.

Each cell is printed and written to the JSON file as soon as it is planned. A second call with the same file
continues where the first stopped. Small models come first; large ones take minutes per cell.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.methods import Full, Lisa, Lora, Method
from lisatune.optim import adamw
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig


def _lora(rank: int, adapter_dtype: str) -> Lora:
    return Lora(rank=rank, ends=True, adapter_dtype=adapter_dtype)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "full": Full(),
    **{f"LoRA {rank}": _lora(rank, "weights") for rank in (128, 256, 512)},
    **{f"LoRA {rank} fp32": _lora(rank, "fp32") for rank in (128, 256, 512)},
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
"""The paper's figures in GB: full, LoRA of rank 128, 256, 512, LISA E+H, +2L, +4L."""

RANKS = {"llama-2-70b": 4}
"""GPUs, where the paper used more than one."""


def main() -> None:
    """Plan every cell, print it and write the JSON, then print the table."""
    parser = argparse.ArgumentParser(description="Plan the cells of the LISA paper's Table 1.")
    parser.add_argument("--models", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--json", type=Path, help="file for the plans; cells that are in it are not planned again"
    )
    args = parser.parse_args()
    adamw.CHUNK["cpu"] = adamw.CHUNK_ELSEWHERE  # the plan is for an accelerator
    cells: dict[str, dict[str, Any]] = {}
    if args.json is not None and args.json.exists():
        cells = json.loads(args.json.read_text())
    for model in args.models:
        row = cells.setdefault(model, {})
        for name in args.methods:
            if name in row:
                continue
            row[name] = plan_cell(model, METHODS[name]).as_dict()
            gigabytes, seconds = row[name]["peak_bytes"] / 1e9, row[name]["seconds"]
            print(f"{model}, {name}: {gigabytes:.2f} GB, planned in {seconds:.0f} s", flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(cells, indent=1) + "\n")
    print(make_table({model: cells[model] for model in args.models}), flush=True)


def make_table(cells: dict[str, dict[str, Any]]) -> str:
    """Format a Markdown table with a row for each method: planned / paper, in GB."""
    lines = [f"| planned / paper, GB | {' | '.join(cells)} |", f"|---|{'---|' * len(cells)}"]
    papers = [name.removesuffix(" fp32") for name in METHODS]
    order = list(dict.fromkeys(papers))
    for name, theirs in zip(METHODS, papers, strict=True):
        column = [
            f"{row[name]['peak_bytes'] / 1e9:.1f} / {PAPER[model][order.index(theirs)]}"
            if name in row
            else ""
            for model, row in cells.items()
        ]
        lines.append(f"| {name} | {' | '.join(column)} |")
    return "\n".join(lines)


def plan_cell(model: str, method: Method) -> MemoryPlan:
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
