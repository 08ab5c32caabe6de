"""Plan and measure the memory of a training step of SmolLM2-135M on each of several ranks.

    torchrun --standalone --nproc-per-node 2 benchmarks/rank_memory.py
    python benchmarks/rank_memory.py

Each rank makes its own plan before it joins the others, then counts the live tensors of its second step.
"""

import os
import warnings

from lisatune import memory
from lisatune.distributed import ranks
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.train.assemble import assemble
from lisatune.train.recipe_file import recipe_without_file

LENGTH = 256
COMPACT = ["run.precision=bf16", "optimizer.moments=8bit", "optimizer.rounding=stochastic"]
IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"]
CASES = {
    "LISA γ=2, bf16": ["method.name=lisa", "method.active=2", "run.precision=bf16"],
    "LISA γ=2, bf16, 8bit, stochastic": ["method.name=lisa", "method.active=2", *COMPACT],
    "LISA γ=2, the same, in backward": ["method.name=lisa", "method.active=2", *COMPACT, *IN_BACKWARD],
    "full, bf16": ["method.name=full", "run.precision=bf16"],
    "full, bf16, 8bit, stochastic": ["method.name=full", *COMPACT],
    "full, the same, in backward": ["method.name=full", *COMPACT, *IN_BACKWARD],
}
COMMON = [
    "model.name=smollm2-135m",
    "data.train=python-docs",
    "data.limit=16",
    f"data.max_length={LENGTH}",
    "run.batch_size=1",
    "run.steps=100",
    "run.device=cpu",
]


def main() -> None:
    """Print a table row for each case and rank."""
    warnings.simplefilter("ignore")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    recipes = {name: recipe_without_file([*COMMON, *keys]) for name, keys in CASES.items()}
    plans = {name: plan_memory(recipe, ranks=count) for name, recipe in recipes.items()}
    with ranks.process_group("cpu"):
        for name, recipe in recipes.items():
            parts, plan = assemble(recipe), plans[name]
            batches = [make_batch(recipe, parts.built.model, LENGTH)]
            for _ in range(2):
                if plan.active_blocks is not None:
                    parts.built.schedule.hold(plan.active_blocks)
                with memory.measure(parts.built.model, parts.built.step.optimizer) as tracker:
                    parts.built.step.backward(batches)
                    parts.built.step.clip()
                    parts.built.step.update()
                    step = tracker.end_step()
            numbers = [plan.peak_bytes, step.peak_bytes, plan.static_bytes, step.static_bytes]
            largest = [ranks.max_over_ranks(number) / 2**20 for number in numbers]
            if ranks.is_rank0():
                print(f"| {name} | {count} | " + " | ".join(f"{each:.1f}" for each in largest) + " |")
            del parts


if __name__ == "__main__":
    main()
