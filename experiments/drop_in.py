"""Compare `lr_scaling` none and sqrt of the drop-in `LISA` in README's loop, over model.parameters().

python experiments/drop_in.py [--seeds 0 1 2] [--lrs 1e-4 3e-4 1e-3] [--output FILE.jsonl] [--smoke]

SmolLM2-135M-Instruct on questions about Python's standard library, γ = 2 of 30 blocks, K = 3, 48 steps of 4
rows of at most 96 tokens, five steps of warm-up, cosine, bf16 autocast over fp32 weights. A seed decides the
order of the rows and the draws. 64 other rows are held out, and halved by a hash of their prompts as
`lisatune compare` halves them. The first half chooses each scaling's learning rate, by the mean loss over the
seeds. The loss on the second half, which has chosen nothing, is the one to report. Each run appends a line to
the output, and a run with a line is not repeated. The chosen rates are printed at the end.

Lines with `held_out_after` in drop_in.jsonl are older. Their loss is that of all 64 rows: the better of their
rates would be chosen and reported on the same rows. So they choose nothing now.
"""

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lisatune import LISA
from lisatune.data.batches import collate
from lisatune.data.prepare import prepare_data
from lisatune.data.readers import read_data
from lisatune.data.records import Records
from lisatune.data.splitting import split_records
from lisatune.data.tokens import tokenize
from lisatune.lisa.rates import Scaling
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.models.load import load_model, load_tokenizer
from lisatune.recipe import Recipe
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
    choosing: list[dict[str, Tensor]]
    reporting: list[dict[str, Tensor]]


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
    runs = [line for line in map(json.loads, lines) if "test_after" in line]
    done = {(line["lr_scaling"], line["lr"], line["seed"]) for line in runs}
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
                    runs.append(line)
    for name, chosen in choose(runs).items():
        print(f"{name}: {json.dumps(chosen)}")


def choose(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Choose each scaling's rate by the mean loss on the validation half; give that on the test half."""
    losses: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for run in runs:
        of_rate = losses.setdefault(run["lr_scaling"], {}).setdefault(run["lr"], [])
        of_rate.append((run["validation_after"], run["test_after"]))
    found = {}
    for scaling, rates in losses.items():
        means = {lr: tuple(map(mean, zip(*each, strict=True))) for lr, each in rates.items()}
        lr = min(means, key=lambda lr: means[lr][0])
        found[scaling] = {"lr": lr, "validation_loss": means[lr][0], "test_loss": means[lr][1]}
    return found


def prepare() -> Task:
    """Load the model, and make batches of rows that are about as long."""
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "demo.yaml", DATA)
    tokenizer = load_tokenizer(**recipe.model.location)
    data = prepare_data(recipe, tokenizer)
    model = load_model(**recipe.model.source)

    def batches(rows: Any) -> list[dict[str, Tensor]]:
        by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
        return [collate(by_length[i : i + ROWS]) for i in range(0, len(by_length), ROWS)]

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = random.Random(0).sample(list(data.train.rows), ROWS * 3 * STEPS)
    length = recipe.data.max_length
    held_out = [tokenize(half, tokenizer, max_length=length).rows for half in halve_held_out(recipe)]
    return Task(model, weights, batches(train), *map(batches, held_out))


def halve_held_out(recipe: Recipe) -> tuple[Records, Records]:
    """Halve the held-out records: the first half chooses a learning rate, the second reports."""
    return split_records(read_data(recipe)[1], 0.5, seed=0)


def run(task: Task, scaling: Scaling, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train from the loaded weights, as README's loop does, and measure."""
    model = task.model
    model.load_state_dict(task.weights)
    model.requires_grad_(True).train()
    before = evaluate(model, task.choosing), evaluate(model, task.reporting)
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
    after = evaluate(model, task.choosing), evaluate(model, task.reporting)
    names = ("validation_before", "test_before", "validation_after", "test_after")
    return {"tokens": tokens} | dict(zip(names, (*before, *after), strict=True))


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return the mean loss of the rows of some batches."""
    model.eval()
    loss, total, count = CausalLMLoss(model), 0.0, 0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, num_tokens = loss(batch)
        total, count = total + float(loss_sum), count + int(num_tokens)
    model.train()
    return total / count


if __name__ == "__main__":
    main()
