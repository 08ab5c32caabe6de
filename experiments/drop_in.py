"""Compare `lr_scaling` none and sqrt of the drop-in `LISA` in README's loop, over model.parameters().

python experiments/drop_in.py [--seeds 0 1 2] [--lrs 1e-4 3e-4 1e-3] [--output FILE.jsonl] [--smoke]

SmolLM2-135M-Instruct on questions about Python's standard library, γ = 2 of 30 blocks, K = 3, 48 steps of 4
rows of at most 96 tokens, five steps of warm-up, cosine, bf16 autocast over fp32 weights. A seed decides the
order of the rows and the draws. The held-out loss is that of 64 other rows. Each run appends a line to the
output, and a run with a line is not repeated.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lisatune import LISA
from lisatune.data.batches import collate
from lisatune.data.prepare import prepare_data
from lisatune.lisa.rates import Scaling
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.models.load import load_model, load_tokenizer
from lisatune.train.recipe_file import load_recipe

SCALINGS: tuple[Scaling, ...] = ("none", "sqrt")
ROWS, STEPS = 4, 48
DATA = ("data.max_length=96", "data.validation_limit=64", "run.samples=0", f"run.steps={STEPS}")


@dataclass(frozen=True)
class Task:
    """What all runs share."""

    model: Any
    weights: dict[str, Tensor]
    train: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description="Compare rates of blocks in a plain loop.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--smoke", action="store_true", help="two steps of two runs, to see that it runs")
    args = parser.parse_args()
    steps = 2 if args.smoke else STEPS
    if args.smoke:
        args.seeds, args.lrs, args.output = [0], [1e-4], Path("runs/drop_in-smoke.jsonl")
        args.output.parent.mkdir(exist_ok=True)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    done = {(line["lr_scaling"], line["lr"], line["seed"]) for line in map(json.loads, lines)}
    task = prepare()
    for seed in args.seeds:
        for lr in args.lrs:
            for scaling in SCALINGS:
                if (scaling, lr, seed) not in done:
                    line = {"lr_scaling": scaling, "lr": lr, "seed": seed} | run(
                        task, scaling, lr, seed, steps
                    )
                    with args.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)


def prepare() -> Task:
    """Load the model, and make batches of rows that are about as long."""
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "demo.yaml", DATA)
    tokenizer = load_tokenizer(**recipe.model.location)
    data = prepare_data(recipe, tokenizer)
    model = load_model(**recipe.model.source)

    def batches(rows: Any, limit: int) -> list[dict[str, Tensor]]:
        chosen = sorted(random.Random(0).sample(list(rows), limit), key=lambda row: len(row["input_ids"]))
        return [collate(chosen[i : i + ROWS]) for i in range(0, limit, ROWS)]

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held_out = batches(data.validation.rows, 64)
    return Task(model, weights, batches(data.train.rows, ROWS * 3 * STEPS), held_out)


def run(task: Task, scaling: Scaling, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train from the loaded weights, as README's loop does, and measure."""
    model = task.model
    model.load_state_dict(task.weights)
    model.requires_grad_(True).train()
    before = evaluate(task)
    order = random.Random(seed).sample(task.train, steps)
    loss = CausalLMLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, steps)
    lisa = LISA(model, optimizer, active=2, period=3, seed=seed, lr_scaling=scaling)
    for batch in order:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, num_tokens = loss(batch)
        (loss_sum / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    lisa.check()
    lisa.detach()
    tokens = sum(batch["input_ids"].numel() for batch in order)
    return {"tokens": tokens, "held_out_before": before, "held_out_after": evaluate(task)}


@torch.no_grad()
def evaluate(task: Task) -> float:
    """Return the mean loss of the held-out rows."""
    task.model.eval()
    loss, total, count = CausalLMLoss(task.model), 0.0, 0
    for batch in task.held_out:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, num_tokens = loss(batch)
        total, count = total + float(loss_sum), count + int(num_tokens)
    task.model.train()
    return total / count


if __name__ == "__main__":
    main()
