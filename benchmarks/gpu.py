"""A training step of each method on one GPU: memory planned and measured, time against LoRA r=16.

python benchmarks/gpu.py --shape llama-3.1-8b --length 2048 --output gpu-8b

Weights are random, in bf16, and created on the device. Every method runs in lisatune's loop with its loss
without full logits, so that peers need as little memory as possible. Arms run one after the other in one
process. An arm that fails is written down, the next one runs, and the command ends with 1.

A step's time depends on the draw, so blocks are drawn every 2 steps here, those of BAdam at random: ten steps
hold five draws, and one cycle of `ends=every:5`. Time is the mean of --steps steps after two warm-up steps,
with the cost of a draw spread over as many steps as by default, 10 for LISA and 50 for BAdam. Let --steps be
a multiple of ten. Memory is measured over two steps with the draw that the plan expects to need most: planned
live tensors, the most that torch allocated, and the most that it took from the device. With --device cpu,
live tensors stand for both. MFU is the FLOPs that the timed steps need over their time and the card's peak
(src/lisatune/train/flops.py); a card that is not known, and the CPU, have none. --compile compiles the blocks
first and says how long that took.
"""

import argparse
import gc
import inspect
import json
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lisatune import memory
from lisatune.console import first_line
from lisatune.files.disk import replace_file
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.memory.plan import MemoryPlan, make_batch, plan_memory
from lisatune.methods import METHODS
from lisatune.methods.build import Built, build, weight_dtype
from lisatune.models.shapes import shape_config
from lisatune.nn.blocks import RECOMPILE_LIMIT
from lisatune.recipe import Recipe
from lisatune.train.compiling import build_graphs
from lisatune.train.flops import needed_flops, utilization
from lisatune.train.recipe_file import recipe_without_file

SMALL = "optimizer.moments=8bit optimizer.rounding=stochastic"
ARMS = {
    "LoRA r=16": "method.name=lora method.rank=16",
    "LoRA r=128": "method.name=lora method.rank=128",
    "LISA γ=2": "method.active=2",
    "LISA γ=2, 8-bit": f"method.active=2 {SMALL}",
    "LISA γ=2, ends every 5th period": "method.active=2 method.ends=every:5",
    "LISA γ=2, frozen ends": "method.active=2 method.ends=frozen",
    "LISA γ=8, 8-bit": f"method.active=8 {SMALL}",
    "LISA γ=8, 8-bit, frozen ends": f"method.active=8 method.ends=frozen {SMALL}",
    "LISA γ=20, 8-bit": f"method.active=20 {SMALL}",
    "LISA γ=N, 8-bit, frozen ends": f"method.active=ALL method.ends=frozen {SMALL}",
    "QLISA int8 γ=8, frozen ends": f"method.active=8 method.ends=frozen method.frozen_weights=int8 {SMALL}",
    "QLISA NF4 γ=2, frozen ends": f"method.active=2 method.ends=frozen method.frozen_weights=nf4 {SMALL}",
    "QLISA NF4 γ=8, frozen ends": f"method.active=8 method.ends=frozen method.frozen_weights=nf4 {SMALL}",
    "LISA γ=2 + adapters r=8, 8-bit, frozen ends": (
        f"method.active=2 method.ends=frozen method.correction=lora {SMALL}"
    ),
    "LISA γ=2 + adapters r=8 above, 8-bit, frozen ends": (
        f"method.active=2 method.ends=frozen method.correction=lora method.correction_blocks=above {SMALL}"
    ),
    "LISA γ=2 + sign, 8-bit, frozen ends": (
        f"method.active=2 method.ends=frozen method.correction=sign optimizer.max_grad_norm=null {SMALL}"
    ),
    "QLoRA r=16": "method.name=qlora method.rank=16",
    "full, 8-bit": f"method.name=full {SMALL}",
    "full": "method.name=full",
    "BAdam": "method.name=badam",
}
PERIOD = 2
WARM_UP = PERIOD
DRAWS = {
    "lisa": f"method.period={PERIOD}",
    "badam": f"method.switch_every={PERIOD} method.switch_mode=random",
}
"""How often the methods that draw blocks do so here."""
HEAD = (
    "| method | planned GiB | allocated GiB | difference | taken GiB | tokens/s | time / LoRA r=16 | MFU | "
    "compiling s |"
)


def make_recipe(options: argparse.Namespace, keys: str) -> Recipe:
    """Make the recipe of an arm. Its data is never read."""
    checkpointing = {"none": "false", "all": "true", "frozen": "frozen"}[options.checkpointing]
    common = (
        f"model.name={options.shape} data.train=none data.max_length={options.length} run.precision=bf16 "
        f"run.batch_size={options.batch} run.steps=1000 run.device={options.device} "
        f"run.activation_checkpointing={checkpointing} run.compile={str(options.compile).lower()}"
    )
    shape: Any = shape_config(options.shape)
    asked = f"{common} {keys.replace('ALL', str(shape.num_hidden_layers))}"
    draws = DRAWS.get(recipe_without_file(asked.split()).method.name, "")
    return recipe_without_file(f"{asked} {draws}".split())


def allow_older_torch() -> None:
    """Let blocks compile under torch 2.11 and 2.12, whose `compile` takes no limit of its own."""
    compile_it: Any = torch.compile
    if "recompile_limit" in inspect.signature(compile_it).parameters:
        return
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

    def compile_without_limit(model: Any, *, recompile_limit: int, **options: Any) -> Any:
        return compile_it(model, **options)

    torch.compile = compile_without_limit  # type: ignore[assignment]


def make_plan(recipe: Recipe) -> MemoryPlan:
    """Plan a step, in a separate process."""
    allow_older_torch()
    torch.set_num_threads(1)
    return plan_memory(recipe, config=shape_config(recipe.model.name))


def load(recipe: Recipe, device: torch.device) -> Built:
    """Build the model with random weights on the device, ready to train."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape_config(recipe.model.name), dtype=weight_dtype(recipe))
    return build(recipe, model, CausalLMLoss(model), steps=1000, device=device)


def measure(recipe: Recipe, plan: MemoryPlan, steps: int) -> dict[str, Any]:
    """Time consecutive steps, then measure the memory of the costliest draw."""
    device = torch.device(recipe.run.device)
    built = load(recipe, device)
    batches = [make_batch(recipe, built.model, recipe.data.max_length)]
    lengths = [recipe.data.max_length] * recipe.run.batch_size
    compiling = build_graphs(recipe, built, device) if built.blocks and recipe.run.compile is True else None
    flops: list[int | None] = []

    def step() -> float:
        flops.append(needed_flops(built.model, built.layers, lengths))
        started = time.perf_counter()
        built.step.backward(batches)
        built.step.clip()
        built.step.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds = [step() for _ in range(WARM_UP + steps)][WARM_UP:]
    mean_seconds = spread_draws(seconds, recipe.method.name)
    needed = [each for each in flops[WARM_UP:] if each is not None]
    speed = utilization(sum(needed), steps * mean_seconds, device) if len(needed) == steps else {}
    if plan.active_blocks is not None:
        built.schedule.hold(plan.active_blocks)
    if device.type == "cuda":
        step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        allocated, taken = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        with memory.measure(built.model, built.step.optimizer) as tracker:
            step()
            tracker.end_step()
            step()
            allocated = taken = tracker.end_step().peak_bytes
    figures = {"seconds": seconds, "step_seconds": mean_seconds}
    figures |= {"allocated_bytes": allocated, "reserved_bytes": taken}
    return figures | speed | ({} if compiling is None else {"compile_seconds": compiling})


def spread_draws(seconds: list[float], method: str) -> float:
    """Return the mean time of a step if blocks were drawn as rarely as by default.

    Args:
        seconds: of each step, from the first of a period on. A draw belongs to the last step of its period.
        method: name of the method.
    """
    drawn = seconds[PERIOD - 1 :: PERIOD]
    if method not in DRAWS or not drawn:
        return mean(seconds)
    others = mean(each for at, each in enumerate(seconds) if at % PERIOD != PERIOD - 1)
    defaults: Any = METHODS[method]
    period = defaults.switch_every if method == "badam" else defaults.period
    return others + (mean(drawn) - others) / period


def row(name: str, figures: dict[str, Any], reference: float | None, tokens: int) -> str:
    """Format a row of the table."""
    planned = figures.get("planned_bytes")
    start = f"| {name} | {'' if planned is None else f'{planned / 2**30:.2f}'} | "
    if planned is None or "allocated_bytes" not in figures:
        return start + f"{figures['failed']} | | | | | | |"
    allocated, taken, seconds = (
        figures[key] for key in ("allocated_bytes", "reserved_bytes", "step_seconds")
    )
    ratio = "" if reference is None else f"{seconds / reference:.2f}"
    mfu = f"{figures['mfu']:.0%}" if "mfu" in figures else ""
    compiling = f"{figures['compile_seconds']:.0f}" if "compile_seconds" in figures else ""
    return start + (
        f"{allocated / 2**30:.2f} | {planned / allocated - 1:+.1%} | {taken / 2**30:.2f} | "
        f"{tokens / seconds:,.0f} | {ratio} | {mfu} | {compiling} |"
    )


def main() -> None:
    """Measure the arms, print the table, write OUTPUT.json after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--checkpointing", choices=("none", "all", "frozen"), default="none")
    parser.add_argument("--compile", action="store_true", help="compile the blocks before the first step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arms", help="names, separated by semicolons; default: all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--planners", type=int, default=4, help="processes that plan at the same time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    allow_older_torch()
    names = options.arms.split(";") if options.arms else list(ARMS)
    recipes = {name: make_recipe(options, ARMS[name]) for name in names}
    found: dict[str, dict[str, Any]] = {}
    failed = False
    print(HEAD, "|---|---|---|---|---|---|---|---|---|", sep="\n")
    with ProcessPoolExecutor(options.planners, get_context("spawn")) as pool:
        plans = {name: pool.submit(make_plan, recipe) for name, recipe in recipes.items()}
        for name, recipe in recipes.items():
            figures: dict[str, Any] = {}
            try:
                plan = plans[name].result()
                figures |= {"planned_bytes": plan.peak_bytes, "trainable": plan.trainable}
                figures |= measure(recipe, plan, options.steps)
            except torch.OutOfMemoryError:
                figures["failed"] = "out of memory"
            except Exception as error:  # the other arms are worth their time all the same
                traceback.print_exc()
                figures["failed"], failed = f"{type(error).__name__}: {first_line(error)}", True
            if options.compile:
                torch.compiler.reset()  # the graphs of one arm neither hold its model nor count for the next
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            found[name] = figures
            lora = found.get("LoRA r=16", {}).get("step_seconds")
            print(row(name, figures, lora, options.batch * options.length), flush=True)
            if options.output:
                settings = {key: str(value) for key, value in vars(options).items()}
                device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
                kept = {"settings": settings, "device": device, "torch": torch.__version__, "arms": found}
                target = options.output.with_name(options.output.name.removesuffix(".json") + ".json")
                replace_file(target, json.dumps(kept, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
