"""SmartFRZ as slow and obvious as can be: plain loops over every sample, record and unit of the network.

Trains with torch's AdamW, of which a frozen block has no gradient.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

SAMPLES = 256


def train_reference(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    backward: Callable[[int], None],
    *,
    always: Sequence[nn.Parameter],
    network: Mapping[str, Tensor],
    steps: int,
    interval: int,
    confidence: float,
    lr: float,
) -> list[tuple[int, ...]]:
    """Train a model; blocks freeze on the way.

    Args:
        model: float32.
        blocks: its blocks.
        backward: makes the gradients of a step.
        always: what trains beside the blocks.
        network: weights of the predictor by name.
        steps, interval, confidence, lr: of the run.

    Returns:
        The blocks that trained in each step.
    """
    optimizer = torch.optim.AdamW([*always, *(p for block in blocks for p in block.parameters())], lr=lr)
    active, trained = list(range(len(blocks))), []
    history = {block: [sample(blocks[block])] for block in active}
    kept = len(network["age"])
    for step in range(steps):
        trained.append(tuple(active))
        backward(step)
        train = {*always, *(p for block in active for p in blocks[block].parameters())}
        for p in model.parameters():
            if p not in train:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % interval == 0:
            for block in active:
                history[block] = [*history[block], sample(blocks[block])][-kept:]
            if len(history[active[0]]) >= 3:
                chances = {block: find_chance(history[block], network) for block in active}
                furthest = min(active, key=lambda block: chances[block])
                active = [block for block in active if chances[block] < confidence or block == furthest]
    return trained


def sample(block: nn.Module) -> list[float]:
    """Look at the same 256 numbers of a block each time."""
    numbers = [value for p in block.parameters() for value in p.detach().flatten().tolist()]
    rng = random.Random(len(numbers))
    places = [rng.randrange(len(numbers)) for _ in range(SAMPLES)]
    return [numbers[place] for place in places]


def find_chance(records: list[list[float]], network: Mapping[str, Tensor]) -> float:
    """Ask the network about a block."""
    n = len(records) - 1
    steps = [[0.0] * SAMPLES] + [
        [b - a for a, b in zip(records[t], records[t + 1], strict=True)] for t in range(n)
    ]
    most = max(distance(record, records[0]) for record in records)
    hidden = []
    for t, record in enumerate(records):
        length = math.sqrt(dot(steps[t], steps[t]))
        newest = math.sqrt(dot(steps[n], steps[n]))
        features = [
            distance(record, records[0]) / most,
            math.log(1 + 100 * distance(record, records[n]) / most),
            math.log(1 + 100 * length / most),
            dot(steps[t], steps[n]) / (length * newest) if length > 0 else 0.0,
        ]
        age = network["age"][n - t].tolist()
        embedded = linear(features, network, "embed")
        hidden.append([gelu(each + more) for each, more in zip(embedded, age, strict=True)])
    query = linear(hidden[n], network, "query")
    scores = [math.exp(dot(query, linear(h, network, "key")) / math.sqrt(len(h))) for h in hidden]
    read = list(hidden[n])
    for score, h in zip(scores, hidden, strict=True):
        value = linear(h, network, "value")
        read = [a + score / sum(scores) * b for a, b in zip(read, value, strict=True)]
    answer = linear([gelu(each) for each in linear(read, network, "hidden")], network, "answer")[0]
    return 1 / (1 + math.exp(-answer))


def linear(inputs: list[float], network: Mapping[str, Tensor], name: str) -> list[float]:
    """Apply a layer of the network."""
    rows, bias = network[f"{name}.weight"].tolist(), network[f"{name}.bias"].tolist()
    return [dot(row, inputs) + more for row, more in zip(rows, bias, strict=True)]


def gelu(x: float) -> float:
    """x times the chance that a normal number is below x."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def distance(a: list[float], b: list[float]) -> float:
    """Euclidean distance."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def dot(a: list[float], b: list[float]) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))
