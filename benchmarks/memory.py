"""Compare planned with measured memory of a training step, as a Markdown table. Weights are random.

python benchmarks/memory.py                          # SmolLM2's shape, 1 × 256 tokens
python benchmarks/memory.py --shape gpt2 --length 512
"""

import argparse
import itertools
import warnings
from typing import Any

import torch

from lisatune import memory
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import plan_memory
from lisatune.memory.tracker import StepMemory
from lisatune.methods import METHODS, Method
from lisatune.methods.build import build, weight_dtype
from lisatune.models.shapes import shape_config
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig

METHOD_ROWS: dict[str, Method] = {
    "full": METHODS["full"](),
    "LoRA r=16": METHODS["lora"](),
    "LISA γ=2": METHODS["lisa"](),
    "LISA γ=8": METHODS["lisa"](active=8),  # type: ignore[call-arg]
    "LISA γ=2, correction lora": METHODS["lisa"](correction="lora"),  # type: ignore[call-arg]
    "QLISA int8 γ=2": METHODS["lisa"](frozen_weights="int8"),  # type: ignore[call-arg]
    "QLISA NF4 γ=2, frozen ends": METHODS["lisa"](frozen_weights="nf4", ends="frozen"),  # type: ignore[call-arg]
    "QLISA NF4 γ=8": METHODS["lisa"](active=8, frozen_weights="nf4"),  # type: ignore[call-arg]
}


def measured(recipe: Recipe, blocks: tuple[int, ...] | None) -> StepMemory:
    """Make two real steps, and return the memory of the second."""
    from transformers import AutoModelForCausalLM

    config: Any = shape_config(recipe.model.name)
    model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(recipe))
    built = build(recipe, model, CausalLMLoss(model), steps=10, device=torch.device("cpu"))
    if blocks is not None:
        built.schedule.hold(blocks)
    ids_BT = torch.arange(recipe.data.max_length)[None] % config.vocab_size
    batch = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": ids_BT}
    with memory.measure(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            built.step.backward([batch])
            built.step.clip()
            built.step.update()
            second = tracker.end_step()
    return second


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--methods", default="", help="only rows whose name has this text")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    print("| method | precision | checkpointing | planned MiB | measured MiB | difference |")
    print("|---|---|---|---|---|---|")
    for (name, method), precision, checkpointing in itertools.product(
        METHOD_ROWS.items(), ("fp32", "bf16"), (False, True)
    ):
        if options.methods not in name:
            continue
        run = RunConfig(batch_size=1, precision=precision, activation_checkpointing=checkpointing, steps=100)  # type: ignore[arg-type]
        recipe = Recipe(
            model=ModelConfig(name=options.shape),
            data=DataConfig(train="none", max_length=options.length),
            method=method,
            run=run,
        )
        plan = plan_memory(recipe, config=shape_config(options.shape))
        real = measured(recipe, plan.active_blocks).peak_bytes
        error = plan.peak_bytes / real - 1
        on = "on" if checkpointing else "off"
        sizes = f"{plan.peak_bytes / 2**20:.1f} | {real / 2**20:.1f}"
        print(f"| {name} | {precision} | {on} | {sizes} | {error:+.2%} |")


if __name__ == "__main__":
    main()
