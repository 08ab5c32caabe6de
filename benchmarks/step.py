"""A training step of LISA against full fine-tuning, LoRA and LISA by toggling: time and memory.

python benchmarks/step.py --precision fp32 --repeats 3 --steps 10 --output step-fp32

Every arm does the same work (forward, backward, clipping to norm 1, AdamW) on random sequences, in a
process of its own. Arms are interleaved: a round runs each once, in random order. Figures are medians over
the rounds. A round's figure is the mean of its steps, after warm-up and compiling, so that a cycle of cheap
ends counts in full: give --steps a multiple of 10. LISA draws every 2 steps. Longer than 300 lines: arms
are read side by side.

    full, lora128, lora16   HF Trainer (and PEFT, on the 7 matrices of a block), as their users run them
    toggle                  LISA as toggling only: plain loss, state kept, verify off
    lisa                    ours, γ = 2: loss without full logits, compiled blocks
    lisa-plain              ours without compiling
    lisa-every5             ours, and the ends train in every fifth period
    …+tricks                the peer with our loss and compiled blocks
    …+checkpointing         activations recomputed: transformers' own in peers, `frozen` in ours

In bf16 all weights are bf16; peers round as they do, ours updates exactly (`run.precision: bf16`).

Memory is a run of its own with torch's allocation log: the highest sum of live allocations in the steps,
above what lives when model and optimizer are ready. It includes gradients, optimizer state and activations.

The arm `gemm` measures the rate of the model's own matrix products. With T tokens, P the blocks' parameters,
P_active those that train (γ / N of P), V × H the head and A the width of attention, a step of LISA needs

    T (4 P + 2 P_active)  +  6 T V H  +  6 N T² A     FLOPs

(forward and gradients of inputs; gradients of active weights; head with both gradients; causal attention's
two products forward and twice that backward). Our share is the time this takes at that rate over the step.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import peak_of_allocations
from torch import nn

from lisatune import LISA, find_layers, use_chunked_loss
from lisatune.blocks import BlockForward, num_graphs
from lisatune.optim import build_adamw, build_optimizer
from lisatune.recipe import OptimizerConfig

WARM_UP = 2
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEERS = ("full", "lora128", "lora16")
ARMS = (
    *("gemm", *PEERS, "toggle", "lisa", "lisa-plain", "lisa-every5"),
    *("full+tricks", "lora128+tricks", "full+checkpointing", "lora128+checkpointing", "lisa+checkpointing"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Meter:
    """Reads the clock after every step, or logs the allocations of all steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.marks = args, []
        self.log = torch.profiler.profile(profile_memory=True) if args.memory else nullcontext()

    def step_done(self) -> None:
        self.marks.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        if self.args.memory:
            return {"peak_bytes": peak_of_allocations(self.log)}
        seconds = [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)][WARM_UP - 1 :]
        return {"seconds": mean(seconds), "steps": [round(each, 4) for each in seconds]}


def load(args: argparse.Namespace) -> nn.Module:
    """The model in its precision; a name of `lisatune.shapes` other than SmolLM2 gets random weights."""
    from lisatune import models

    torch.manual_seed(0)
    dtype = DTYPES[args.precision]
    if args.model == "smollm2-135m" or Path(args.model).exists():
        return models.load_model(args.model, dtype=dtype).train()
    from transformers import AutoModelForCausalLM

    from lisatune.shapes import shape_config

    return AutoModelForCausalLM.from_config(shape_config(args.model), dtype=dtype).train()


def sequences(model: nn.Module, args: argparse.Namespace) -> list[torch.Tensor]:
    """One sequence of random tokens, [1, T], for each step."""
    rng = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (args.batch, args.length)
    return [torch.randint(0, vocabulary, shape, generator=rng) for _ in range(WARM_UP + args.steps)]


def run_peer(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Full fine-tuning or LoRA in HF Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    name, _, extra = arm.partition("+")
    model, facts = load(args), {}
    batches = sequences(model, args)
    layers = find_layers(model)
    if extra == "tricks":
        use_chunked_loss(model)
        BlockForward(model, layers, backend="inductor", dynamic=False)
    if name != "full":
        from peft import LoraConfig, get_peft_model

        rank = int(name.removeprefix("lora"))
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MATRICES))
    meter = Meter(args)

    class Marks(TrainerCallback):
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
            use_cpu=not torch.accelerator.is_available(),
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
    return facts | meter.figures()


def run_lisa(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """LISA with γ = 2 in a plain loop: ours, or by toggling only."""
    model = load(args)
    batches = sequences(model, args)
    layers, facts, ours = find_layers(model), {}, arm != "toggle"
    ends = "every:5" if "every5" in arm else "train"
    blocks = None
    if ours:
        use_chunked_loss(model)
    if ours and arm != "lisa-plain":
        kind = "frozen" if "checkpointing" in arm else None
        blocks = BlockForward(model, layers, checkpointing=kind, backend="inductor", dynamic=False)
    meter = Meter(args)
    gc.collect()
    if ours:
        config = OptimizerConfig(lr=1e-5)
        optimizer = build_optimizer(model, layers, config, ends=ends)
        lisa = LISA(model, optimizer, active=2, period=2, ends=ends)
    else:
        optimizer = build_adamw(model, layers, lr=1e-5)
        lisa = LISA(model, optimizer, active=2, period=2, state="keep", verify="off")

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def trainable() -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    if blocks is not None:
        own = list(layers.end_parameters(model).values())
        facts["compile_seconds"] = blocks.warm_up(
            lambda: torch.autograd.grad(forward(batches[0]), trainable(), allow_unused=True),
            embedding=own,
            rests=lisa.ends_rest,
        )
        facts["graphs"] = num_graphs()
    with meter.log:
        for ids in batches:
            forward(ids).backward()
            nn.utils.clip_grad_norm_(trainable(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            meter.step_done()
    if blocks is not None:
        assert num_graphs() == facts["graphs"], "a draw compiled anew"
    if args.profile:
        with torch.profiler.profile() as log:
            forward(batches[0]).backward()
            optimizer.step()
        print(log.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    return facts | meter.figures() | {"flops": lisa_flops(model, args)}


def lisa_flops(model: nn.Module, args: argparse.Namespace) -> int:
    """FLOPs of a step with γ = 2 and trained ends; the formula is in the module's docstring."""
    config, layers = model.config, find_layers(model)
    tokens, n = args.batch * args.length, layers.num_blocks
    weights = sum(p.numel() for block in layers.block_parameters(model) for p in block.values())
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    head = model.get_output_embeddings().weight.numel()
    blocks = tokens * (4 * weights + 2 * weights * 2 // n)
    return blocks + 6 * tokens * head + 6 * n * tokens * args.length * width


def run_gemm(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """FLOP/s of the model's own products: each weight of one block, and the head, once."""
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


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process."""
    torch.set_num_threads(args.threads)
    run: Callable[..., dict[str, Any]] = run_lisa
    if args.child == "gemm":
        run = run_gemm
    elif args.child.startswith(PEERS):
        run = run_peer
    return run(args, args.child)


def spawn(arm: str, *more: str) -> dict[str, Any]:
    """Run one arm in a process of its own and read its figures, the last line it prints."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", arm, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"arm {arm} failed:\n{done.stderr[-3000:]}")
    if "--profile" in command:
        print(done.stderr[-8000:], file=sys.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(arm, figures, file=sys.stderr)
    return figures


def report(
    arms: list[str], times: dict[str, list[dict[str, Any]]], peaks: dict[str, int], tokens: int
) -> str:
    """Markdown: medians, ratios of every arm to ours, and the share of the bound."""
    seconds = {arm: median(each["seconds"] for each in times[arm]) for arm in arms if arm != "gemm"}
    ours = seconds.get("lisa")
    lines = ["| arm | s/step | tokens/s | ÷ lisa | peak MiB above weights | compile s |", "|" + "---|" * 6]
    for arm, each in seconds.items():
        ratio = f"{each / ours:.2f}" if ours else ""
        peak = f"{peaks[arm] / 2**20:.0f}" if arm in peaks else ""
        # The longest of the rounds: later ones find the compiler's cache on disk.
        compiling = max(each.get("compile_seconds", 0) for each in times[arm])
        compiled = f"{compiling:.0f}" if compiling else ""
        lines.append(f"| {arm} | {each:.3f} | {tokens / each:.0f} | {ratio} | {peak} | {compiled} |")
    if "gemm" in times and ours:
        rate = median(each["flops_per_second"] for each in times["gemm"])
        bound = times["lisa"][0]["flops"] / rate
        lines += ["", f"Products run at {rate / 1e9:.0f} GFLOP/s; a step needs {bound:.3f} s of them, "]
        lines[-1] += f"{bound / ours:.0%} of lisa's."
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step, against other ways.")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, joined by commas")
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a shipped shape")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="1 round of 2 steps of 64 tokens: does it run?")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the runs that measure memory")
    parser.add_argument("--profile", action="store_true", help="print where the time of LISA's arms goes")
    parser.add_argument("--output", help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.length, args.steps, args.repeats = 64, 2, 1
    if args.child:
        print("\n" + json.dumps(run_arm(args)))
        return
    arms = args.arms.split(",")
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise SystemExit(f"unknown arms {sorted(unknown)}; known: {', '.join(ARMS)}")
    times: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    rng = random.Random(0)
    for _ in range(args.repeats):
        for arm in rng.sample(arms, k=len(arms)):
            times[arm].append(spawn(arm))
    peaks = {}
    if not args.no_peaks:
        peaks = {arm: spawn(arm, "--memory")["peak_bytes"] for arm in arms if arm != "gemm"}
    text = report(arms, times, peaks, args.batch * args.length)
    print(text)
    if args.output:
        figures = {"settings": vars(args), "times": times, "peak_bytes": peaks}
        Path(f"{args.output}.json").write_text(json.dumps(figures, indent=1))
        Path(f"{args.output}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
