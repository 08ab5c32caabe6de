"""Train a slice of the rows of every matrix, in place of blocks: every block learns in each step.

python experiments/row_slices.py [section.key=value …] [--seeds 0 1 2] [--arms …] [--lr 1e-4 …] [--smoke]

With S slices, slice i of a matrix W [out, in] is its rows from i·out/S to (i + 1)·out/S. One slice of every
matrix of every block trains in a period, with norms and biases as part of slice 0, and LISA draws it as it
draws blocks. This is BAdam's ratio with adjacent rows, and ChunkFT's working set (arXiv 2605.21177). For
y = x Wᵀ and the active rows a to b, backward computes

    dx = dy W          dW[a:b] = dy[:, a:b]ᵀ x

so gradients and optimizer state are those of 1/S of the blocks, as with γ = N/S. What is not saved: backward
goes through all blocks, and keeps the input of every matrix.

Model and held-out slices are those of gap.yaml; the learning rate is 1e-4 by default, and a slice's √S times
as large. Each run appends its figures and the memory of a step as a line to FOLDER/runs.jsonl, and a run with
a line is not repeated.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lisatune.compare.arms import read_comparison
from lisatune.compare.measure import Job, _measure_step, measure_model
from lisatune.compare.slices import Lengths, use_slices, write_slices
from lisatune.files import yaml
from lisatune.lisa import LISA
from lisatune.methods import Lisa
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.nn.units import UnitMap
from lisatune.recipe import Recipe
from lisatune.train.loop import train

PERIOD = 5
ARMS: dict[str, dict[str, Any]] = {
    "1/15 of the rows with frozen ends": {"slices": 15, "ends": "frozen"},
    "1/15 of the rows": {"slices": 15},
    "1/4 of the rows with frozen ends": {"slices": 4, "ends": "frozen"},
}
"""γ = 2 of 30 blocks is 1/15; γ = 8 is nearly 1/4."""

NAME = "row_slices"
"""Where the slices are in the model."""


class RowGradient(torch.autograd.Function):
    """y = x Wᵀ, with a gradient for some rows of W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, starts: tuple[int, ...], *slices: Tensor) -> Tensor:
        """Use the whole weight; `slices` are views of its rows from `starts` on."""
        ctx.save_for_backward(x, weight)
        ctx.rows = [(start, start + len(rows)) for start, rows in zip(starts, slices, strict=True)]
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, and that of each slice."""
        x, weight = (each.to(grad.dtype) for each in ctx.saved_tensors)
        flat, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        return of_x, None, None, *(flat[:, start:end].T @ inputs for start, end in ctx.rows)


class RowLinear(nn.Module):
    """A linear layer that trains by slices of its rows. They share memory with `weight`, a buffer here."""

    weight: Tensor

    def __init__(self, layer: nn.Linear, num_slices: int) -> None:
        super().__init__()
        rows = layer.out_features
        if rows < num_slices:
            raise ValueError(
                f"a matrix of {rows} rows cannot be cut into {num_slices} slices; lower `slices`"
            )
        self.register_buffer("weight", layer.weight.detach(), persistent=False)
        self.bias = layer.bias
        ends = [i * rows // num_slices for i in range(num_slices + 1)]
        self.starts = ends[:-1]
        # In a tuple, so that they are parameters of the model once: in its list of slices.
        self.slices = tuple(nn.Parameter(self.weight[i:j]) for i, j in pairwise(ends))

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        active = [(i, rows) for i, rows in zip(self.starts, self.slices, strict=True) if rows.requires_grad]
        y: Tensor = RowGradient.apply(
            x, self.weight, tuple(i for i, _ in active), *(rows for _, rows in active)
        )
        return y if self.bias is None else y + self.bias


def cut_rows(model: nn.Module, num_slices: int) -> None:
    """Replace the linear layers of the blocks, in place. `model.row_slices` holds what trains."""
    cut: list[RowLinear] = []
    for path, layer in list(_find(model, find_layers(model).blocks, nn.Linear)):
        cut.append(RowLinear(layer, num_slices))
        model.set_submodule(path, cut[-1])
    model.add_module(
        NAME, nn.ModuleList(nn.ParameterList(each.slices[i] for each in cut) for i in range(num_slices))
    )


def join_rows(model: nn.Module) -> None:
    """Undo `cut_rows`: the model is a plain one, with the weights that were trained."""
    for path, cut in list(_find(model, find_layers(model).blocks, RowLinear)):
        rows, columns = cut.weight.shape
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(cut.weight), cut.bias
        model.set_submodule(path, layer)
    model.__delattr__(NAME)


def _find(model: nn.Module, blocks: Iterable[str], kind: Any) -> Iterable[tuple[str, Any]]:
    below = tuple(f"{path}." for path in blocks)
    return (
        (path, each) for path, each in model.named_modules() if path.startswith(below) and type(each) is kind
    )


def map_slices(model: nn.Module, layers: LayerMap) -> UnitMap:
    """Return the slices as what LISA draws, and the ends without them."""
    num_slices = len(model.get_submodule(NAME))  # type: ignore[arg-type]
    beside = {name.rpartition(".")[0] for block in layers.block_parameters(model) for name in block}
    return UnitMap(
        blocks=tuple(f"{NAME}.{i}" for i in range(num_slices)),
        ends=tuple(name for name in layers.ends if not name.startswith(f"{NAME}.")),
        embedding=layers.embedding,
        head=layers.head,
        tied=layers.tied,
        others=tuple((path, 0) for path in sorted(beside)),
        of_block=tuple(range(num_slices)),
    )


class SlicedLISA(LISA):
    """LISA that makes the model a plain one before it is written."""

    def settle(self) -> None:
        """Put the linear layers back."""
        super().settle()
        join_rows(self._model)


@dataclass(frozen=True, kw_only=True)
class RowSlices(Lisa):  # type: ignore[misc]  # the experiment alone adds a key to it
    """LISA over slices of rows."""

    slices: int

    def prepare(self, model: nn.Module) -> nn.Module:
        """Cut the matrices."""
        cut_rows(model, self.slices)
        return model

    def build_optimizer(self, model: nn.Module, layers: LayerMap, config: Any) -> torch.optim.Optimizer:
        """Build the optimizer over ends and slices, one group per slice."""
        return super().build_optimizer(model, map_slices(model, layers), config)

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, layers: LayerMap, *, total_steps: int
    ) -> LISA:
        """Draw one slice at a time."""
        return SlicedLISA(
            model,
            optimizer,
            active=1,
            period=self.period,
            seed=self.seed,
            ends=self.ends,
            verify=self.verify,
            total_steps=total_steps,
            layers=map_slices(model, layers),
        )


def parse(given: list[str]) -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Train slices of the rows of every matrix.")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as in the comparisons")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--general", help="text to measure forgetting on")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4])
    parser.add_argument("--tokens", type=int, default=100_000, help="length of a run")
    parser.add_argument("--folder", type=Path, default=Path("runs/row-slices"))
    parser.add_argument("--smoke", action="store_true", help="a few steps of one arm, to see that it runs")
    parser.add_argument("--list-arms", action="store_true", help="print the names of the arms")
    return parser.parse_intermixed_args(given)


def main() -> None:
    """Make and measure the runs that are missing."""
    args = parse(sys.argv[1:])
    if args.list_arms:
        print("\n".join(ARMS))
        return
    budget = {"tokens": args.tokens}
    if args.smoke:
        args.arms, args.seeds, args.lr, budget = args.arms[:1], [0], args.lr[:1], {"steps": PERIOD + 1}
        args.folder = args.folder.with_name(args.folder.name + "-smoke")
        args.overrides += ["data.max_length=64", "data.limit=64", "data.validation_limit=16"]

    gap = Path(__file__).with_name("gap.yaml")
    comparison = read_comparison(gap, args.overrides, general=args.general)
    asked, slices = args.folder / "recipe.yaml", args.folder / "data"
    text = yaml.dump(comparison.recipe.as_dict())
    if not asked.exists():
        write_slices(comparison, slices)
        asked.write_text(text, encoding="utf-8")
    elif asked.read_text(encoding="utf-8") != text:
        sys.exit(f"{args.folder} has runs of another recipe; give another --folder")
    recipe = replace(comparison.recipe, data=use_slices(comparison.recipe.data, slices))
    figures, lengths = args.folder / "runs.jsonl", Lengths(recipe, budget)
    lines = figures.read_text(encoding="utf-8").splitlines() if figures.exists() else []
    done = {(line["arm"], line["lr"], line["seed"], line["tokens"]) for line in map(json.loads, lines)}
    for seed, arm, lr in product(args.seeds, args.arms, args.lr):
        totals = lengths.count_tokens(seed)
        if (arm, lr, seed, totals[-1]) not in done:
            rated = replace(recipe, optimizer=replace(recipe.optimizer, lr=lr))
            line = {"arm": arm, "lr": lr, "seed": seed} | run(rated, arm, seed, len(totals), args.folder)
            with figures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line))


def run(recipe: Recipe, arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train and measure one arm with one seed, then delete the model."""
    output = folder / f"{re.sub('[^a-z0-9]+', '-', arm)}-seed{seed}"
    method = RowSlices(period=PERIOD, seed=seed, **ARMS[arm])
    settings = replace(recipe.run, seed=seed, steps=steps, output=str(output), log_every=10)
    recipe = replace(recipe, method=method, run=settings)
    summary = train(recipe, overwrite=True)
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("test", "general")}
    job = Job(
        recipe=str(folder / "recipe.yaml"),  # its model, data section and precision are used
        model=str(summary["model"]),
        slices={name: str(path) for name, path in files.items() if path.exists()},
        with_memory=False,
        output="",
    )
    measured = measure_model(job)
    shutil.rmtree(summary["model"])
    step = _measure_step(recipe)
    return {
        "tokens": summary["tokens"],
        "validation_loss": summary["held_out_loss_after"],
        "test_loss": measured["test_loss"],
        "general_loss": measured.get("general_loss"),
        "step_peak_bytes": step["peak_bytes"],
        "step_at_peak": step["at_peak"],
        "train_seconds": summary["train_seconds"],
    }


if __name__ == "__main__":
    main()
