"""The arms that `step.py` measures: full fine-tuning, LoRA, LISA by toggling, and lisatune's LISA.

    gemm                    no training step: the speed of the model's own matrix products
    full, lora128, lora16   HF Trainer (and PEFT, on the linear layers of a block), as their users run them
    toggle                  LISA by toggling requires_grad only: plain loss, state kept, verify off
    lisa                    ours, γ = --active, 2: loss without full logits, compiled blocks,
                            attention for CPUs
    lisa-plain              ours without compiling
    lisa-every5, lisa-8bit, lisa-factored, lisa-head, lisa-frozen
                            ours, with that policy of the ends (`method.ends`)
    lisa-int8, lisa-nf4     ours, with codes for frozen blocks (`method.frozen_weights`)
    lisa-sdpa               ours with torch's attention instead of `model.attention: lisatune_cpu`
    …+tricks                a peer with our loss, attention and compiled blocks
    …+checkpointing         recomputed activations: transformers' way in peers, `frozen` in ours

In bf16 all weights are bf16. Peers round as they always do, ours updates exactly (`run.precision: bf16`).

The FLOPs of a step are those of its matrix products, with T tokens per step and attention of width A:
- forward: 2 T per weight, the head included;
- backward: 2 T per weight for the gradient of its input, in every block that a gradient passes, and 2 T per
  weight that trains; the head likewise;
- causal attention's two products: 2 T² A per block forward, and twice that backward;
- forward once more in blocks that recompute their activations.
"""

import argparse
import gc
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import peak_of_allocations, where_time_goes
from torch import Tensor, nn
from torch.profiler import record_function

from lisatune import LISA, find_layers, use_chunked_loss
from lisatune.lisa.groups import build_adamw
from lisatune.methods import Lora
from lisatune.methods.optimizers import build_optimizer
from lisatune.nn.attention import use_cpu_attention
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.nn.layers import LayerMap
from lisatune.recipe import OptimizerConfig

__all__ = ["ARMS", "CYCLE", "DTYPES", "WARM_UP", "load", "run_arm", "steps_of"]

WARM_UP = 2
CYCLE = 10
"""Steps until ends that train in every fifth period of 2 steps have trained once."""

PEERS = ("full", "lora128", "lora16")
ENDS = {"every5": "every:5", "8bit": "8bit", "factored": "factored", "head": "head", "frozen": "frozen"}
CODES: tuple[Any, ...] = ("int8", "nf4")
ARMS = (
    *("gemm", *PEERS, "toggle", "lisa", "lisa-plain", "lisa-sdpa", *(f"lisa-{ends}" for ends in ENDS)),
    *(f"lisa-{codes}" for codes in CODES),
    *("full+tricks", "lora128+tricks", "full+checkpointing", "lora128+checkpointing"),
    *("lisa+checkpointing", "lisa-every5+checkpointing", "lisa-8bit+checkpointing"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run_arm(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Run one arm in this process, and return its figures.

    Args:
        args: of `step.py`: model, precision, length, batch, steps, threads, memory, profile.
        arm: one of ARMS.
    """
    torch.set_num_threads(1 if args.memory else args.threads)
    if arm == "gemm":
        return run_gemm(args)
    return run_peer(args, arm) if arm.startswith(PEERS) else run_lisa(args, arm)


def steps_of(arm: str, steps: int) -> int:
    """Return how many steps to measure an arm over: full cycles if its ends rest in some periods."""
    return -(-steps // CYCLE) * CYCLE if "every5" in arm else steps


class Meter:
    """A clock that is read after every step, or a log of the allocations of all steps."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, extra: str) -> None:
        self.args, self.model, self.extra = args, model, extra
        self.marks: list[float] = []
        self.flops: list[int] = []
        self.log: Any = torch.profiler.profile(profile_memory=True) if args.memory else nullcontext()

    def step_done(self) -> None:
        self.marks.append(time.perf_counter())

    def count(self) -> None:
        """Add up the products of the next step."""
        self.flops.append(step_flops(self.model, self.args, self.extra))

    def figures(self) -> dict[str, Any]:
        if self.args.memory:
            return {"peak_bytes": peak_of_allocations(self.log)}
        seconds = [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)][WARM_UP - 1 :]
        return {
            "seconds": mean(seconds),
            "steps": [round(each, 4) for each in seconds],
            "flops": mean(self.flops[WARM_UP:] or self.flops),
        }


def load(args: argparse.Namespace) -> Any:
    """Load the model in its precision. Shapes other than SmolLM2's get random weights."""
    from lisatune.models.load import load_model

    torch.manual_seed(0)
    dtype = DTYPES[args.precision]
    if args.blocks is None and (args.model == "smollm2-135m" or Path(args.model).exists()):
        return load_model(args.model, dtype=dtype).train()
    from transformers import AutoModelForCausalLM

    from lisatune.models.shapes import shape_config

    config: Any = shape_config(args.model)
    if args.blocks is not None:
        config.num_hidden_layers = args.blocks
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def sequences(model: Any, args: argparse.Namespace, steps: int) -> list[Tensor]:
    """Make random tokens, [B, T], for each step."""
    rng = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (args.batch, args.length)
    return [torch.randint(0, vocabulary, shape, generator=rng) for _ in range(WARM_UP + steps)]


def run_peer(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Run full fine-tuning or LoRA in HF Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    name, _, extra = arm.partition("+")
    model = load(args)
    batches = sequences(model, args, steps_of(arm, 2 if args.memory else args.steps))
    if extra == "tricks":
        use_chunked_loss(model)
        use_cpu_attention(model)
        BlockForward(model, find_layers(model), backend="inductor", dynamic=False)
    if name != "full":
        model = Lora(rank=int(name.removeprefix("lora"))).prepare(model)
    meter = Meter(args, model, extra)
    meter.count()

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step_done()

    trainer = Trainer(
        model,
        TrainingArguments(
            "unused",
            per_device_train_batch_size=args.batch,
            max_steps=len(batches),
            learning_rate=1e-5,
            activation_checkpointing=extra == "checkpointing",
            use_cpu=True,  # as the other arms, also where there is an accelerator
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for batch in batches for ids in batch],
        callbacks=[Marks()],
    )
    with meter.log:
        trainer.train()
    return meter.figures()


def run_lisa(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Run LISA in a plain loop: ours, or by toggling only."""
    name, _, extra = arm.partition("+")
    model = load(args)
    batches = sequences(model, args, steps_of(arm, 2 if args.memory else args.steps))
    layers, facts, ours = find_layers(model), {}, name != "toggle"
    ends = ENDS.get(name.removeprefix("lisa-"), "train")
    codes: Any = next((each for each in CODES if name == f"lisa-{each}"), "exact")
    blocks = None
    if ours:
        use_chunked_loss(model)
    if ours and "sdpa" not in name:
        use_cpu_attention(model)
    if ours and name != "lisa-plain":
        kind: Any = "frozen" if extra else None
        blocks = BlockForward(model, layers, checkpointing=kind, backend="inductor", dynamic=False)
    meter = Meter(args, model, extra and "frozen")
    gc.collect()
    if ours:
        optimizer = build_optimizer(model, layers, OptimizerConfig(lr=1e-5), ends=ends)
        lisa = LISA(model, optimizer, active=args.active, period=2, ends=ends, frozen_weights=codes)
    else:
        optimizer = build_adamw(model, layers, lr=1e-5)
        lisa = LISA(model, optimizer, active=args.active, period=2, state="keep", verify="off")

    def forward(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def trainable() -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def step(ids: Tensor) -> None:
        with record_function("phase: forward"):
            loss = forward(ids)
        with record_function("phase: backward"):
            loss.backward()
        with record_function("phase: clipping"):
            nn.utils.clip_grad_norm_(trainable(), 1.0)
        with record_function("phase: optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    if blocks is not None:
        facts["compile_seconds"] = blocks.warm_up(
            lambda: torch.autograd.grad(forward(batches[0]), trainable(), allow_unused=True),
            embedding=list(layers.end_parameters(model).values()),
            rests=lisa.ends_rest,
        )
        facts["graphs"] = num_graphs()
    with meter.log:
        for ids in batches:
            meter.count()
            step(ids)
            meter.step_done()
    if blocks is not None:
        assert num_graphs() == facts["graphs"], "a draw compiled anew"
    if args.profile:
        with torch.profiler.profile() as log:
            for ids in batches[:2]:
                step(ids)
        print(where_time_goes(log), file=sys.stderr)
    return facts | meter.figures()


def step_flops(model: Any, args: argparse.Namespace, extra: str) -> int:
    """Count the FLOPs of a step's products, for the weights that train now; see the module's docstring.

    Args:
        model: prepared, adapters included.
        args: batch and length.
        extra: checkpointing recomputes every block, frozen only the frozen ones.
    """
    layers: LayerMap = find_layers(model)
    config = model.config
    tokens, n = args.batch * args.length, layers.num_blocks
    heads = config.num_attention_heads
    attention = (
        2 * tokens * args.length * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    )
    flops, passes = 0, model.get_input_embeddings().weight.requires_grad
    for index in range(n):
        block = model.get_submodule(layers.blocks[index])
        weights = [p for p in block.parameters() if p.ndim == 2]
        every, trained = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
        forward = 2 * tokens * every + attention
        passes = passes or trained > 0
        again = passes and (extra == "checkpointing" or (extra == "frozen" and not trained))
        flops += forward * (1 + again) + 2 * tokens * trained
        flops += (2 * tokens * every + 2 * attention) * passes
    head = model.get_output_embeddings().weight
    return flops + 2 * tokens * head.numel() * (2 + head.requires_grad)


def run_gemm(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the FLOP/s of the model's own products: each weight of one block, and the head, once."""
    model = load(args)
    layers = find_layers(model)
    block = layers.block_parameters(model)[0].values()
    weights = [p.detach() for p in block if p.ndim == 2] + [model.get_output_embeddings().weight.detach()]
    tokens = args.batch * args.length
    flops = seconds = 0.0
    for weight in weights:
        x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype)
        out = torch.empty(tokens, weight.shape[0], dtype=weight.dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(x, weight.T, out=out)
            times.append(time.perf_counter() - started)
        share = 1 if weight is weights[-1] else layers.num_blocks
        seconds += share * median(times)
        flops += share * 2 * tokens * weight.numel()
    return {"flops_per_second": flops / seconds}
