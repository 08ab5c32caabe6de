"""One kernel for chunks of AdamW on CUDA: it does the work of `codecs` and torch's AdamW in one pass.

The cost of an update on a GPU is its passes over memory, and the chain in `adamw.py` makes 10 to 55
passes. This kernel reads weight, gradient and state once and writes weight and state once. It stores the same
numbers, with random bits equal to those of the chain; its arithmetic may differ from the chain's in the last
bit.

Small chunks share a launch, because starting a kernel takes longer than updating them. The kernel's grid is
then programs x chunks, and each program reads from a table where its chunk is.

16-bit numbers come as int16, and are widened and rounded by their bits: the same in Triton's interpreter, in
which the tests run without a GPU.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lisatune.optim import codecs
from lisatune.optim.group import Group

__all__ = ["SMALL", "Chunk", "can_update", "is_small", "kind_of", "update_chunk", "update_together"]

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None


SIZE = 1024
"""Elements of a program, a multiple of the 256 that share a scale."""


SMALL = 1 << 20
"""Elements of the largest parameter that shares a launch. On an H100 a launch took about 90 µs of the host's
time (docs/results/h100.md); a million elements move at most 27 MB, which takes its memory 8 µs."""


NARROW = torch.bfloat16


Chunk = tuple[Tensor, Tensor, dict[str, Tensor], Tensor, int, int]
"""Arguments of `update_chunk` after the group."""


def can_update(group: Group, p: Tensor) -> bool:
    """Whether the kernel covers a parameter and its gradient; False if that would wait for the device."""
    assert p.grad is not None
    is_here = triton is not None and p.device.type == "cuda"
    dtypes = {p.dtype, p.grad.dtype}
    is_lr_here = not isinstance(group["lr"], Tensor) or group["lr"].device.type == "cpu"
    return is_here and dtypes <= {NARROW, torch.float32} and is_lr_here and min(group["betas"]) > 0


def is_small(group: Group, p: Tensor, chunk_size: int | None) -> bool:
    """Whether a parameter that `can_update` covers may share a launch with others.

    Not in a CUDA graph, which would replay an old table, and not under torch.compile, which has no addresses.
    """
    is_in_place = p.is_contiguous() and group["state_device"] is None and group["moments"] != "factored"
    if not is_in_place or not 0 < p.numel() <= min(SMALL, chunk_size or SMALL):
        return False
    is_recorded = p.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not is_recorded and not torch.compiler.is_compiling()


def kind_of(weight: Tensor, gradient: Tensor, chunk: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return what chunks of one group must have in common to share a launch."""
    return weight.device, weight.dtype, gradient.dtype, "exp_avg_codes" in chunk


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
    update_together(group, [(weight, gradient, chunk, step, key, start)])


def update_together(group: Group, chunks: Sequence[Chunk]) -> None:
    """Make a step of several chunks of one kind (`kind_of`) in one launch, which changes no number."""
    weight, gradient, chunk, step, _, _ = chunks[0]
    is_8bit = "exp_avg_codes" in chunk
    codes = [step] * 4  # any pointer
    if is_8bit:
        codes = [*codecs.load_tables(True, weight), *codecs.load_tables(False, weight)]
    rows = [_row(*each) for each in chunks]
    beta1, beta2 = group["betas"]
    with torch.accelerator.device_index(weight.device.index):  # Triton launches on the current device
        _kernel[(triton.cdiv(max(each[0].numel() for each in chunks), SIZE), len(chunks))](
            step if len(chunks) == 1 else _make_table(rows, weight.device),
            *rows[0],
            *codes,
            float(group["lr"]),
            float(group["weight_decay"]),
            float(group["eps"]),
            BETA1=beta1,
            BETA2=beta2,
            LOG_BETA1=math.log(beta1),
            LOG_BETA2=math.log(beta2),
            LARGEST=codecs.LARGEST if group["rounding"] == "exact" else codecs.LARGEST_BF16,
            ROUNDING=group["rounding"] if weight.dtype == NARROW else "none",
            MOMENTS="8bit" if is_8bit else "bf16" if chunk["exp_avg"].dtype == NARROW else "fp32",
            NARROW_GRADIENT=gradient.dtype == NARROW,
            HAS_TABLE=len(chunks) > 1,
            ROWS=SIZE // codecs.BLOCK,
            COLUMNS=codecs.BLOCK,
            enable_fp_fusion=False,  # the compiler fuses other products and sums with a table than without
        )


def _row(
    weight: Tensor, gradient: Tensor, chunk: dict[str, Tensor], step: Tensor, key: int, start: int
) -> list[Any]:
    """What the kernel must know of a chunk, in the order of its arguments: 8 tensors and 4 numbers."""
    ending = "_codes" if "exp_avg_codes" in chunk else ""
    return [
        _bits(weight),
        _bits(gradient),
        chunk.get("remainder", step),  # any pointer where there is none
        _bits(chunk[f"exp_avg{ending}"]),
        _bits(chunk[f"exp_avg_sq{ending}"]),
        chunk.get("exp_avg_scales", step),
        chunk.get("exp_avg_sq_scales", step),
        step,
        weight.numel(),
        *codecs.split_key(key, start),
    ]


def _make_table(rows: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """Rows of `_row` as int64 [chunks, 12], tensors as addresses; the host does not wait for the copy."""
    numbers = [[each.data_ptr() if isinstance(each, Tensor) else each for each in row] for row in rows]
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


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

    @triton.jit
    def _pointer(row_ptr, like):  # type: ignore[no-untyped-def]
        """The address at `row_ptr`, as a pointer to what `like` points to."""
        return tl.load(row_ptr).to(like.dtype)

    @triton.jit(do_not_specialize=["size", "key_first", "key_low", "key_high"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        table_ptr,  # [chunks, 12] int64 where HAS_TABLE: the next 12 arguments of each chunk
        weight_ptr,  # [N], float32, or bf16 as int16; written
        gradient_ptr,  # [N], float32, or bf16 as int16
        remainder_ptr,  # [N] int16, read and written where ROUNDING is exact
        exp_avg_ptr,  # [N], float32, bf16 as int16, or codes as uint8; written
        exp_avg_sq_ptr,  # [N], as exp_avg_ptr
        exp_avg_scales_ptr,  # [⌈N/256⌉] float32, read and written where MOMENTS is 8bit
        exp_avg_sq_scales_ptr,  # the same
        step_ptr,  # [] float32, counted up already
        size,  # N
        key_first,  # int32, as in `codecs.split_key`
        key_low,  # int32, the lower half of the key
        key_high,  # int32, the upper half
        signed_codes_ptr,  # [65536] uint8, the code of every bf16 number
        signed_values_ptr,  # [256] float32, the value of every code
        unsigned_codes_ptr,  # [65536] uint8
        unsigned_values_ptr,  # [256] float32
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
        HAS_TABLE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        if HAS_TABLE:
            row_ptr = table_ptr + tl.program_id(1) * 12
            size = tl.load(row_ptr + 8).to(tl.int32)
            if tl.program_id(0) * ROWS * COLUMNS >= size:
                return
            weight_ptr = _pointer(row_ptr, weight_ptr)
            gradient_ptr = _pointer(row_ptr + 1, gradient_ptr)
            remainder_ptr = _pointer(row_ptr + 2, remainder_ptr)
            exp_avg_ptr = _pointer(row_ptr + 3, exp_avg_ptr)
            exp_avg_sq_ptr = _pointer(row_ptr + 4, exp_avg_sq_ptr)
            exp_avg_scales_ptr = _pointer(row_ptr + 5, exp_avg_scales_ptr)
            exp_avg_sq_scales_ptr = _pointer(row_ptr + 6, exp_avg_sq_scales_ptr)
            step_ptr = _pointer(row_ptr + 7, step_ptr)
            key_first = tl.load(row_ptr + 9).to(tl.int32)
            key_low = tl.load(row_ptr + 10).to(tl.int32)
            key_high = tl.load(row_ptr + 11).to(tl.int32)
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
        step_size = (lr / (1 - tl.exp(step * LOG_BETA1))).to(tl.float32)
        bias_correction2_sqrt = tl.sqrt(1 - tl.exp(step * LOG_BETA2)).to(tl.float32)
        weight -= lr * weight_decay * weight
        exp_avg += (1 - BETA1) * (gradient - exp_avg)
        exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * gradient * gradient
        root = tl.broadcast_to(bias_correction2_sqrt, exp_avg_sq.shape)
        denom = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps
        weight -= tl.div_rn(step_size * exp_avg, denom)

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
