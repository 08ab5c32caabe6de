"""What correcting frozen blocks costs: planned memory and measured time of a step, as a Markdown table.

python benchmarks/correction.py                      # SmolLM2's shape, 2 × 256 tokens, nine rounds
python benchmarks/correction.py --smoke              # two arms, one round, to see that it runs

All arms: bf16 weights, stochastic rounding, 8-bit moments, no clipping; LISA with γ = 2, once with blocks 0
and N/2 active and once with the two in the middle. Weights are random, because their values do not affect the
time. Seconds are those of the process's CPU, forward, backward and update; each round makes one step of every
arm, the first round is not counted, and the figure is the median. Memory is the plan's peak of tensors, and
of these the activations.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch

from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import plan_memory
from lisatune.methods import METHODS, Method
from lisatune.methods.build import Built, build, weight_dtype
from lisatune.models.shapes import shape_config
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

Draw = tuple[int, ...] | None

SIX = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


def lisa(**keys: Any) -> Method:
    """Make LISA with γ = 2 and frozen ends."""
    return METHODS["lisa"](**{"active": 2, "ends": "frozen", **keys})


ARMS: dict[str, Method] = {
    "none": lisa(),
    "lora, all seven": lisa(correction="lora"),
    "lora, all but down_proj": lisa(correction="lora", correction_matrices=SIX),
    "lora, o_proj": lisa(correction="lora", correction_matrices=("o_proj",)),
    "lora, all seven, above": lisa(correction="lora", correction_blocks="above"),
    "sign": lisa(correction="sign"),
    "none, ends train": lisa(ends="train"),
    "lora, all seven, ends train": lisa(ends="train", correction="lora"),
    "method lora, r = 8": METHODS["lora"](rank=8),  # type: ignore[call-arg]
    "method lora, r = 16": METHODS["lora"](rank=16),  # type: ignore[call-arg]
}


def make_recipe(method: Method, shape: str, batch_size: int, length: int) -> Recipe:
    """Make the recipe of an arm."""
    return Recipe(
        model=ModelConfig(name=shape),
        data=DataConfig(train="none", max_length=length),
        method=method.without_proof(),
        optimizer=OptimizerConfig(max_grad_norm=None, moments="8bit", rounding="stochastic"),
        run=RunConfig(batch_size=batch_size, precision="bf16", steps=400, device="cpu"),
    )


def assemble(recipe: Recipe) -> Built:
    """Build an arm's model with random weights."""
    from transformers import AutoModelForCausalLM

    config: Any = shape_config(recipe.model.name)
    model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype(recipe))
    return build(recipe, model, CausalLMLoss(model), steps=400, device=torch.device("cpu"))


def take_step(built: Built, draw: Draw, ids_BT: torch.Tensor) -> float:
    """Make a step with these blocks active, and return its CPU seconds."""
    if draw is not None:
        built.schedule.hold(draw)
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    started = time.process_time()
    built.step.backward([{"input_ids": ids_BT, "labels": ids_BT, "position_ids": positions_BT}])
    built.step.update()
    return time.process_time() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure what correcting frozen blocks costs.")
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = dict(list(ARMS.items())[:2]) if options.smoke else ARMS
    rounds, length = (2, 16) if options.smoke else (options.rounds, options.length)
    recipes: dict[str, Recipe] = {
        name: make_recipe(method, options.shape, options.batch, length) for name, method in arms.items()
    }
    built = {name: assemble(recipe) for name, recipe in recipes.items()}
    middle = next(iter(built.values())).layers.num_blocks // 2
    draws: list[Draw] = [(0, middle), (middle - 1, middle)]
    config: Any = shape_config(options.shape)
    ids_BT = torch.randint(
        config.vocab_size, (options.batch, length), generator=torch.Generator().manual_seed(0)
    )

    seconds: dict[tuple[str, Draw], list[float]] = {}
    for number in range(rounds):
        for name, each in built.items():
            for draw in draws if each.schedule.active_blocks is not None else [None]:
                taken = take_step(each, draw, ids_BT)
                if number:
                    seconds.setdefault((name, draw), []).append(taken)
    print(
        "| correction | active | peak, MiB | activations at the peak, MiB | CPU s a step |\n"
        + "|---" * 5
        + "|"
    )
    for (name, draw), times in seconds.items():
        plan = plan_memory(recipes[name], blocks=draw)
        active = "" if draw is None else " and ".join(map(str, draw))
        figures = f"{plan.peak_bytes / 2**20:.1f} | {plan.at_peak['activations'] / 2**20:.1f}"
        print(f"| {name} | {active} | {figures} | {median(times):.2f} |", flush=True)
    print(f"\n{describe_state(built['lora, all seven'])}")


def describe_state(built: Built) -> str:
    """Say what it takes to bring the weights back from merged ones, after the steps that were made."""
    started = time.process_time()
    state = built.step.optimizer.state_dict()["lisa"]["correction"]["adapters"]
    seconds = time.process_time() - started
    parameters = dict(built.model.named_parameters())
    numbers = sum(parameters[f"{name}.weight"].numel() for name in state)
    missed = sum(len(entry["places"]) for entry in state.values())
    kept = sum(entry[key].nbytes for entry in state.values() for key in ("places", "values"))
    return (
        f"Taking the adapters out of merged weights misses {missed / numbers:.2%} of {numbers:,} numbers, "
        f"which are kept in {kept / 1e6:.1f} MB; optimizer.state_dict() took {seconds:.1f} s."
    )


if __name__ == "__main__":
    main()
