"""Compare the policies of the ends: their cost in held-out loss, and the optimizer state they save.

python experiments/ends.py --steps 200 --seeds 0 1 2 --json ends.json [--data alpaca.jsonl]

Every policy trains SmolLM2-135M, whose embedding and head are tied, and its untied twin: the same model with
a copy of the embedding as its head, which gives bit-identical logits. All runs of a seed train on the same
batches; equal numbers of tokens are checked. The runs are made as `lisatune train` makes them. A finished run
is not repeated, so an interrupted command can be given again. Trained models are deleted.

Prints a Markdown table for each model: held-out loss after training as mean and range over the seeds, its
difference to `train`, and the largest optimizer state of a step. State on the device and in host memory is
counted: `cpu` keeps the state of the ends in host memory.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from torch import nn

from lisatune.methods import Lisa
from lisatune.models.load import load_model, load_tokenizer, save_model
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.recipe.run import Precision
from lisatune.train.loop import train

POLICIES = ("train", "every:2", "every:5", "head", "frozen", "8bit", "factored", "cpu", "every:5+8bit")
TIED = "smollm2-135m"


def main() -> None:
    """Make the runs, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(description="Compare the policies of the ends.")
    parser.add_argument("--data", default="python-docs", help="training data, as data.train of a recipe")
    parser.add_argument("--validation", help="held-out data; default: a share of --data")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--models", nargs="+", choices=("tied", "untied"), default=["tied", "untied"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence at most")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--period", type=int, default=5)
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16-mixed")
    parser.add_argument("--held-out", type=int, default=128, help="held-out records")
    parser.add_argument("--folder", type=Path, default=Path("runs/ends"), help="folder for runs and twin")
    parser.add_argument("--json", type=Path, help="file for the figures of every run")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of two policies, to see that it runs"
    )
    args = parser.parse_args()
    if args.smoke:
        args.policies, args.seeds, args.steps = ["train", "every:2+8bit"], [0], 3
        args.batch, args.length, args.period, args.held_out = 1, 64, 1, 4
    if args.validation is None and args.data == "python-docs":
        args.validation = "python-docs:validation"

    folders = {"tied": TIED}
    if "untied" in args.models:
        folders["untied"] = str(make_untied_twin(args.folder / "smollm2-135m-untied"))
    rows = [
        run(make_recipe(args, folders[model], policy, seed), args.folder)
        | {"model": model, "policy": policy, "seed": seed}
        for seed in args.seeds
        for model in args.models
        for policy in args.policies
    ]
    check_equal_tokens(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for model in args.models:
        print(f"\n{model}:\n\n{make_table([row for row in rows if row['model'] == model])}")


def make_recipe(args: argparse.Namespace, model: str, policy: str, seed: int) -> Recipe:
    """Make the recipe of one policy and seed."""
    return Recipe(
        model=ModelConfig(name=model),
        data=DataConfig(
            train=args.data,
            validation=args.validation,
            validation_limit=args.held_out,
            max_length=args.length,
        ),
        method=Lisa(active=args.active, period=args.period, seed=seed, ends=policy, lr_scaling="none"),
        optimizer=OptimizerConfig(lr=args.lr, warmup_steps=min(10, args.steps // 10)),
        run=RunConfig(
            seed=seed,
            steps=args.steps,
            batch_size=args.batch,
            precision=args.precision,
            samples=0,
            log_every=min(10, args.steps),
        ),
    )


def run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Make a run, or read its figures if it was made before."""
    key = hashlib.sha256(json.dumps(recipe.as_dict(), sort_keys=True).encode()).hexdigest()[:16]
    output = folder / key
    figures = output / "figures.json"
    if not figures.exists():
        summary: Any = train(replace(recipe, run=replace(recipe.run, output=str(output))), overwrite=True)
        shutil.rmtree(summary["model"])
        kept = ("held_out_loss_before", "held_out_loss_after", "tokens", "peak_state_bytes", "train_seconds")
        figures.write_text(json.dumps({name: summary[name] for name in kept}), encoding="utf-8")
    read: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return read | {"run": str(output)}


def make_untied_twin(folder: Path) -> Path:
    """Save SmolLM2 with a separate head, which starts as a copy of the embedding."""
    if (folder / "config.json").exists():
        return folder
    model, tokenizer = load_model(TIED), load_tokenizer(TIED)
    ids = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        tied_logits = model(ids).logits
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    save_model(model, tokenizer, folder)
    with torch.no_grad():
        logits = load_model(str(folder))(ids).logits
    if not torch.equal(logits, tied_logits):
        raise RuntimeError(f"the untied twin in {folder} gives other logits than {TIED}")
    return folder


def check_equal_tokens(rows: list[dict[str, Any]]) -> None:
    """Raise unless all runs of a seed trained on the same number of tokens."""
    for seed in {row["seed"] for row in rows}:
        counts = {row["tokens"] for row in rows if row["seed"] == seed}
        if len(counts) > 1:
            raise RuntimeError(
                f"runs of seed {seed} trained on different numbers of tokens: {sorted(counts)}"
            )


def make_table(rows: list[dict[str, Any]]) -> str:
    """Format one model's figures as a Markdown table."""
    lines = [
        "| `ends` | held-out loss | range over seeds | against `train` | optimizer state, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_policy: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], []).append(row)
    plain = {row["seed"]: row["held_out_loss_after"] for row in by_policy.get("train", [])}
    for policy, mine in by_policy.items():
        losses = [row["held_out_loss_after"] for row in mine]
        differences = [
            row["held_out_loss_after"] - plain[row["seed"]] for row in mine if row["seed"] in plain
        ]
        against = f"{mean(differences):+.4f}" if differences else ""
        state = max(row["peak_state_bytes"] for row in mine) / 2**20
        lines.append(
            f"| `{policy}` | {mean(losses):.4f} | {min(losses):.4f} – {max(losses):.4f} | {against} "
            f"| {state:.0f} |"
        )
    before = mean(row["held_out_loss_before"] for row in rows)
    tokens = mean(row["tokens"] for row in rows)
    seeds = len({row["seed"] for row in rows})
    return "\n".join([*lines, "", f"Before training {before:.4f}; {tokens:.0f} tokens, {seeds} seed(s)."])


if __name__ == "__main__":
    main()
