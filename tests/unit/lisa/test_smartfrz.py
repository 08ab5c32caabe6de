"""SmartFRZ: what is recorded of blocks, what the predictor reads of it, and which blocks freeze."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import tiny
from lisatune import LISA
from lisatune.lisa.smartfrz import Predictor, SmartFRZ, describe_history
from lisatune.lisa.statistics import BlockStatistics, collected_tensors
from lisatune.lisa.weight_history import SAMPLES
from lisatune.methods import METHODS
from lisatune.methods.smartfrz import WEIGHTS, load_predictor
from plans import peak_of
from reference.smartfrz_reference import find_chance, train_reference

BLOCKS = 6


def predictor(records: int = 5, seed: int = 0) -> Predictor:
    """A network of random weights, large enough that its answers differ between blocks."""
    made = Predictor(records).requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for weight in made.parameters():
        weight.copy_(torch.randn(weight.shape, generator=rng) * 0.4)
    return made.double()


def walk(blocks: int = BLOCKS, records: int = 5, seed: int = 1) -> Tensor:
    """Histories of blocks that drift, each with another noise."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(blocks, records, SAMPLES, generator=rng) * torch.linspace(0, 3, blocks)[:, None, None]
    return (torch.randn(blocks, 1, SAMPLES, generator=rng) + noise).cumsum(dim=1)


def draw(history: Tensor, confidence: float, frozen: tuple[int, ...] = ()) -> tuple[int, ...]:
    idle = torch.tensor([float(block in frozen) for block in range(len(history))], dtype=torch.float64)
    sampler = SmartFRZ(len(history), predictor(), confidence)
    return sampler.draw(3, seed=0, statistics=BlockStatistics(weight_history=history, idle=idle))


def chances(history: Tensor) -> list[float]:
    network = predictor().state_dict()
    return [find_chance(block.tolist(), network) for block in history.double()]


def test_blocks_and_weights_are_those_of_the_definition_in_plain_loops() -> None:
    model = tiny.llama(blocks=BLOCKS)
    twin = copy.deepcopy(model)
    network, confidence, interval, steps = predictor(4, seed=3), 0.544, 2, 16
    ends = [*model.lm_head.parameters(), *model.model.norm.parameters()]
    optimizer = torch.optim.AdamW(
        [*ends, *model.model.layers.parameters(), *model.model.embed_tokens.parameters()], lr=1e-3
    )
    sampler = SmartFRZ(BLOCKS, network, confidence)
    seen: list[tuple[int, ...]] = []
    with LISA(model, optimizer, period=interval, sampler=sampler, ends="head", lr_scaling="none") as lisa:
        optimizer.register_step_pre_hook(lambda *_: seen.append(lisa.active_blocks))
        tiny.fit(model, optimizer, steps)
        assert sum(each.numel() for each in collected_tensors(optimizer)) == len(seen[-1]) * 4 * SAMPLES
    expected = train_reference(
        twin,
        list(twin.model.layers),
        lambda step: tiny.backward(twin, step),
        always=[*twin.lm_head.parameters(), *twin.model.norm.parameters()],
        network=network.state_dict(),
        steps=steps,
        interval=interval,
        confidence=confidence,
        lr=1e-3,
    )
    assert seen == expected
    assert len(set(seen)) > 2, "blocks freeze at different times"
    tiny.assert_same_weights(model, twin)


def test_the_predictor_reads_neither_scale_nor_place_nor_order_of_weights() -> None:
    history, shuffled = walk(), torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    features = describe_history(history)
    torch.testing.assert_close(describe_history(history[..., shuffled] * 512), features)
    torch.testing.assert_close(describe_history(history + 8), features, atol=1e-4, rtol=1e-4)
    assert float((features - describe_history(walk(seed=2))).abs().max()) > 0.01
    torch.testing.assert_close(features[:, 0, 0], torch.zeros(BLOCKS).double())
    assert float(features[..., 0].max()) == 1


def test_any_block_freezes_that_the_predictor_finds_converged_and_none_thaws() -> None:
    history = walk()
    found = chances(history)
    confidence = sorted(found)[2]
    stays = {block for block in range(BLOCKS) if found[block] < confidence}
    assert len(stays) == 2
    assert draw(history, confidence + 1e-9) == tuple(sorted(stays | {found.index(confidence)}))
    assert draw(history, confidence - 1e-9) == tuple(sorted(stays))
    resting = min(stays)
    assert draw(history, confidence - 1e-9, (resting,)) == tuple(stays - {resting})


def test_the_block_that_is_furthest_from_converged_stays_if_all_would_freeze() -> None:
    found = chances(walk())
    assert draw(walk(), 1e-12) == (found.index(min(found)),)


def test_no_block_freezes_before_two_intervals_or_without_having_moved() -> None:
    history = walk()
    history[:, :3] = torch.nan
    assert draw(history, 1e-12) == tuple(range(BLOCKS))
    history = walk()
    history[[1, 4]] = history[[1, 4], :1]  # bf16 weights may not move in an interval
    assert {1, 4} <= set(draw(history, 1e-12))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_the_records(precision: Any) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    peaks = [peak_of(name, config, precision) for name in ("smartfrz", "freezeout")]
    records = len(load_predictor().age)
    assert peaks[0] - peaks[1] == pytest.approx(6 * 4 * records * SAMPLES, rel=0.03)


def test_the_weights_of_the_package_are_small_and_answer() -> None:
    network = load_predictor()
    assert WEIGHTS.stat().st_size < 50_000
    found = [float(each) for each in network(describe_history(walk(records=8))).sigmoid()]
    assert all(0 < each < 1 for each in found)
    expected = [find_chance(block.tolist(), network.state_dict()) for block in walk(records=8).double()]
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_run_does_not_go_on_with_another_predictor() -> None:
    model = tiny.llama(blocks=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, sampler=SmartFRZ(2, predictor(seed=0)), lr_scaling="none")
    saved = copy.deepcopy(optimizer.state_dict())
    lisa.detach()
    again = torch.optim.AdamW(model.parameters(), lr=1e-3)
    LISA(model, again, sampler=SmartFRZ(2, predictor(seed=3)), lr_scaling="none")
    with pytest.raises(ValueError, match=r"other settings.*Predictor"):
        again.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidence": 0.0}, "method.confidence must be above 0 and at most 1, got 0.0"),
        ({"confidence": 1.5}, "method.confidence must be above 0 and at most 1, got 1.5"),
        ({"intervals": 0}, "method.intervals must be >= 1"),
        ({"ends": "tail"}, "method.ends"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        METHODS["smartfrz"](**options)
