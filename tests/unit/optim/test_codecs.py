"""Storage in 16 and 8 bits: what goes in comes out, or its expectation does."""

import pytest
import torch

from lisatune.optim import codecs

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.3895e38, -3.3895e38, 1e30, float("nan")]


def exact_from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def through_16_bits(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.empty(exact.shape, dtype=torch.bfloat16)
    remainder = torch.empty(exact.shape, dtype=torch.int16)
    codecs.split_remainder(exact.clone(), weight, remainder)
    back = torch.empty(exact.shape)
    codecs.join_remainder(weight, remainder, back)
    return weight, back


def test_weight_and_remainder_are_the_float32_number_for_every_upper_half() -> None:
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper + lower
        exact = exact_from_bits(torch.where(bits >= 1 << 31, bits - (1 << 32), bits))
        usable = exact.abs() <= codecs.LARGEST
        weight, back = through_16_bits(exact[usable])
        assert torch.equal(back.view(torch.int32), exact[usable].view(torch.int32))
        assert weight.isfinite().all()


def test_weight_is_the_nearest_bf16_and_ties_go_away_from_zero() -> None:
    exact = torch.randn(100_000)
    exact = exact[exact.view(torch.int32) & 0xFFFF != 0x8000]
    weight, _ = through_16_bits(exact)
    assert torch.equal(weight, exact.to(torch.bfloat16))
    ties = exact_from_bits(torch.tensor([0x3F808000, 0x3F818000]))  # between 1 and the next, and one further
    assert through_16_bits(ties)[0].tolist() == [1.0078125, 1.015625]
    assert through_16_bits(-ties)[0].tolist() == [-1.0078125, -1.015625]


def test_special_numbers_survive_and_nothing_overflows() -> None:
    exact = torch.tensor(SPECIAL)
    assert torch.equal(through_16_bits(exact)[1].nan_to_num(7.0), exact.nan_to_num(7.0))
    top = torch.tensor([torch.finfo(torch.float32).max, float("inf"), -float("inf")])
    weight, back = through_16_bits(top)
    assert back.tolist() == [codecs.LARGEST, codecs.LARGEST, -codecs.LARGEST]
    assert weight.isfinite().all()
    rounded = torch.empty(3, dtype=torch.bfloat16)
    codecs.round_stochastically(top, rounded, torch.full((3,), 0xFFFF, dtype=torch.int32))
    assert rounded.isfinite().all()


@pytest.mark.parametrize("value", [1.001, -1.001, 0.0203, 1e-39])
def test_stochastic_rounding_is_right_on_average(value: float) -> None:
    n = 1 << 18
    exact = torch.full((n,), value)
    weight = torch.empty(n, dtype=torch.bfloat16)
    codecs.round_stochastically(exact.clone(), weight, codecs.random_bits(n, 7, exact.device))
    neighbours = weight.unique().double()
    assert len(neighbours) == 2
    spacing = float(neighbours.diff())
    error = float(weight.double().mean() - exact.double()[0])
    assert abs(error) < 5 * spacing * 0.5 / n**0.5  # five standard deviations of a coin at most


def test_random_bits_are_uniform_in_both_halves_and_across_keys() -> None:
    n = 1 << 16
    draws = torch.stack([codecs.random_bits(n, codecs.key_of(3, k), torch.device("cpu")) for k in range(32)])
    for half in (draws & 0xFFFF, (draws >> 16) & 0xFFFF):
        unit = half.double() / 0xFFFF - 0.5
        assert abs(float(unit.mean())) < 5 / (12 * draws.numel()) ** 0.5
        assert float(unit.mean(dim=0).abs().max()) < 0.3  # no element is always high or always low
        for lag in (1, 2, 256):  # neighbours, and the same place in neighbouring blocks
            assert abs(float((unit[:, lag:] * unit[:, :-lag]).mean()) * 12) < 0.01
        assert abs(float((unit[1:] * unit[:-1]).mean()) * 12) < 0.01
    assert torch.equal(draws[0], codecs.random_bits(n, codecs.key_of(3, 0), torch.device("cpu")))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_as_near_as_those_of_bitsandbytes(size: int, signed: bool) -> None:
    pytest.importorskip("bitsandbytes")
    values = torch.randn(size) * torch.logspace(-6, 0, size)
    values = values if signed else values.square()
    codes = torch.empty(size, dtype=torch.uint8)
    scales = torch.empty(-(-size // codecs.BLOCK))
    codecs.quantize(values, codes, scales, signed=signed)
    mine = codecs.dequantize(codes, scales, signed=signed)
    table = codecs.dynamic_map(signed)
    theirs = torch.ops.bitsandbytes.dequantize_blockwise(
        *torch.ops.bitsandbytes.quantize_blockwise(values, table, 256), table, 256, torch.float32
    )
    assert (mine - values).abs().sum() <= 1.1 * (theirs - values).abs().sum() + 1e-6 * values.abs().sum()


def test_zeros_stay_zeros_and_small_second_moments_do_not_become_zero() -> None:
    pytest.importorskip("bitsandbytes")
    codes, scales = torch.empty(256, dtype=torch.uint8), torch.empty(1)
    for signed in (True, False):
        codecs.quantize(torch.zeros(256), codes, scales, signed=signed)
        assert (codecs.dequantize(codes, scales, signed=signed) == 0).all()
    values = torch.full((256,), 1e-12)
    values[0] = 1.0
    codecs.quantize(values, codes, scales, signed=False)
    assert (codecs.dequantize(codes, scales, signed=False) > 0).all()
