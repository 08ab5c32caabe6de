"""Plot how time and memory of a step grow with sequence length, number of blocks, and γ.

python benchmarks/scaling.py --output scaling --what memory                     # at any load
python benchmarks/scaling.py --output scaling --what time --threads 2 --budget 12    # on quiet cores
python benchmarks/scaling.py --output scaling --plot docs/scaling.svg

SmolLM2-135M's shape, one sequence, bf16 weights: full fine-tuning in HF Trainer, PEFT LoRA r = 128, and
lisatune's LISA. These are the arms `full`, `lora128` and `lisa` of `step.py`. Each point is a separate
process.

    length     256 … 4096 tokens, 30 blocks, γ = 2
    blocks     6 … 30 blocks, γ = 2, 1024 tokens
    active     γ = 1 … 30 of 30 blocks, 1024 tokens, LISA alone

Points run from the cheapest to the costliest, and none starts after the budget is used up. OUTPUT.json is
written after each point, and a second call continues from there. A point's time is the mean of two steps
after two warm-up steps, the median over --repeats. Its memory is the highest sum of live allocations above
weights, as in `step.py`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from step import spawn

ARMS = {"full": "full, HF Trainer", "lora128": "LoRA r = 128, PEFT", "lisa": "LISA, γ = 2"}
AXES = {"length": "tokens in the sequence", "blocks": "blocks N, γ = 2", "active": "active blocks γ of 30"}


class Point(NamedTuple):
    """One setting of one arm."""

    axis: str
    value: int
    arm: str

    def arguments(self, *, threads: int, precision: str) -> list[str]:
        """Make the options of `step.py`."""
        values = {"length": 1024, "blocks": 30, "active": 2} | {self.axis: self.value}
        options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*options, "--steps", "2", "--threads", str(threads), "--precision", precision]

    def cost(self) -> float:
        """Estimate a point's relative time."""
        values = {"length": 1024, "blocks": 30, "active": 2} | {self.axis: self.value}
        return values["length"] * values["blocks"] * (30 + values["active"])


def points(smoke: bool) -> list[Point]:
    """List every point of the plot, the cheapest first. In smoke mode, two small ones of each axis."""
    values = {
        "length": (256, 512, 1024, 2048, 4096),
        "blocks": (6, 12, 18, 24, 30),
        "active": (1, 2, 4, 8, 16, 30),
    }
    if smoke:
        values = {"length": (32, 64), "blocks": (2, 3), "active": (1, 3)}
    every = [
        Point(axis, value, arm)
        for axis in AXES
        for value in values[axis]
        for arm in (("lisa",) if axis == "active" else ARMS)
    ]
    return sorted(every, key=Point.cost)


def main() -> None:
    """Measure what is missing, then plot."""
    parser = argparse.ArgumentParser(description="Time and memory against length, blocks and γ.")
    parser.add_argument("--output", default="scaling", help="write the figures to OUTPUT.json")
    parser.add_argument("--what", choices=("time", "memory", "both", "nothing"), default="nothing")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--budget", type=float, help="minutes, after which no point starts")
    parser.add_argument("--smoke", action="store_true", help="a few small points, to see that it runs")
    parser.add_argument("--plot", type=Path, help="write an SVG of the figures in OUTPUT.json")
    args = parser.parse_args()
    path = Path(f"{args.output}{'-smoke' * args.smoke}.json")  # small points are none of the plot's
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    ends = time.monotonic() + 60 * args.budget if args.budget else float("inf")
    for point in points(args.smoke) * args.repeats:
        key = f"{point.axis}/{point.value}/{point.arm}"
        figures = found.setdefault(key, {"seconds": []})
        arguments = point.arguments(threads=args.threads, precision=args.precision)
        if (
            args.what in ("time", "both")
            and len(figures["seconds"]) < args.repeats
            and time.monotonic() < ends
        ):
            figures["seconds"].append(spawn(point.arm, arguments)["seconds"])
        if args.what in ("memory", "both") and "peak_bytes" not in figures and time.monotonic() < ends:
            figures["peak_bytes"] = spawn(point.arm, [*arguments, "--memory"])["peak_bytes"]
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if args.plot:
        plot(found, args.plot)


def series(found: dict[str, dict[str, Any]], axis: str, arm: str, figure: str) -> list[tuple[int, float]]:
    """Collect the figures of one arm along one axis, in rising order: seconds, or peak MiB."""
    pairs = []
    for key, figures in found.items():
        its_axis, value, its_arm = key.split("/")
        if (its_axis, its_arm) != (axis, arm) or not figures.get(figure):
            continue
        what = median(figures["seconds"]) if figure == "seconds" else figures["peak_bytes"] / 2**20
        pairs.append((int(value), what))
    return sorted(pairs)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Format seconds per step and peak MiB of every point as a Markdown table."""
    lines = ["| axis | value | arm | s/step | peak MiB above weights |", "|---|---|---|---|---|"]
    for axis in AXES:
        for arm in ARMS:
            seconds, peaks = (dict(series(found, axis, arm, name)) for name in ("seconds", "peak_bytes"))
            for value in sorted(seconds.keys() | peaks.keys()):
                cells = [f"{seconds[value]:.3f}" if value in seconds else ""]
                cells += [f"{peaks[value]:.0f}" if value in peaks else ""]
                lines.append(f"| {axis} | {value} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw time and memory along the three axes. A row without figures is left out."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lisatune", "font.size": 9}
    from matplotlib import pyplot

    names = {"seconds": "seconds per step", "peak_bytes": "peak MiB above weights"}
    rows = [name for name in names if any(series(found, axis, arm, name) for axis in AXES for arm in ARMS)]
    if not rows:
        raise SystemExit("nothing to plot yet: run with --what memory or --what time first")
    figure, panels = pyplot.subplots(len(rows), 3, figsize=(10, 3 * len(rows)), squeeze=False)
    for row, name in zip(panels, rows, strict=True):
        for panel, (axis, label) in zip(row, AXES.items(), strict=True):
            for color, (arm, title) in zip(("C0", "C1", "C2"), ARMS.items(), strict=True):
                pairs = series(found, axis, arm, name)
                if pairs:
                    panel.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=title, color=color)
            panel.set(xlabel=label, ylabel=names[name], ylim=(0, None))
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
