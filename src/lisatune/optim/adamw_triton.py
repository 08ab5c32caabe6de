"""One kernel for a chunk of AdamW on CUDA: it does the work of `codecs` and torch's AdamW in one pass.

The cost of an update on a GPU is its passes over memory, and the chain in `adamw.py` makes 10 to 55
passes. This kernel reads weight, gradient and state once and writes weight and state once. It stores the same
numbers, with random bits equal to those of the chain; its arithmetic may differ from the chain's in the last
bit.

16-bit numbers come as int16, and are widened and rounded by their bits: the same in Triton's interpreter, in
which the tests run without a GPU.
"""

import math

import torch
from torch import Tensor

from lisatune.optim import codecs
from lisatune.optim.group import Group

__all__ = ["can_update", "update_chunk"]

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None


SIZE = 1024
"""Elements of a program, a multiple of the 256 that share a scale."""


NARROW = torch.bfloat16


def can_update(group: Group, p: Tensor) -> bool:
    """Whether the kernel covers a parameter and its gradient; False if that would wait for the device."""
    assert p.grad is not None
    is_here = triton is not None and p.device.type == "cuda"
    dtypes = {p.dtype, p.grad.dtype}
    is_lr_here = not isinstance(group["lr"], Tensor) or group["lr"].device.type == "cpu"
    return is_here and dtypes <= {NARROW, torch.float32} and is_lr_here and min(group["betas"]) > 0


def update_chunk(
    group: Group,
    weight: Tensor,
    gradient: Tensor,
    chunk: dict[str, Tensor],
    step: Tensor,
    key: int,
    start: int,
) -> None:
    """Make a step of a chunk in place.

    Args:
        group: the param group; `moments` other than factored.
        weight: bf16 or float32 [N].
        gradient: bf16 or float32 [N].
        chunk: its state: both moments, or their codes and scales; `remainder` where a bf16 weight is exact.
        step: float32 [], counted up already.
        key, start: name the random numbers, as in `codecs.random_bits`.
    """
    is_8bit = "exp_avg_codes" in chunk
    ending = "_codes" if is_8bit else ""
    exp_avg, exp_avg_sq = chunk[f"exp_avg{ending}"], chunk[f"exp_avg_sq{ending}"]
    none = step  # any pointer
    scales, tables = [none] * 2, [none] * 4
    if is_8bit:
        scales = [chunk["exp_avg_scales"], chunk["exp_avg_sq_scales"]]
        tables = [*codecs.load_tables(True, weight), *codecs.load_tables(False, weight)]
    first, low, high = codecs.split_key(key, start)
    beta1, beta2 = group["betas"]
    _kernel[(triton.cdiv(weight.numel(), SIZE),)](
        _bits(weight),
        _bits(gradient),
        chunk.get("remainder", none),
        _bits(exp_avg),
        _bits(exp_avg_sq),
        *scales,
        *tables,
        step,
        weight.numel(),
        first,
        low,
        high,
        float(group["lr"]),
        float(group["weight_decay"]),
        float(group["eps"]),
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=math.log(beta1),
        LOG_BETA2=math.log(beta2),
        LARGEST=codecs.LARGEST if group["rounding"] == "exact" else codecs.LARGEST_BF16,
        ROUNDING=group["rounding"] if weight.dtype == NARROW else "none",
        MOMENTS="8bit" if is_8bit else "bf16" if exp_avg.dtype == NARROW else "fp32",
        NARROW_GRADIENT=gradient.dtype == NARROW,
        ROWS=SIZE // codecs.BLOCK,
        COLUMNS=codecs.BLOCK,
    )


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.dtype == NARROW else values


if triton is not None:

    @triton.jit
    def _widen(bits):  # type: ignore[no-untyped-def]
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def _bits_of(value):  # type: ignore[no-untyped-def]
        """Bits of float32 as int32; NaNs get bits that stay NaN when noise is added."""
        return tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)

    @triton.jit
    def _nearest(value):  # type: ignore[no-untyped-def]
        """Bits of the nearest bf16, ties to even, int16."""
        bits = _bits_of(value)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.int16)

    @triton.jit
    def _by_chance(value, noise):  # type: ignore[no-untyped-def]
        """Bits of bf16 rounded up or down by the low half of `noise`, int16."""
        return ((_bits_of(value) + (noise & 0xFFFF).to(tl.int32)) >> 16).to(tl.int16)

    @triton.jit
    def _clamp(value, largest):  # type: ignore[no-untyped-def]
        return tl.where(value > largest, largest, tl.where(value < -largest, -largest, value))

    @triton.jit
    def _random(index, first, low, high):  # type: ignore[no-untyped-def]
        """`codecs.random_bits` of one index, uint32."""
        bits = index.to(tl.uint32) * 0x9E3779B1 + first
        bits = (bits ^ (bits >> 15)) * 0x85EBCA6B + high
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 + low
        return bits ^ (bits >> 16)

    @triton.jit
    def _quantize(value, inside, codes_ptr, scales_ptr, at, row, rows, table_ptr):  # type: ignore[no-untyped-def]
        value = tl.where(inside, value, 0.0)
        has_nan = tl.max((value != value).to(tl.int32), axis=1)
        scale = tl.where(has_nan > 0, float("nan"), tl.max(tl.abs(value), axis=1))
        tl.store(scales_ptr + row, scale, mask=row < rows)
        near = _nearest(tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)))
        code = tl.load(table_ptr + (near.to(tl.int32) & 0xFFFF))
        tl.store(codes_ptr + at, code, mask=inside)

    @triton.jit(do_not_specialize=["size", "key_first", "key_low", "key_high"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        weight_ptr,  # [N], float32, or bf16 as int16; written
        gradient_ptr,  # [N], float32, or bf16 as int16
        remainder_ptr,  # [N] int16, read and written where ROUNDING is exact
        exp_avg_ptr,  # [N], float32, bf16 as int16, or codes as uint8; written
        exp_avg_sq_ptr,  # [N], as exp_avg_ptr
        exp_avg_scales_ptr,  # [⌈N/256⌉] float32, read and written where MOMENTS is 8bit
        exp_avg_sq_scales_ptr,  # the same
        signed_codes_ptr,  # [65536] uint8, the code of every bf16 number
        signed_values_ptr,  # [256] float32, the value of every code
        unsigned_codes_ptr,  # [65536] uint8
        unsigned_values_ptr,  # [256] float32
        step_ptr,  # [] float32, counted up already
        size,  # N
        key_first,  # int32, as in `codecs.split_key`
        key_low,  # int32, the lower half of the key
        key_high,  # int32, the upper half
        lr,
        weight_decay,
        eps,
        BETA1: tl.constexpr,
        BETA2: tl.constexpr,
        LOG_BETA1: tl.constexpr,
        LOG_BETA2: tl.constexpr,
        LARGEST: tl.constexpr,
        ROUNDING: tl.constexpr,
        MOMENTS: tl.constexpr,
        NARROW_GRADIENT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        rows = tl.cdiv(size, COLUMNS)
        at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = at < size

        gradient = tl.load(gradient_ptr + at, mask=inside, other=0)
        if NARROW_GRADIENT:
            gradient = _widen(gradient)
        weight = tl.load(weight_ptr + at, mask=inside, other=0)
        if ROUNDING != "none":
            weight = _widen(weight)
        if ROUNDING == "exact":
            remainder = tl.load(remainder_ptr + at, mask=inside, other=0).to(tl.int32)
            weight = (weight.to(tl.int32, bitcast=True) + remainder).to(tl.float32, bitcast=True)
        exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0)
        if MOMENTS == "bf16":
            exp_avg, exp_avg_sq = _widen(exp_avg), _widen(exp_avg_sq)
        if MOMENTS == "8bit":
            scale = tl.load(exp_avg_scales_ptr + row, mask=row < rows, other=0.0)
            exp_avg = tl.load(signed_values_ptr + exp_avg.to(tl.int32)) * scale[:, None]
            scale = tl.load(exp_avg_sq_scales_ptr + row, mask=row < rows, other=0.0)
            exp_avg_sq = tl.load(unsigned_values_ptr + exp_avg_sq.to(tl.int32)) * scale[:, None]

        step = tl.load(step_ptr).to(tl.float64)
        size_of_step = (lr / (1 - tl.exp(step * LOG_BETA1))).to(tl.float32)
        correction = tl.sqrt(1 - tl.exp(step * LOG_BETA2)).to(tl.float32)
        weight -= lr * weight_decay * weight
        exp_avg += (1 - BETA1) * (gradient - exp_avg)
        exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * gradient * gradient
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.broadcast_to(correction, exp_avg_sq.shape)) + eps
        weight -= tl.div_rn(size_of_step * exp_avg, denominator)

        if ROUNDING == "stochastic" or MOMENTS == "bf16":
            noise = _random(at, key_first.to(tl.uint32), key_low.to(tl.uint32), key_high.to(tl.uint32))
        if MOMENTS == "bf16":
            tl.store(exp_avg_ptr + at, _nearest(exp_avg), mask=inside)
            most = 3.3895313892515355e38
            tl.store(exp_avg_sq_ptr + at, _by_chance(_clamp(exp_avg_sq, most), noise >> 16), mask=inside)
        elif MOMENTS == "8bit":
            _quantize(exp_avg, inside, exp_avg_ptr, exp_avg_scales_ptr, at, row, rows, signed_codes_ptr)
            _quantize(
                exp_avg_sq, inside, exp_avg_sq_ptr, exp_avg_sq_scales_ptr, at, row, rows, unsigned_codes_ptr
            )
        else:
            tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
            tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)

        if ROUNDING == "exact":
            bits = _bits_of(_clamp(weight, LARGEST))
            rest = bits.to(tl.int16)
            tl.store(remainder_ptr + at, rest, mask=inside)
            tl.store(weight_ptr + at, ((bits - rest.to(tl.int32)) >> 16).to(tl.int16), mask=inside)
        elif ROUNDING == "stochastic":
            tl.store(weight_ptr + at, _by_chance(_clamp(weight, LARGEST), noise), mask=inside)
        elif ROUNDING == "nearest":
            tl.store(weight_ptr + at, _nearest(weight), mask=inside)
        else:
            tl.store(weight_ptr + at, weight, mask=inside)
