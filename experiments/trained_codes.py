"""What is lost if codes are trained: LISA whose weights are codes after every step, beside QLISA.

python experiments/trained_codes.py [--seeds 0 1 2] [--lrs 3e-4] [--output FILE.jsonl] [--smoke]

    exact               LISA
    int8, nf4           QLISA: frozen blocks are codes, exact weights are kept elsewhere
    int8, nf4 trained   all linear layers of blocks are codes; after a step those that trained are encoded
                        anew from what the step made of the decoded ones, and nothing else is kept

Model, data, steps and held-out rows (both halves) are those of `drop_in.py`, with K = 3 and γ = 2. All arms
have the same rate, by default the better one of LISA's two in drop_in.jsonl, which was chosen on these rows.
Each run appends a line to the output, and a run with a line is not repeated. The held-out loss is that of the
saved weights.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from drop_in import Task, evaluate, prepare
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lisatune import LISA
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.nn.codes import make_format
from lisatune.nn.layers import find_layers

ARMS = ("exact", "int8", "nf4", "int8 trained", "nf4 trained")
STEPS = 48


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description="Compare exact weights with codes that train.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--smoke", action="store_true", help="two steps of each arm, to see that it runs")
    args = parser.parse_args()
    steps = 2 if args.smoke else STEPS
    if args.smoke:
        args.seeds, args.output = [0], Path("runs/trained_codes-smoke.jsonl")
        args.output.parent.mkdir(exist_ok=True)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    done = {(line["arm"], line["lr"], line["seed"]) for line in map(json.loads, lines)}
    task = prepare()
    for seed in args.seeds:
        for lr in args.lrs:
            for arm in ARMS:
                if (arm, lr, seed) not in done:
                    line = {"arm": arm, "lr": lr, "seed": seed} | run(task, arm, lr, seed, steps)
                    with args.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)


def run(task: Task, arm: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train from the loaded weights, and measure."""
    model = task.model
    model.load_state_dict(task.weights)
    model.requires_grad_(True).train()
    name, _, trained = arm.partition(" ")
    if trained:
        encode(model, name, set(model.parameters()))
    held_out = [*task.choosing, *task.reporting]
    before = evaluate(model, held_out)
    order = random.Random(seed).sample(task.train, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, steps)
    codes: Any = "exact" if trained else name
    verify: Any = "off" if trained else "sample"  # weights of codes rest where the step was too small
    lisa = LISA(model, optimizer, active=2, period=3, seed=seed, frozen_weights=codes, verify=verify)
    loss = CausalLMLoss(model)
    for batch in order:
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, num_tokens = loss(batch)
        (loss_sum / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        moved = set(lisa.trainable_parameters())  # of this step, after which others may be drawn
        optimizer.step()
        if trained:
            encode(model, name, moved)
        schedule.step()
        optimizer.zero_grad()
    lisa.check()
    lisa.detach()
    return {"held_out_before": before, "held_out_after": evaluate(model, held_out)}


@torch.no_grad()
def encode(model: nn.Module, name: str, moved: set[nn.Parameter]) -> None:
    """Round the weights of linear layers in blocks that are in `moved` to codes of a format."""
    format = make_format(name)
    for path in find_layers(model).blocks:
        for layer in model.get_submodule(path).modules():
            if isinstance(layer, nn.Linear) and layer.weight in moved:
                weight = layer.weight
                weight.copy_(format.decode(format.encode(weight), weight.shape, weight.dtype))


if __name__ == "__main__":
    main()
