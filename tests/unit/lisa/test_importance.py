"""Samplers that draw by what was measured: gradients and spectra."""

import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lisatune import LISA, build_adamw, find_layers
from lisatune.lisa import BlockStatistics
from lisatune.lisa.budget import Budget
from lisatune.lisa.draws import draw_blocks
from lisatune.lisa.importance import Gradient, Misa, Spectrum
from lisatune.lisa.spectrum import measure_spectra, signal_to_noise

NAMES = ("gradient", "misa", "spectrum")
BLOCKS = Budget.of_count(6, 2)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def attach(model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, LISA]:
    layers = find_layers(model)
    optimizer = build_adamw(model, layers, lr=1e-2)
    return optimizer, LISA(model, optimizer, **{"period": 2, "layers": layers, **options})


def run_of(name: str, unit: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, LISA]:
    model = tiny.llama(seed=seed)
    return model, *attach(model, sampler=name, unit=unit, verify="full")


@pytest.mark.parametrize("unit", ["block", "module"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_equal(name: str, unit: str) -> None:
    straight, optimizer, lisa = run_of(name, unit)
    tiny.fit(straight, optimizer, 9)  # inside a period, in the middle of the first pass or after it
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    drawn = []
    tiny.fit(straight, optimizer, range(9, 15), after=lambda _: drawn.append(lisa.active_blocks))
    resumed, again, other = run_of(name, unit, seed=1)  # other weights, so another spectrum, when attached
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert [other.lr_factor(i) for i in range(6)] == [lisa.lr_factor(i) for i in range(6)]
    redrawn = []
    tiny.fit(resumed, again, range(9, 15), after=lambda _: redrawn.append(other.active_blocks))
    assert redrawn == drawn
    tiny.assert_same_weights(resumed, straight)


@pytest.mark.parametrize("name", ["gradient", "misa"])
def test_every_block_trains_before_one_is_drawn_by_its_gradient(name: str) -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, sampler=name, period=1)
    tiny.fit(model, optimizer, 3)
    assert lisa.visits == [1] * 6
    assert len(lisa.active_blocks) == 2


def test_the_gradient_average_is_that_of_a_slow_twin() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, sampler="gradient", active=3)
    norms: dict[int, list[float]] = {}
    expected: dict[int, float] = {}

    def note(*_: object) -> None:
        for block in lisa.active_blocks:
            squares = sum(float(p.grad.double().square().sum()) for p in lisa._blocks[block])
            norms.setdefault(block, []).append(math.sqrt(squares))

    optimizer.register_step_pre_hook(note)
    for period in range(6):
        tiny.fit(model, optimizer, range(2 * period, 2 * period + 2))
        for block, seen in norms.items():
            mean = sum(seen) / 2
            expected[block] = 0.8 * expected[block] + 0.2 * mean if block in expected else mean
        norms.clear()
    saved = optimizer.state_dict()["lisa"]["statistics"]["norms"]["gradient_average"]
    for block in range(6):
        assert float(saved[block]) == pytest.approx(expected[block], rel=1e-5)


def test_grass_is_a_softmax_of_the_gradient_of_a_typical_parameter() -> None:
    sampler = Gradient(BLOCKS, numbers=(4, 4, 4, 16, 4, 4), temperature=2.0)
    average = numbers(2, 4, 6, 16, 2, 2)
    p = sampler.probabilities(BlockStatistics(gradient_average=average, visits=torch.ones(6)))
    typical = [1, 2, 3, 4, 1, 1]
    weights = [math.exp(m / (2.0 * 2.0)) for m in typical]  # the mean is 2
    assert p.tolist() == pytest.approx([w / sum(weights) for w in weights])


def test_grass_draws_in_proportion_to_its_softmax() -> None:
    sampler = Gradient(Budget.of_count(4, 1), temperature=0.5)
    statistics = BlockStatistics(gradient_average=numbers(1, 2, 3, 2), visits=torch.ones(4))
    counts: Counter[int] = Counter()
    for period in range(3000):
        counts.update(draw_blocks(sampler, period, seed=0, statistics=statistics))
    for block, chance in enumerate(sampler.probabilities(statistics).tolist()):
        assert counts[block] / 3000 == pytest.approx(chance, abs=0.03)


def test_misa_is_exp_of_the_squared_gradient_cut_at_5() -> None:
    sampler = Misa(BLOCKS, eta=2.0)
    p = sampler.probabilities(BlockStatistics(gradient_average=numbers(0, 0.5, 1, 9, math.nan, 1)))
    assert p.tolist() == pytest.approx([1, math.exp(0.5), math.exp(2), math.exp(5), 0, math.exp(2)])


def test_misa_lets_no_block_rest_for_ever() -> None:
    sampler = Misa(Budget.of_count(6, 3), eta=1.0)
    average = numbers(0, 0, 0, 0, 2, 2)  # e^4 times as likely
    idle = torch.zeros(6, dtype=torch.float64)
    rests = []
    for period in range(60):
        statistics = BlockStatistics(gradient_average=average, visits=torch.ones(6), idle=idle)
        drawn = draw_blocks(sampler, period, seed=0, statistics=statistics)
        assert len(drawn) == 3
        assert float(idle[list(drawn)].max()) == float(idle.max()), "the one that rested longest trains"
        idle = idle + 1
        idle[list(drawn)] = 0
        rests.append(float(idle.max()))
    assert max(rests) <= 6


def test_a_spectrum_is_that_of_the_published_code() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40) + 3 * torch.outer(torch.randn(24), torch.randn(40))
    values = torch.linalg.svdvals(weight.double())
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
    edge = sigma * (1 + math.sqrt(24 / 40))
    expected = values[values > edge].sum() / values[values <= edge].sum() / values[0]
    assert signal_to_noise(weight) == pytest.approx(float(expected), rel=1e-6)
    assert signal_to_noise(weight.T) == pytest.approx(float(expected), rel=1e-6)
    assert signal_to_noise(torch.stack([weight, weight])) == pytest.approx(float(expected), rel=1e-6)
    assert signal_to_noise(torch.zeros(4, 4)) == 0


def test_a_block_with_more_signal_has_a_higher_score_and_trains_more_often() -> None:
    model = tiny.llama()
    with torch.no_grad():
        for p in model.model.layers[2].parameters():
            if p.ndim == 2:
                p.add_(torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1])), alpha=1e-4)
    blocks = find_layers(model).block_parameters(model)
    scores = measure_spectra(blocks)
    assert all(0 < score <= 1 for score in scores)
    _, lisa = attach(model, sampler="spectrum", active=1)
    assert isinstance(lisa.sampler, Spectrum)
    chances = lisa._find_chances()
    order = sorted(range(6), key=scores.__getitem__)
    assert sorted(range(6), key=chances.__getitem__)[-1] == order[-1]
    assert [lisa.lr_factor(i) for i in range(6)] == pytest.approx([chance**-0.5 for chance in chances])


def test_the_kinds_of_matrices_are_compared_with_each_other_alone() -> None:
    torch.manual_seed(0)
    noise = [{f"h.{i}.q.weight": nn.Parameter(torch.randn(8, 8))} for i in range(3)]
    for i, block in enumerate(noise):
        block[f"h.{i}.up.weight"] = nn.Parameter(torch.randn(8, 16))
    ratios = {name: signal_to_noise(p) for block in noise for name, p in block.items()}
    largest = {kind: max(ratios[f"h.{i}.{kind}.weight"] for i in range(3)) for kind in ("q", "up")}
    expected = [sum(ratios[f"h.{i}.{kind}.weight"] / largest[kind] for kind in largest) / 2 for i in range(3)]
    assert measure_spectra(noise) == pytest.approx(expected)


@pytest.mark.parametrize("unit", ["block", "module"])
@pytest.mark.parametrize("name", NAMES)
def test_inclusion_keeps_the_budget(name: str, unit: str) -> None:
    _, lisa = attach(tiny.llama(), sampler=name, unit=unit)
    sizes = [sum(p.numel() for p in block) for block in lisa._blocks]
    used = sum(size * chance for size, chance in zip(sizes, lisa.sampler.inclusion(), strict=True))
    budget = sum(sizes) * 2 / 6
    assert (0.8 if unit == "module" else 0.999) * budget <= used <= 1.001 * budget


@pytest.mark.parametrize("name", NAMES)
def test_active_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="active must be between 0 and the model's 6 blocks, got 7"):
        attach(tiny.llama(), sampler=name, active=7)


@pytest.mark.parametrize(
    ("kind", "options"), [(Gradient, {"temperature": 0.0}), (Misa, {"eta": -1.0}), (Misa, {"longest": -1})]
)
def test_values_out_of_range_are_refused(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}"):
        kind(BLOCKS, **options)


def test_statistics_of_another_number_of_blocks_are_refused() -> None:
    of_six, _ = attach(tiny.llama(), sampler="misa")
    of_four, _ = attach(tiny.llama(blocks=4), sampler="misa")
    saved = of_four.state_dict()
    saved["param_groups"], saved["state"] = of_six.state_dict()["param_groups"], {}
    with pytest.raises(ValueError, match="blocks: saved 4, now 6"):
        of_six.load_state_dict(saved)
