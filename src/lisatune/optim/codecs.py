"""Narrow storage of weights and moments: AdamW keeps them in 16 or 8 bits and computes in float32.

Exact bf16 weights. A float32 number w has the bits (h << 16) + r for exactly one h and one r in
[-2^15, 2^15 - 1]. h, read as bf16, is w rounded to nearest; r is what rounding lost. So a bf16 weight and
an int16 remainder are the float32 weight, bit for bit. Ties round away from zero: with ties to even, h would
not tell +2^15 from -2^15.

Stochastic rounding. Uniform noise in [0, 2^16) is added to the bits of w and the low 16 are cut off: w goes
up with a chance of its distance to the lower neighbour, so its expectation is w.

8-bit moments. Blocks of 256 numbers share a float32 scale, their largest magnitude; a number over its scale
becomes the nearest of 256 values between 0 (or -1) and 1 that are denser towards zero (dynamic 8-bit,
Dettmers et al., arXiv 2110.02861, section 2).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lisatune.distributed.shards import has_values
from lisatune.optim.group import Rounding

__all__ = [
    "BLOCK",
    "check_8bit",
    "dequantize",
    "dynamic_map",
    "in_float32",
    "join_remainder",
    "key_of",
    "load_tables",
    "narrow",
    "quantize",
    "random_bits",
    "round_stochastically",
    "split_key",
    "split_remainder",
    "widen",
]

BLOCK = 256
"""Elements that share a scale in 8-bit moments."""


LARGEST = float.fromhex("0x1.fefffep127")
"""Largest float32 that has a finite bf16 and a remainder: bits 0x7F7F7FFF."""


LARGEST_BF16 = torch.finfo(torch.bfloat16).max


SPREAD = 0x9E3779B1
"""2^32 over the golden ratio: multiples of it are far apart modulo 2^32."""


@contextmanager
def in_float32(
    weight: Tensor,
    remainder: Tensor | None,
    rounding: Rounding,
    key: int,
    *,
    start: int = 0,
    noise: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the exact value of a weight in float32; after the block, store the changed value.

    Args:
        weight: bf16, any shape. A wider weight is yielded itself.
        remainder: int16, the shape of the weight: the difference lost in rounding to bf16. None if nothing
            is kept.
        rounding: how a bf16 weight is rounded.
        key, start: name the random bits of stochastic rounding, as in `random_bits`.
        noise: these bits, int32 and the shape of the weight, if the caller has made them; used up.
    """
    if noise is None and rounding == "stochastic" and weight.dtype == torch.bfloat16:
        noise = random_bits(weight.numel(), key, weight.device, start=start).view(weight.shape)
    exact = widen(weight, remainder)
    yield exact
    narrow(exact, weight, remainder, rounding, noise)


def widen(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """Return the exact value of a weight in float32. bf16 is copied; wider weights are returned unchanged."""
    if weight.dtype != torch.bfloat16:
        return weight
    exact = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if remainder is None:
        return exact.copy_(weight)
    join_remainder(weight, remainder, exact)
    return exact


def narrow(
    exact: Tensor, weight: Tensor, remainder: Tensor | None, rounding: Rounding, noise: Tensor | None
) -> None:
    """Store what `widen` returned, after it was updated; `exact` and `noise` are used up."""
    if weight.dtype != torch.bfloat16:
        return
    if rounding == "exact":
        assert remainder is not None
        split_remainder(exact, weight, remainder)
    elif rounding == "stochastic":
        assert noise is not None
        round_stochastically(exact, weight, noise)
    else:
        weight.copy_(exact)


def join_remainder(weight: Tensor, remainder: Tensor, out: Tensor) -> None:
    """Join bf16 weights and int16 remainders into the float32 numbers they stand for, written to `out`."""
    out.copy_(weight)
    out.view(torch.int32).add_(remainder)


def split_remainder(exact: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write float32 numbers as bf16 weights and int16 remainders; `exact` is used up.

    Magnitudes above `LARGEST`, infinity included, become `LARGEST`; NaN stays NaN.
    """
    bits = _number_bits(exact, LARGEST)
    remainder.copy_(bits)  # the low 16 bits, as a signed number
    bits.sub_(remainder)
    weight.copy_(exact)  # nothing left to round


def round_stochastically(exact: Tensor, weight: Tensor, noise: Tensor) -> None:
    """Write float32 numbers as bf16, up or down by chance; `exact` and `noise` are used up.

    Args:
        exact: float32.
        weight: bf16, written.
        noise: int32, of which the low 16 bits are used; must be uniform.
    """
    bits = _number_bits(exact, LARGEST_BF16)
    bits.add_(noise.bitwise_and_(0xFFFF)).bitwise_and_(-0x10000)
    weight.copy_(exact)


def _number_bits(exact: Tensor, largest: float) -> Tensor:
    """Return the bits of float32, clamped in place. NaNs get bits that stay NaN when noise is added."""
    exact.clamp_(-largest, largest)
    if exact.device.type != "cpu":  # CUDA's NaN is 0x7FFFFFFF, one below -0.0
        exact.masked_fill_(exact.isnan(), torch.nan)
    return exact.view(torch.int32)


def key_of(*numbers: int) -> int:
    """Mix integers into one of 64 bits (the finaliser of splitmix64 over each)."""
    key = 0
    for number in numbers:
        key = (key ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        key = (key ^ key >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key


def random_bits(size: int, key: int, device: torch.device, *, start: int = 0) -> Tensor:
    """Make `size` random int32, those at the places `start`, `start` + 1, … of the sequence of `key`.

    They are equal on every device, and no generator is touched. A sequence has 2^32 places and then repeats.
    """
    first, low, high = split_key(key, start)
    bits = torch.arange(size, dtype=torch.int32, device=device).mul_(_signed(SPREAD)).add_(first)
    for shift, factor, added in ((15, 0x85EBCA6B, high), (13, 0xC2B2AE35, low)):
        # The mask drops the copies of the sign that >> shifts in: with them numbers would collide.
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 32 - shift) - 1))
        bits.mul_(_signed(factor)).add_(added)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def split_key(key: int, start: int = 0) -> tuple[int, int, int]:
    """Split a key of 64 bits into what `random_bits` adds: at first, to begin at `start`, and twice later.

    The latter are its lower and its upper 32 bits. All three are an int32.
    """
    low = key & 0xFFFFFFFF
    return _signed(low + SPREAD * start & 0xFFFFFFFF), _signed(low), _signed(key >> 32)


def quantize(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write float32 values as 8-bit codes, uint8 [N], and scales, float32 [⌈N/256⌉].

    Values pass through bf16 on their way to the nearest code, which makes them an index into a table: 9 times
    faster on a CPU than a search, with 2 to 6 % more error. Unsigned values are never rounded to zero,
    because a second moment of zero would leave only eps in the denominator.
    """
    table, _ = load_tables(signed, values)
    padded = pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    torch.amax(padded.abs(), dim=1, out=scales)
    near = (padded / scales.unsqueeze(1)).view(-1)[: values.numel()].to(torch.bfloat16)
    codes.copy_(table.index_select(0, near.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)))


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 values [N] that codes and scales stand for."""
    _, value_of = load_tables(signed, codes)
    values = value_of.index_select(0, pad(codes, (0, -codes.numel() % BLOCK)).to(torch.int32))
    return values.view(-1, BLOCK).mul_(scales.unsqueeze(1)).view(-1)[: codes.numel()]


def load_tables(signed: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the code of each of the 2^16 bf16 numbers, uint8, and the value of each code, float32 [256]."""
    if not has_values(like):  # a memory plan: only shapes count
        codes = torch.empty(1 << 16, dtype=torch.uint8, device=like.device)
        return codes, torch.empty(256, device=like.device)
    return _tables_on(signed, like.device)


@cache
def _tables_on(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    values = dynamic_map(signed)
    every_bf16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes = torch.bucketize(every_bf16.float(), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return (codes if signed else codes.clamp_(min=1)).to(device), values.to(device)


def check_8bit() -> None:
    """Raise ImportError, with the line that fixes it, if 8-bit moments are not available."""
    _bitsandbytes()


def dynamic_map(signed: bool) -> Tensor:
    """Read the 256 values of bitsandbytes' dynamic 8-bit numbers, rising, float32.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    values: Tensor = _bitsandbytes().create_dynamic_map(signed)
    return values


@cache
def _bitsandbytes() -> Any:
    """Import bitsandbytes silently: it logs and warns about kernels that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            import bitsandbytes.functional as functional
        except ImportError as error:
            raise ImportError(
                "optimizer.moments: 8bit needs bitsandbytes: pip install bitsandbytes"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
    return functional


def _signed(bits: int) -> int:
    """The int32 that has these 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits
