"""Plan QLISA on cards of 8 to 80 GB, as a Markdown table: 1 × 2048 tokens, no weights are loaded.

python experiments/qlisa_plans.py                    # some minutes of one core
python experiments/qlisa_plans.py --shape llama-2-70b

All rows: run.precision bf16, 8-bit moments, stochastic rounding, no clipping, activation checkpointing.
"""

import argparse
import sys
import warnings

from lisatune.memory import plan_memory
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

ROWS: dict[str, list[tuple[str, str, int]]] = {
    "llama-3.1-8b": [
        ("exact", "frozen", 2),
        ("int8", "frozen", 2),
        ("mixed", "frozen", 2),
        ("nf4", "frozen", 2),
        ("exact", "frozen", 8),
        ("int8", "frozen", 8),
        ("mixed", "frozen", 8),
        ("nf4", "frozen", 8),
        ("nf4", "frozen", 20),
        ("exact", "train", 2),
        ("nf4", "train", 2),
    ],
    "llama-2-70b": [("nf4", "frozen", 2), ("nf4", "frozen", 8)],
}
"""Format of frozen weights, ends and γ, by shape."""


def plan(
    shape: str, frozen_weights: str, ends: str, active: int, *, in_backward: bool
) -> tuple[float, float]:
    """Return GiB of tensors at the peak of a step, and GiB of exact weights in host memory or on disk."""
    method = METHODS["lisa"](active=active, ends=ends, frozen_weights=frozen_weights)  # type: ignore[call-arg]
    recipe = Recipe(
        model=ModelConfig(name=shape),
        data=DataConfig(train="unused", max_length=2048),
        method=method,
        optimizer=OptimizerConfig(
            moments="8bit", rounding="stochastic", in_backward=in_backward, max_grad_norm=None
        ),
        run=RunConfig(
            precision="bf16", batch_size=1, steps=100, device="cuda", activation_checkpointing=True
        ),
    )
    planned = plan_memory(recipe)
    return planned.peak_bytes / 2**30, planned.host_bytes / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(ROWS), default="llama-3.1-8b")
    shape = parser.parse_args().shape
    warnings.simplefilter("ignore", UserWarning)
    print("| frozen weights | ends | γ | GiB, update in backward | GiB, update in step() | host GiB |")
    print("|---|---|---|---|---|---|")
    for frozen_weights, ends, active in ROWS[shape]:
        peak, host = plan(shape, frozen_weights, ends, active, in_backward=True)
        later, _ = plan(shape, frozen_weights, ends, active, in_backward=False)
        print(f"| {frozen_weights} | {ends} | {active} | {peak:.2f} | {later:.2f} | {host:.1f} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
