"""Train the predictor of `method.name: smartfrz` from our own runs, and say how good it is.

python experiments/smartfrz_predictor.py            # three minutes of one core; writes the weights
python experiments/smartfrz_predictor.py --real     # also follows a run of SmolLM2-135M, which is held out
python experiments/smartfrz_predictor.py --smoke    # three tiny runs of a few steps; writes no predictor

Each run trains all blocks, without the embedding, as `smartfrz` does before anything freezes, and is divided
into 20 intervals. After each one the records of `lisatune.lisa.weight_history` are taken, and the hidden
states H_t of fixed text after each block. When the run is over, with CKA the linear centered kernel alignment
(Kornblith et al., arXiv 1905.00414),

    left_t = (1 - CKA(H_t, H_T)) / (1 - CKA(H_0, H_T))

is the share of the block's change that was still to come; the block had converged at t if it was below 0.1
from there to the end. (The paper takes its labels from CKA to a trained model too; its threshold is not known
to us.) An example is the records up to t = 2 … 19 and that answer.

Runs: tiny Llamas on bytes, pretrained on Python's sources, then trained on its documentation, with 4 or 6
blocks, three learning rates, three schedules, 40 or 100 steps. One third of them is held out: no example of
theirs is trained on. At last a Llama of 8 blocks is trained by `full`, `autofreeze` and `smartfrz`.
"""

import argparse
import copy
import itertools
import math
import random
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune import LISA, find_layers
from lisatune.lisa.samplers import Sampler
from lisatune.lisa.smartfrz import FEWEST_RECORDS, Predictor, describe_history
from lisatune.lisa.statistics import BlockStatistics
from lisatune.methods import METHODS
from lisatune.methods.smartfrz import WEIGHTS
from lisatune.models.load import load_model, load_tokenizer

INTERVALS = 20
LEFT = 0.1
"""A block has converged when less than this share of its change is left."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


@dataclass
class Followed:
    """What was seen of a run."""

    name: str
    held_out: bool
    history: Tensor
    """Sampled weights of each block at the start and after each interval: float32 [N, T + 1, S]."""
    left: Tensor
    """Share of each block's change that was to come: [N, T + 1]."""


class Recorder(Sampler):
    """Draws all blocks and keeps what it reads."""

    reads = ("weight_history",)
    records = INTERVALS + 1

    def __init__(self, num_blocks: int, after: Callable[[], None]) -> None:
        self.num_blocks, self._after = num_blocks, after
        self.history = torch.empty(0)

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics | None = None) -> tuple[int, ...]:
        """Return all blocks."""
        assert statistics is not None and statistics.weight_history is not None  # noqa: PT018
        self.history = statistics.weight_history
        self._after()
        return tuple(range(self.num_blocks))

    def inclusion(self) -> tuple[float, ...]:
        """Return 1 for every block."""
        return (1.0,) * self.num_blocks

    def __repr__(self) -> str:
        return "Recorder"


def follow(
    name: str, model: Any, text: Tensor, *, lr: float, schedule: str, steps: int, batch: int, length: int,
    seed: int, held_out: bool,
) -> Followed:  # fmt: skip
    """Train a model and follow its blocks."""
    started = time.perf_counter()
    probe = text[-4 * length :].view(-1, length)
    hidden: list[list[Tensor]] = []

    def look() -> None:
        with torch.no_grad():
            states = model.model(input_ids=probe, output_hidden_states=True).hidden_states
        hidden.append([h.flatten(0, 1).clone() for h in states[1:]])

    per_interval = steps // INTERVALS
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    recorder = Recorder(model.config.num_hidden_layers, look)
    rng = torch.Generator().manual_seed(seed)
    losses = []
    with LISA(model, optimizer, period=per_interval, sampler=recorder, ends="head", lr_scaling="none"):
        for step in range(per_interval * INTERVALS):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / (0.05 * steps)) * SCHEDULES[schedule](step / steps)
            starts = torch.randint(0, len(text) - 256 - length, (batch,), generator=rng)
            ids = torch.stack([text[i : i + length] for i in starts])
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    left = torch.tensor(
        [[1 - cka(h, last) for h, last in zip(now, hidden[-1], strict=True)] for now in hidden]
    )
    first, final = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"{name}: loss {first:.3f} to {final:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return Followed(name, held_out, recorder.history, (left / left[:1]).T)


def cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two sets of representations [samples, width]."""
    a, b = ((h - h.mean(dim=0)).double() for h in (a, b))
    a, b = a @ a.T, b @ b.T
    return float((a * b).sum() / (a.norm() * b.norm()))


def make_tiny(blocks: int, code: Tensor, *, steps: int) -> Any:
    """Pretrain a Llama on bytes."""
    torch.manual_seed(blocks)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=blocks,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ids = torch.stack([code[i : i + 64] for i in torch.randint(0, len(code) - 64, (8,))])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def read_texts() -> tuple[Tensor, Tensor]:
    """Return the bytes of Python's documentation, and of its sources."""
    words = "\n".join(topics[name] for name in sorted(topics))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = b"".join(source.read_bytes() for source in sources)[:1_000_000]
    return torch.tensor(list(words.encode())), torch.tensor(list(code))


def make_runs(path: Path, *, smoke: bool, real: bool) -> list[Followed]:
    """Make the runs that a file lacks, and add each to it. A third of the tiny ones is held out."""
    documentation, code = read_texts()
    settings = list(itertools.product((4, 6), (3e-4, 1e-3, 3e-3), SCHEDULES, (40, 100)))
    random.Random(0).shuffle(settings)
    models: dict[int, Any] = {}
    runs = load_runs(path) if path.exists() else []
    known = {run.name for run in runs}
    for index, (blocks, lr, schedule, steps) in enumerate(settings[:3] if smoke else settings):
        name = f"tiny, {blocks} blocks, lr {lr:g}, {schedule}, {steps} steps"
        if name not in known:
            if blocks not in models:
                models[blocks] = make_tiny(blocks, code, steps=2 if smoke else 150)
            runs.append(
                follow(
                    name, copy.deepcopy(models[blocks]), documentation, lr=lr, schedule=schedule,
                    steps=20 if smoke else steps, batch=8, length=64, seed=index, held_out=index % 3 == 2,
                )
            )  # fmt: skip
            save_runs(runs, path)
    name = "SmolLM2-135M, lr 0.0001, cosine, 20 steps"
    if real and name not in known:
        ids = load_tokenizer("smollm2-135m")(bytes(documentation.tolist()).decode())["input_ids"]
        runs.append(
            follow(
                name, load_model("smollm2-135m"), torch.tensor(ids), lr=1e-4, schedule="cosine", steps=20,
                batch=2, length=32, seed=101, held_out=True,
            )
        )  # fmt: skip
        save_runs(runs, path)
    return runs


def save_runs(runs: Sequence[Followed], path: Path) -> None:
    """Write what was followed, so that the predictor can be trained again without the runs."""
    tensors: dict[str, Tensor] = {}
    for index, run in enumerate(runs):
        key = f"{index:03}|{run.name}|{int(run.held_out)}"
        tensors |= {f"{key}|history": run.history.contiguous(), f"{key}|left": run.left.contiguous()}
    save_file(tensors, path)


def load_runs(path: Path) -> list[Followed]:
    """Read what `save_runs` wrote."""
    tensors = load_file(path)
    keys = sorted({key.rpartition("|")[0] for key in tensors})
    return [
        Followed(key.split("|")[1], key.endswith("1"), tensors[f"{key}|history"], tensors[f"{key}|left"])
        for key in keys
    ]


@dataclass
class Examples:
    """Examples of some runs."""

    features: list[Tensor]
    """What the predictor reads, one entry for each number of records: [examples, T, 4]."""
    answers: list[Tensor]
    """Whether the block had converged, in the same order."""
    times: list[int]
    """Intervals that were over, one for each entry."""

    @property
    def all_answers(self) -> Tensor:
        """The answers in one tensor."""
        return torch.cat(self.answers)


def make_examples(runs: Sequence[Followed], records: int) -> Examples:
    """Make the examples of runs. The last one of a run is its end, where all is over, is left out."""
    examples = Examples([], [], [])
    for now in range(FEWEST_RECORDS - 1, INTERVALS):
        known = [run.history[:, max(0, now + 1 - records) : now + 1] for run in runs]
        answers = [(run.left[:, now:] < LEFT).all(dim=1) for run in runs]
        examples.features.append(describe_history(torch.cat(known)).float())
        examples.answers.append(torch.cat(answers))
        examples.times.append(now)
    return examples


def train_predictor(examples: Examples, records: int, *, rounds: int, noise: float) -> Predictor:
    """Train on all examples of a number of records at a time, each round in another order and with new noise.

    Both answers weigh the same.
    """
    torch.manual_seed(0)
    predictor = Predictor(records)
    share = examples.all_answers.float().mean()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for _ in range(rounds):
        for entry in torch.randperm(len(examples.times)).tolist():
            answers = examples.answers[entry].float()
            weights = torch.where(answers > 0, 0.5 / share, 0.5 / (1 - share))
            features = examples.features[entry]
            logits = predictor(features + noise * torch.randn(features.shape))
            binary_cross_entropy_with_logits(logits, answers, weights).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return predictor


@torch.no_grad()
def answer(predictor: Predictor, examples: Examples) -> Tensor:
    """Return the predictor's answers."""
    return torch.cat([predictor(features) > 0 for features in examples.features])


def find_rules(examples: Examples) -> dict[str, Callable[[Examples], Tensor]]:
    """Return the trivial rules, each with the threshold that is best on the examples."""

    def by_time(least: float, of: Examples) -> Tensor:
        pairs = zip(of.times, of.answers, strict=True)
        return torch.cat([torch.full_like(known, time >= least) for time, known in pairs])

    def by_step(most: float, of: Examples) -> Tensor:
        return torch.cat([features[:, -1, 2].expm1() / 100 < most for features in of.features])

    def best(rule: Callable[[float, Examples], Tensor], thresholds: Sequence[float]) -> float:
        return max(thresholds, key=lambda each: balanced(rule(each, examples), examples.all_answers))

    time = best(by_time, range(INTERVALS + 1))
    step = best(by_step, [i / 100 for i in range(101)])
    return {
        "never": lambda of: torch.zeros_like(of.all_answers),
        f"after {time:g} of {INTERVALS} intervals": lambda of: by_time(time, of),
        f"last step below {step:g} M": lambda of: by_step(step, of),
    }


def balanced(said: Tensor, answers: Tensor) -> float:
    """Mean of the shares of right answers among converged and other examples."""
    right = said == answers
    return float(right[answers].float().mean() + right[~answers].float().mean()) / 2


def print_table(name: str, said: dict[str, Tensor], answers: Tensor) -> None:
    """Print how often each rule is right."""
    print(f"\n{name}: {len(answers)} examples, {float(answers.float().mean()):.0%} converged\n")
    print("| | right | balanced | of those it freezes, not converged | of the converged, frozen |")
    print("| --- | --- | --- | --- | --- |")
    for rule, each in said.items():
        wrong = float((each & ~answers).sum() / each.sum()) if each.any() else 0.0
        found = float((each & answers).sum() / answers.sum())
        right = float((each == answers).float().mean())
        print(f"| {rule} | {right:.1%} | {balanced(each, answers):.1%} | {wrong:.0%} | {found:.0%} |")


def compare(*, smoke: bool) -> None:
    """Train a tiny Llama of 8 blocks, more than the predictor has seen, by three methods; print a table."""
    documentation, code = read_texts()
    text, held_out = documentation[:-16384], documentation[-16384:].view(-1, 64)
    pretrained = make_tiny(8, code, steps=2 if smoke else 150)
    steps = 20 if smoke else 100
    print("\n| method | held-out loss | block-steps trained | processor seconds | blocks that train |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("full", "autofreeze", "smartfrz"):
        model = copy.deepcopy(pretrained)
        layers = find_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES["cosine"](step / steps)
        )
        attached = METHODS[name]().without_proof().attach(model, optimizer, layers, total_steps=steps)
        rng, started, counts = torch.Generator().manual_seed(0), time.process_time(), []
        for _ in range(steps):
            counts.append(8 if attached.active_blocks is None else len(attached.active_blocks))
            ids = torch.stack(
                [text[i : i + 64] for i in torch.randint(0, len(text) - 64, (8,), generator=rng)]
            )
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds = time.process_time() - started
        with torch.no_grad():
            loss = float(model(input_ids=held_out, labels=held_out, use_cache=False).loss)
        changes = [f"{now} from step {i}" for i, now in enumerate(counts) if i == 0 or now != counts[i - 1]]
        share = sum(counts) / (8 * steps)
        print(f"| `{name}` | {loss:.4f} | {share:.0%} | {seconds:.1f} | {', '.join(changes)} |", flush=True)


def main() -> None:
    """Make the runs, train the predictor, print the tables, write the weights."""
    parser = argparse.ArgumentParser(description="Train the predictor of SmartFRZ.")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/smartfrz.safetensors"), help="file of the runs"
    )
    parser.add_argument("--records", type=int, default=INTERVALS, help="R, records that the predictor reads")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the predictor is written")
    parser.add_argument(
        "--real", action="store_true", help="also follow SmolLM2-135M, held out; a minute more"
    )
    parser.add_argument("--smoke", action="store_true", help="three tiny runs; writes no predictor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    runs = make_runs(args.runs, smoke=args.smoke, real=args.real)
    known = make_examples([run for run in runs if not run.held_out], args.records)
    predictor = train_predictor(known, args.records, rounds=2 if args.smoke else 30, noise=0.2)
    rules = find_rules(known)
    for kind in ("tiny", "SmolLM2"):
        held_out = [run for run in runs if run.held_out and run.name.startswith(kind)]
        if held_out:
            examples = make_examples(held_out, args.records)
            said = {rule: decide(examples) for rule, decide in rules.items()}
            said["predictor"] = answer(predictor, examples)
            print_table(f"{kind}, held out", said, examples.all_answers)
    if not args.smoke:
        save_file(predictor.state_dict(), args.output)
    compare(smoke=args.smoke)


if __name__ == "__main__":
    main()
