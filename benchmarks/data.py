"""Measure what preparing data costs, ours and TRL's: CPU seconds, peak memory, ratio.

python benchmarks/data.py --alpaca ROWS.jsonl.gz --rows 10000 50000 200000 --text DOCS.jsonl.gz --tokens 20e6

ROWS.jsonl.gz holds records of alpaca, DOCS.jsonl.gz records of text; `--rows` and `--tokens` say how many
there are of each, by repeating them with a number in front. Both sides read the same file, with the tokenizer
of SmolLM2, pack into rows of 512 tokens (text: 1024), and lose no text (TRL: `bfd_split`). Every
measurement is a process with an empty cache; rounds alternate the two. CPU seconds are those of all threads
and children, from reading the file to packed rows. Memory is the highest resident set less the one before,
with packages, tokenizer and for TRL a tiny model loaded; of the process alone, without children.

`--cached` adds a second preparation with the cache of the first, `--before SRC` the code in another src
folder. `--zeros TOKENS` measures what comes after tokenising, dividing, packing and the order of two epochs,
on a file of zeros that takes no space on the disk and stands for texts of 2,500 tokens each.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"


def main() -> None:
    """Make the files, measure and print a table."""
    if sys.argv[1:2] == ["one"]:
        measure_one(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description="Measure what preparing data costs.")
    parser.add_argument("--alpaca", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=float, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--before", type=Path, help="src folder of other code to measure beside")
    parser.add_argument("--zeros", type=float, help="tokens of the file of zeros")
    parser.add_argument("--smoke", action="store_true", help="few made-up rows, to see that it runs")
    args = parser.parse_args()
    sides = ["ours", "trl"] + ["before"] * (args.before is not None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.zeros is not None:
            measure_zeros(round(args.zeros), folder)
        if args.smoke:
            args.alpaca, args.rows, args.rounds = folder / "rows.jsonl", [40], 1
            row = {"instruction": "Count to three.", "input": "", "output": "1 2 3"}
            args.alpaca.write_text(json.dumps(row) + "\n", encoding="utf-8")
        files = [(f"{rows:,} rows", 512, write_chats(args.alpaca, rows, folder)) for rows in args.rows]
        files += [
            (f"{tokens / 1e6:g} M tokens of text", 1024, write_texts(args.text, tokens, folder))
            for tokens in args.tokens
        ]
        print("| data | side | CPU s | wall s | MiB above start | tokens | CPU s to TRL's |")
        print("|---|---|---|---|---|---|---|")
        for what, length, file in files:
            for number in range(args.rounds):
                found = {}
                for side in sides:
                    with tempfile.TemporaryDirectory() as cache:
                        found[side] = measure(side, file, length, Path(cache), args.before)
                        if side == "ours" and args.cached:
                            found["ours, cached"] = measure(side, file, length, Path(cache), None)
                for side, each in found.items():
                    ratio = each["cpu"] / found["trl"]["cpu"]
                    print(
                        f"| {what}, round {number + 1} | {side} | {each['cpu']:.1f} | {each['wall']:.1f} | "
                        f"{each['mib']:.0f} | {each['tokens']:,} | {ratio:.2f} |",
                        flush=True,
                    )
            file.unlink()


def write_chats(source: Path, rows: int, folder: Path) -> Path:
    """Write records of one question and one answer each."""
    records = read(source)
    file = folder / f"{rows}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            record = records[number % len(records)]
            question = f"{number}. {record['instruction']}\n\n{record['input']}".strip()
            chat = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": record["output"]}],
            }
            out.write(json.dumps(chat) + "\n")
    return file


def write_texts(source: Path, tokens: float, folder: Path) -> Path:
    """Write documents of about so many tokens, at 2.9 characters each."""
    records = read(source)
    file, done, number = folder / f"{tokens:.0f}.jsonl", 0, 0
    with file.open("w", encoding="utf-8") as out:
        while done < 2.9 * tokens:
            text = f"{number}. {records[number % len(records)]['text']}"
            out.write(json.dumps({"text": text}) + "\n")
            done, number = done + len(text), number + 1
    return file


def read(source: Path) -> list[dict[str, str]]:
    """Read JSON lines."""
    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def measure(side: str, file: Path, length: int, cache: Path, before: Path | None) -> dict[str, Any]:
    """Prepare a file in a process of its own."""
    places = {"LISATUNE_TOKENS": cache / "ours", "HF_DATASETS_CACHE": cache / "hf", "HF_HUB_OFFLINE": 1}
    env = os.environ | {name: str(value) for name, value in places.items()}
    if side == "before":
        env["PYTHONPATH"] = str(before)
    command = [sys.executable, __file__, "one", side, str(file), str(length), str(cache)]
    run = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def measure_one(side: str, file: Path, length: int, folder: Path) -> None:
    """Prepare a file and print the figures as JSON."""
    warnings.simplefilter("ignore")
    from lisatune.models.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    start: Any
    if side == "trl":
        from trl import SFTConfig, SFTTrainer

        is_text = length == 1024
        config = SFTConfig(
            output_dir=str(folder / "out"),
            packing=True,
            packing_strategy="bfd_split" if is_text else "bfd",
            max_length=length,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        model = tiny_model(len(tokenizer))

        def start() -> int:
            from datasets import load_dataset

            rows = load_dataset("json", data_files=str(file), split="train")
            trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
            return sum(map(sum, trainer.train_dataset["seq_lengths"]))
    else:
        import trl.chat_template_utils  # noqa: F401 - its import takes two seconds

        from lisatune.data.prepare import prepare_data
        from lisatune.methods import Full
        from lisatune.recipe import DataConfig, ModelConfig, Recipe

        data = DataConfig(
            train=str(file),
            max_length=length,
            packing=True,
            validation_share=0,
            long="auto",
            date="2026-01-02",
        )
        recipe = Recipe(model=ModelConfig(name=MODEL), data=data, method=Full())

        def start() -> int:
            return prepare_data(recipe, tokenizer).train.num_tokens

    from lisatune.memory.process import peak_resident_bytes, resident_bytes

    memory, cpu, wall = resident_bytes(), cpu_seconds(), time.perf_counter()
    tokens = start()
    figures = {
        "cpu": cpu_seconds() - cpu,
        "wall": time.perf_counter() - wall,
        "mib": max(0, peak_resident_bytes() - memory) / 2**20,
        "tokens": tokens,
    }
    print(json.dumps(figures))


def measure_zeros(num_tokens: int, folder: Path) -> None:
    """Divide, pack and order so many tokens, and print the figures."""
    import numpy as np

    from lisatune.data.batches import Order
    from lisatune.data.examples import divide, pack
    from lisatune.data.rows import Documents, TokenFile
    from lisatune.memory.process import peak_resident_bytes, resident_bytes

    file = folder / "zeros.bin"
    file.touch()
    os.truncate(file, 2 * num_tokens)
    memory, cpu = resident_bytes(), cpu_seconds()
    offsets = np.append(np.arange(0, num_tokens, 2500), num_tokens)
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    digests = np.arange(len(spans)).astype("S16")
    documents = Documents(TokenFile(file, "uint16"), offsets, spans, digests)
    every = np.arange(len(documents))
    rows = pack(divide(documents, every, max_length=1024, long="split", source="zeros"), 1024).rows
    order = Order(len(rows), 16, seed=0)
    for epoch in range(2):
        _ = [rows[index] for index in order.batch(epoch * order.batches_per_epoch)]
    mib = max(0, peak_resident_bytes() - memory) / 2**20
    print(f"{num_tokens:,} tokens, {len(rows):,} rows: {mib:.0f} MiB, {cpu_seconds() - cpu:.1f} CPU seconds")


def tiny_model(vocabulary: int) -> Any:
    """Build a model that costs nothing; TRL's trainer wants one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))


def cpu_seconds() -> float:
    """CPU time of this process with all threads, and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
