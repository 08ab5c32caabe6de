"""The pictures of docs/concepts, each made from what the code does, and the badges of the README.

python docs/pictures.py            # all of them, in a minute or two of one core
python docs/pictures.py memory     # one

The same code writes the same bytes, on any machine where torch computes the same numbers.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lisatune import LISA, AdamW, build_adamw, find_layers
from lisatune.lisa.samplers import Permutation
from lisatune.memory import plan_memory
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.report import charts

PICTURES = Path(__file__).parent / "pictures"
GREY = "#767d86"
"""Ink of pictures that stand alone, as on GitHub: readable on white and on black. The site has its own."""


def draws() -> str:
    """Draw the 24 periods of 16 blocks at γ = 2 that the default sampler gives with seed 0."""
    sampler = Permutation(num_blocks=16, active=2)
    active = {period: sampler.draw(period, seed=0) for period in range(24)}
    visits = [sum(block in blocks for blocks in active.values()) for block in range(16)]
    return charts.draw_active_blocks(active, visits)


def qlisa() -> str:
    """Draw what frozen weights as codes save of a step of Llama-3.1-8B: 1 × 2048 tokens, frozen ends."""
    bars = {}
    for name, active, frozen_weights in (
        ("exact, γ=2", 2, "exact"),
        ("int8, γ=2", 2, "int8"),
        ("NF4, γ=2", 2, "nf4"),
        ("exact, γ=8", 8, "exact"),
        ("NF4, γ=8", 8, "nf4"),
    ):
        recipe = Recipe(
            model=ModelConfig(name="llama-3.1-8b"),
            data=DataConfig(train="unused", max_length=2048),
            method=METHODS["lisa"](active=active, ends="frozen", frozen_weights=frozen_weights),
            optimizer=OptimizerConfig(
                moments="8bit", rounding="stochastic", in_backward=True, max_grad_norm=None
            ),
            run=RunConfig(precision="bf16", batch_size=1, device="cuda", activation_checkpointing=True),
        )
        plan = plan_memory(recipe)
        bars[name] = {part: size / 2**30 for part, size in plan.at_peak.items()}
        sys.stdout.write(f"{name}: {plan.peak_bytes / 2**30:.2f} GiB\n")
    return charts.draw_stacked_bars(bars, x="GiB of tensors at a step's peak", limit=None, limit_name="")


def memory() -> str:
    """Draw what `lisatune plan` says of a step of Llama-3.1-8B: 1 × 2048 tokens in bf16, by category."""
    compact = OptimizerConfig(moments="8bit", rounding="stochastic")
    arms = {
        "full": (METHODS["full"](), OptimizerConfig()),
        "LoRA r=16": (METHODS["lora"](), OptimizerConfig()),
        "LISA γ=2": (METHODS["lisa"](), OptimizerConfig()),
        "LISA γ=8, 8-bit": (METHODS["lisa"](active=8), compact),
        "… frozen ends": (METHODS["lisa"](active=8, ends="frozen"), compact),
        "… int8": (METHODS["lisa"](active=8, ends="frozen", frozen_weights="int8"), compact),
    }
    bars = {}
    for name, (method, optimizer) in arms.items():
        recipe = Recipe(
            model=ModelConfig(name="llama-3.1-8b"),
            data=DataConfig(train="unused", max_length=2048),
            method=method,
            optimizer=optimizer,
            run=RunConfig(precision="bf16", batch_size=1, device="cuda"),
        )
        plan = plan_memory(recipe)
        bars[name] = {part: size / 2**30 for part, size in plan.at_peak.items()}
        sys.stdout.write(f"{name}: {plan.peak_bytes / 2**30:.2f} GiB\n")
    return charts.draw_stacked_bars(bars, x="GiB of tensors at a step's peak", limit=None, limit_name="")


def rounding() -> str:
    """Draw how far weights of 0.02 get in 300 steps at lr 1e-5 if all gradients point the same way."""

    def walk(dtype: torch.dtype, how: str) -> list[tuple[float, float]]:
        weight = nn.Parameter(torch.full((4096,), 0.02, dtype=dtype))
        optimizer = AdamW([weight], lr=1e-5, rounding=how)
        start, points = weight.detach().float().mean().item(), [(0.0, 0.0)]
        for step in range(1, 301):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if step % 15 == 0:
                points.append((step, 1e3 * (start - weight.detach().float().mean().item())))
        return points

    return charts.draw_lines(
        [
            ("float32 weights", [walk(torch.float32, "exact")]),
            ("bf16, exact", [walk(torch.bfloat16, "exact")]),
            ("bf16, stochastic", [walk(torch.bfloat16, "stochastic")]),
            ("bf16, nearest", [walk(torch.bfloat16, "nearest")]),
        ],
        x="optimizer steps",
        y="distance gone, in 0.001",
    )


def proof() -> str:
    """Draw how far each of 4 blocks of a tiny model is from its start: a frozen one does not move."""
    torch.manual_seed(0)
    model = Tiny(blocks=4)
    layers = find_layers(model, blocks="layers")
    optimizer = build_adamw(model, layers, lr=1e-3)
    lisa = LISA(model, optimizer, active=1, period=5, layers=layers)
    starts = [nn.utils.parameters_to_vector(block.parameters()).detach().clone() for block in model.layers]
    curves = [[(0.0, 0.0)] for _ in starts]
    for step in range(1, 61):
        ids = torch.randint(0, 32, (4, 9))
        nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for block, start, curve in zip(model.layers, starts, curves, strict=True):
            now = nn.utils.parameters_to_vector(block.parameters()).detach()
            curve.append((step, (now - start).norm().item()))
    lisa.check()
    named = [(f"block {index}", [curve]) for index, curve in enumerate(curves)]
    return charts.draw_lines(named, x="optimizer steps", y="‖weights − their start‖")


class Tiny(nn.Module):
    """An embedding, some residual blocks, a norm and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, T, 32]."""
        hidden = self.embed(ids)
        for block in self.layers:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


BADGES = {
    "docs": ("docs", "Start"),
    "paper": ("arXiv", "2403.17919"),
    "python": ("python", "3.11+"),
    "license": ("license", "Apache-2.0"),
    "checks": ("checks", "make test"),
}
"""Words of each badge. They are files here, because no host of badges knows the project."""


def badge(label: str, text: str) -> str:
    """Draw a label on grey beside a text on blue."""
    left, right = (10 + 6.6 * len(words) for words in (label, text))
    face = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right:.0f}" height="20" role="img" '
        f'aria-label="{label}: {text}"><clipPath id="r"><rect width="{left + right:.0f}" height="20" rx="3"/>'
        f'</clipPath><g clip-path="url(#r)"><rect width="{left:.1f}" height="20" fill="#555"/>'
        f'<rect x="{left:.1f}" width="{right:.1f}" height="20" fill="#2b6cb0"/></g><g {face}>'
        f'<text x="{left / 2:.1f}" y="14">{label}</text><text x="{left + right / 2:.1f}" y="14">{text}</text>'
        f"</g></svg>\n"
    )


DRAWN: dict[str, Callable[[], str]] = {
    "draws": draws,
    "memory": memory,
    "qlisa": qlisa,
    "rounding": rounding,
    "proof": proof,
}


def main() -> None:
    """Write the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/concepts.")
    parser.add_argument("names", nargs="*", choices=[*DRAWN, []], default=[])
    PICTURES.mkdir(exist_ok=True)
    for name, words in BADGES.items():
        (PICTURES.parent / "badges" / f"{name}.svg").write_text(badge(*words), encoding="utf-8")
    for name in parser.parse_args().names or DRAWN:
        svg = DRAWN[name]().replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" color="{GREY}" ', 1)
        (PICTURES / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
