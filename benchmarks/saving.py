"""How long training stands still at a checkpoint, without and with `run.save_async`.

    python benchmarks/saving.py --folder /path/on/the/disk
    python benchmarks/saving.py --shape tiny

A checkpoint of full fine-tuning: a model of SmolLM2-135M's shape in float32, with both moments. Both ways
take turns, so that other work on the machine slows both. Without `run.save_async` training stands still
while the checkpoint is written; with it, while the values are copied to host memory.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import build_adamw, find_layers
from lisatune.runs.checkpoint import begin_checkpoint


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2", choices=SHAPES)
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape], tie_word_embeddings=True))
    optimizer = build_adamw(model, find_layers(model), lr=1e-5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    stood: dict[bool, list[float]] = {False: [], True: []}
    used: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.repeats):
            for is_async in stood:
                began, cpu = time.perf_counter(), time.process_time()
                writer = begin_checkpoint(folder, step=1, model=model, optimizer=optimizer, copies=is_async)
                if not is_async:
                    writer.write()
                    writer.finish()
                stood[is_async].append(time.perf_counter() - began)
                used[is_async].append(time.process_time() - cpu)
                if is_async:  # what a thread does in a run
                    writer.write()
                    writer.finish()
        size = sum(file.stat().st_size for file in Path(writer.target).iterdir())
    print(f"A checkpoint of {size / 2**20:,.0f} MiB.\n")
    print("| run.save_async | training stands still, seconds | fewest | CPU seconds of it, median |")
    print("| --- | --: | --: | --: |")
    for is_async, seconds in stood.items():
        cpu_seconds = statistics.median(used[is_async])
        row = f"{statistics.median(seconds):.2f} | {min(seconds):.2f} | {cpu_seconds:.2f}"
        print(f"| {str(is_async).lower()} | {row} |")


if __name__ == "__main__":
    main()
