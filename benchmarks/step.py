"""Compare a training step of LISA with full fine-tuning, LoRA and LISA by toggling: time and memory.

python benchmarks/step.py --precision fp32 --threads 2 --budget 15 --output step-fp32
python benchmarks/step.py --peaks only --output step-fp32      # the memory of the same arms, at any load

Every arm (see `arms.py`) does the same work in a separate process: forward, backward, clipping to norm 1 and
AdamW on random sequences. Arms are interleaved: a round runs each once, in random order. Figures are medians
over the rounds. A round's figure is the mean of its steps, after warm-up and compiling. LISA draws every 2
steps. Arms whose ends rest in some periods run full cycles of 10 steps.

With --budget, no arm starts that would not end in time. With --output, every figure is written to OUTPUT.json
as soon as it is known, and the same command continues from there until every arm has --repeats rounds.

Memory is measured in a separate run with torch's allocation log: the highest sum of live allocations in the
steps, above those that exist when model and optimizer are ready. It includes gradients, optimizer state and
activations. `toggle` keeps the state of every block it has drawn, so its peak grows with the number of steps.

The arm `gemm` measures the speed of the model's own matrix products. An arm's share of the bound is the time
that its products (`arms.py` has the formula) would take at that speed, divided by the time of its step.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from arms import ARMS, DTYPES, run_arm

CORE = "gemm,full,lora128,toggle,lisa,lisa-every5"
SETTINGS = ("model", "precision", "length", "batch", "blocks", "active", "steps", "threads")
"""Options that must be equal if figures of two calls are to stand in one table."""


class Results:
    """Figures of all rounds, kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = Path(f"{args.output}.json") if args.output else None
        self.settings = {key: getattr(args, key) for key in SETTINGS}
        self.times: dict[str, list[dict[str, Any]]] = {}
        self.peaks: dict[str, int] = {}
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text())
            if found["settings"] != self.settings:
                raise SystemExit(
                    f"{self.path} is of other settings, {found['settings']}; choose another --output"
                )
            self.times, self.peaks = found["times"], found["peak_bytes"]

    def save(self) -> None:
        if self.path is not None:
            figures = {"settings": self.settings, "times": self.times, "peak_bytes": self.peaks}
            self.path.write_text(json.dumps(figures, indent=1) + "\n")
            self.path.with_suffix(".md").write_text(report(self) + "\n")


def spawn(arm: str, arguments: list[str]) -> dict[str, Any]:
    """Run one arm in a separate process, and read its figures from the last line that it prints."""
    command = [sys.executable, __file__, *arguments, "--child", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"arm {arm} failed:\n{done.stderr[-3000:]}")
    if "--profile" in command and "| part |" in done.stderr:
        print(done.stderr[done.stderr.index("| part |") :], file=sys.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(arm, figures, file=sys.stderr, flush=True)
    return figures


def run_rounds(args: argparse.Namespace, arms: list[str], results: Results) -> None:
    """Run the missing rounds until the budget is spent. An arm of unknown length counts as the longest."""
    ends = time.monotonic() + 60 * args.budget if args.budget else float("inf")
    longest: dict[str, float] = {}

    def fits(arm: str) -> bool:
        return time.monotonic() + longest.get(arm, max(longest.values(), default=0)) < ends

    def timed(arm: str, *more: str) -> dict[str, Any]:
        started = time.monotonic()
        figures = spawn(arm, [*sys.argv[1:], *more])
        longest[arm] = max(longest.get(arm, 0), time.monotonic() - started)
        return figures

    rng = random.Random(0)
    for number in range(args.repeats if args.peaks != "only" else 0):
        for arm in rng.sample(arms, k=len(arms)):
            if len(results.times.get(arm, [])) <= number and fits(arm):
                results.times.setdefault(arm, []).append(timed(arm))
                results.save()
    for arm in arms:
        if args.peaks != "none" and arm not in results.peaks and arm != "gemm" and fits(arm):
            results.peaks[arm] = timed(arm, "--memory")["peak_bytes"]
            results.save()


def report(results: Results) -> str:
    """Format medians, ratios of every arm to ours, and shares of the bound as Markdown."""
    settings, times, peaks = results.settings, results.times, results.peaks
    tokens = settings["batch"] * settings["length"]
    seconds = {arm: median(each["seconds"] for each in times[arm]) for arm in times if arm != "gemm"}
    rate = median(each["flops_per_second"] for each in times["gemm"]) if "gemm" in times else None
    ours = seconds.get("lisa")
    head = "| arm | rounds | s/step | spread | tokens/s | ÷ lisa | products' share "
    head += "| peak MiB above weights | ÷ lora128, likewise | compile s |"
    lines = [", ".join(f"{key} {value}" for key, value in settings.items()), "", head, "|" + "---|" * 10]
    for arm in [arm for arm in ARMS if arm in seconds or arm in peaks]:
        cells = [arm, *[""] * 9]
        if arm in seconds:
            mine, each = [one["seconds"] for one in times[arm]], seconds[arm]
            cells[1:5] = (
                str(len(mine)),
                f"{each:.3f}",
                f"{min(mine):.2f}–{max(mine):.2f}",
                f"{tokens / each:.0f}",
            )
            cells[5] = f"{each / ours:.2f}" if ours else ""
            cells[6] = f"{times[arm][0]['flops'] / rate / each:.0%}" if rate else ""
            # The longest of the rounds, because later ones find the compiler's cache on disk.
            compiling = max(one.get("compile_seconds", 0) for one in times[arm])
            cells[9] = f"{compiling:.0f}" if compiling else ""
        if arm in peaks:
            cells[7] = f"{peaks[arm] / 2**20:.0f}"
            other = peaks.get("lora128+checkpointing" if "+checkpointing" in arm else "lora128")
            cells[8] = f"{peaks[arm] / other:.2f}" if other else ""
        lines.append(f"| {' | '.join(cells)} |")
    if rate:
        lines += ["", f"Products run at {rate / 1e9:.0f} GFLOP/s (median of {len(times['gemm'])} rounds)."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare time and memory of a training step.")
    parser.add_argument("--arms", default=CORE, help=f"names separated by commas, or all: {', '.join(ARMS)}")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, or a shipped shape")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="blocks of a model with random weights of that shape")
    parser.add_argument("--active", type=int, default=2, help="blocks that LISA trains at once")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round, an even number")
    parser.add_argument("--repeats", type=int, default=3, help="rounds at most")
    parser.add_argument("--budget", type=float, help="minutes, after which no arm starts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="1 round of 2 steps of 64 tokens, to see that it runs"
    )
    parser.add_argument("--peaks", choices=("with", "only", "none"), default="with", help="memory runs")
    parser.add_argument("--profile", action="store_true", help="print where the time of LISA's arms goes")
    parser.add_argument("--output", help="write OUTPUT.json and OUTPUT.md, and continue from OUTPUT.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.length, args.steps, args.repeats = 64, 2, 1
    if args.child:
        print("\n" + json.dumps(run_arm(args, args.child)))
        return
    arms = list(ARMS) if args.arms == "all" else args.arms.split(",")
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise SystemExit(f"unknown arms {sorted(unknown)}; known: {', '.join(ARMS)}")
    results = Results(args)
    run_rounds(args, arms, results)
    print(report(results))


if __name__ == "__main__":
    main()
