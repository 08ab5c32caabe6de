"""Theorem 1 of the LISA paper made visible: how average regret falls on a convex problem.

python experiments/theorem1.py                      # the figure and its numbers; five minutes of one core
python experiments/theorem1.py --steps 2000 --seeds 0

The theorem (arXiv 2403.17919, section 3) speaks of a convex and smooth f over a bounded set W, learning rates
α/√t, and steps that are projected onto W. It promises, for the points w_1, …, w_T that LISA visits,

    (1/T) Σ_t f(w_t)  -  min over W of f   =  O(1/√T)

Here f is the mean cross-entropy of logistic regression on scikit-learn's digits (1,797 images of 8 × 8, ten
classes). Its weights are 16 blocks, each for four pixels, and a bias, which is the end. W is the box of all
weights in [-1, 1]. AdamW moves every number by its own rate, and the projection is weighted by these rates;
on a box it is a clamp, whatever the rates. Gradients are those of eight images drawn at random; f itself is
computed on all images at every step.

A run's value at T is the average over its first T steps. Curves and slopes are means over the seeds. LISA
runs in two ways: moments of frozen blocks are kept in host memory, so that AdamW has the moments of one long
run, as proofs of its regret assume; or they are dropped at each draw, as is the default here.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lisatune import LISA
from lisatune.report import charts

BOX = 1.0
"""Every weight stays in [-BOX, BOX]."""

BLOCKS, ACTIVE, PERIOD = 16, 4, 10
RATE = 0.3
"""α: the learning rate of step t is α/√t."""

BATCH = 8
ARMS: dict[str, tuple[str, Literal["cpu", "drop"]] | None] = {
    "all blocks": None,
    "uniform, moments kept": ("uniform", "cpu"),
    "permutation, kept": ("permutation", "cpu"),
    "uniform, dropped": ("uniform", "drop"),
    "permutation, dropped": ("permutation", "drop"),
}
"""Full training, and LISA's sampler and state policy."""

GREY = "#767d86"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "theorem1.svg"


class Regression(nn.Module):
    """Logistic regression whose weights are blocks, each for some of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64 // BLOCKS, 10, bias=False) for _ in range(BLOCKS))
        self.bias = nn.Parameter(torch.zeros(10))
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("weight"))

    def forward(self, images_B64: Tensor) -> Tensor:
        """Return logits [B, 10]."""
        weights: list[Tensor] = [block.get_parameter("weight") for block in self.blocks]
        return nn.functional.linear(images_B64, torch.cat(weights, dim=1), self.bias)


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images, float32 [1797, 64] in [0, 1], and labels, int64 [1797]."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def project(model: nn.Module) -> None:
    """Move every weight to the nearest point of the box."""
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-BOX, BOX)


def find_minimum(images: Tensor, labels: Tensor) -> float:
    """Return the minimum of f over the box, by L-BFGS-B in float64."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    wide = torch.cat([images, torch.ones(len(images), 1)], dim=1).double()

    def value_and_gradient(flat: Any) -> tuple[float, Any]:
        weights = torch.from_numpy(flat).view(65, 10).requires_grad_()
        loss = cross_entropy(wide @ weights, labels)
        (gradient,) = torch.autograd.grad(loss, weights)
        return loss.item(), gradient.numpy().ravel()

    start = torch.zeros(650, dtype=torch.float64).numpy()
    limits = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-7}
    found = minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=[(-BOX, BOX)] * 650, options=limits
    )
    if not found.success:
        raise RuntimeError(f"the minimum was not found: {found.message}")
    return float(found.fun)


def average_regret(arm: str, steps: int, seed: int, minimum: float, images: Tensor, labels: Tensor) -> Tensor:
    """Train one arm and return its average regret after each step, float64 [steps]."""
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    lisa = None
    if (settings := ARMS[arm]) is not None:
        lisa = LISA(
            model,
            optimizer,
            active=ACTIVE,
            period=PERIOD,
            sampler=settings[0],
            state=settings[1],
            seed=seed,
            lr_scaling="none",
        )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / math.sqrt(step + 1))
    rng = torch.Generator().manual_seed(seed)
    losses = torch.empty(steps, dtype=torch.float64)
    for step in range(steps):
        with torch.no_grad():
            losses[step] = cross_entropy(model(images), labels)
        rows = torch.randint(len(images), (BATCH,), generator=rng)
        cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        project(model)
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    if lisa is not None:
        lisa.check()
    return (losses - minimum).cumsum(0) / torch.arange(1, steps + 1)


def fit_slope(regret_T: Tensor) -> float:
    """Return the slope of log regret over log T in the second half of the logarithmic axis."""
    times = log_spaced(len(regret_T), first=math.isqrt(len(regret_T)))
    x, y = torch.tensor(times, dtype=torch.float64).log(), regret_T[[t - 1 for t in times]].log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def log_spaced(last: int, *, first: int = 1, count: int = 40) -> list[int]:
    """Return about `count` whole numbers from `first` to `last`, evenly spaced in their logarithm."""
    return sorted({round(first * (last / first) ** (i / (count - 1))) for i in range(count)})


def draw(regrets: dict[str, Tensor], bound: float) -> str:
    """Draw the curves and the line C/√T on logarithmic axes."""
    times = log_spaced(len(regrets["all blocks"]))
    named: list[charts.Line] = [
        (arm, [[(t, float(curve[t - 1])) for t in times]]) for arm, curve in regrets.items()
    ]
    named.append((f"{bound:.0f}/√T", [[(t, bound / math.sqrt(t)) for t in times]]))
    return charts.draw_lines(named, x="steps T", y="average regret", markers=False, log=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run all arms, print their slopes, and write the figure."""
    parser = argparse.ArgumentParser(description="Average regret of LISA on a convex problem.")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images, labels = load_digits()
    minimum = find_minimum(images, labels)
    regrets = {}
    for arm in ARMS:
        runs = [average_regret(arm, given.steps, seed, minimum, images, labels) for seed in given.seeds]
        regrets[arm] = torch.stack(runs).mean(dim=0)
    roots = torch.arange(1, given.steps + 1).sqrt()
    promised = [curve for arm, curve in regrets.items() if "dropped" not in arm]
    found = {f"slope, {arm}": fit_slope(curve) for arm, curve in regrets.items()}
    found |= {f"regret, {arm}": float(curve[-1]) for arm, curve in regrets.items()}
    found |= {"C": max(float((curve * roots).max()) for curve in promised), "minimum of f": minimum}
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in found.items()}, indent=1) + "\n")
    svg = draw(regrets, found["C"]).replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" color="{GREY}" ', 1
    )
    given.picture.write_text(svg + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
