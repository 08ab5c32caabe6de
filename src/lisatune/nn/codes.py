"""Weights as codes: one byte (int8 rows) or half a byte (NF4) for each number, and back.

    int8    a row w of a weight shares its largest magnitude a, in float32:  w ≈ a/127 · c,  c in -127 … 127.
            8 + 32/columns bits a weight; needs no package.
    nf4     64 neighbouring weights share their largest magnitude a, and each is the nearest of the 16
            quantiles q of a normal distribution:  w ≈ a · q_c  (QLoRA, Dettmers et al., arXiv 2305.14314,
            section 3). 4 + 32/64 bits a weight, by bitsandbytes.
    nf4 with 8-bit scales (double quantisation)   256 neighbouring scales a share their largest one, in
            float32:  a ≈ m/255 · b,  b in 0 … 255. 4 + 8/64 + 32/(64·256) = 4.127 bits a weight.

Encoding is deterministic: equal weights give equal codes.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lisatune.distributed.shards import has_values
from lisatune.nn.nf4 import decode_nf4, encode_nf4, import_bitsandbytes

__all__ = ["CODE_NAMES", "Codes", "Format", "Int8Rows", "Nf4", "PerExpert", "Scales", "make_format"]

Codes = Mapping[str, Tensor]
"""The tensors that stand for a weight, by name; `codes` is one of them."""

CODE_NAMES = ("codes", "scales", "scales_of_scales")
"""The names that formats use."""

Scales = Literal["8bit", "fp32"]
"""How NF4 stores the scales of its blocks."""

AT_ONCE = 1 << 22
"""Elements of a weight that are encoded at once, because encoding needs them in float32."""

SCALES_AT_ONCE = 256
"""NF4 scales that share a scale of their own."""


class Format:
    """A way to store a weight in fewer bits."""

    name: str

    def encode(self, weight: Tensor) -> Codes:
        """Turn a weight of any float dtype, [out, in], into codes on the same device."""
        raise NotImplementedError

    def decode(self, codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Turn codes back into a new tensor of a shape and dtype."""
        raise NotImplementedError


class Int8Rows(Format):
    """One int8 for each number, and one float32 scale for each row."""

    name = "int8"

    def encode(self, weight: Tensor) -> Codes:
        """Turn a weight [R, C] into `codes`, int8 [R, C], and `scales`, float32 [R]."""
        codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        rows = max(AT_ONCE // max(weight.shape[1], 1), 1) if has_values(weight) else max(len(weight), 1)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            wide = weight[part].float()
            scales[part] = wide.abs().amax(1) / 127
            tiny = torch.finfo(torch.float32).tiny  # a row of zeros has scale 0
            codes[part] = (wide / scales[part].clamp_min(tiny)[:, None]).round_().to(torch.int8)
        return {"codes": codes, "scales": scales}

    def decode(self, codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return `codes` times `scales`, rounded once."""
        return codes["codes"].to(dtype).mul_(codes["scales"][:, None])

    def decode_rows(self, codes: Codes, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Decode some rows: a slice of them, or those that a tensor of indices of any shape names."""
        return codes["codes"][rows].to(dtype).mul_(codes["scales"][rows][..., None])


class Nf4(Format):
    """Half a byte for each number, and a scale for 64 of them.

    Args:
        scales: `8bit` stores the scales in 8 bits, `fp32` in 32.

    Raises:
        ImportError: bitsandbytes is not installed.
    """

    name = "nf4"

    def __init__(self, scales: Scales = "8bit") -> None:
        import_bitsandbytes(otherwise="frozen_weights int8, which needs no package")
        self.scales = scales

    def encode(self, weight: Tensor) -> Codes:
        """Turn a weight of n numbers into `codes`, uint8 [n/2, 1], and the scales of ⌈n/64⌉ blocks."""
        codes, largest = encode_nf4(weight)
        if self.scales == "fp32":
            return {"codes": codes, "scales": largest}
        return {"codes": codes, **_encode_scales(largest)}

    def decode(self, codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Look up every code and multiply it by its block's scale."""
        scales = codes["scales"]
        if self.scales == "8bit":
            scales = _decode_scales(scales, codes["scales_of_scales"])
        return decode_nf4(codes["codes"], scales, shape, dtype)


class PerExpert(Format):
    """Experts in one weight, [E, A, B]: each expert's matrix is encoded on its own.

    Args:
        each: the format of a matrix.
    """

    def __init__(self, each: Format) -> None:
        self.each, self.name = each, each.name

    def encode(self, weight: Tensor) -> Codes:
        """Turn a weight into what `each` makes of a matrix, with E in front of every shape."""
        first = self.each.encode(weight[0])
        codes = {name: tensor.new_empty(len(weight), *tensor.shape) for name, tensor in first.items()}
        for expert in range(len(weight) if has_values(weight) else 0):
            for name, tensor in self.each.encode(weight[expert]).items():
                codes[name][expert] = tensor
        return codes

    def decode(self, codes: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Decode the matrices of all experts."""
        experts = range(shape[0])
        return torch.stack([self.decode_expert(codes, expert, shape, dtype) for expert in experts])

    def decode_expert(self, codes: Codes, expert: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Decode the matrix [A, B] of one expert of a weight of this shape."""
        return self.each.decode({name: each[expert] for name, each in codes.items()}, shape[1:], dtype)


def make_format(name: str, *, scales: Scales = "8bit") -> Int8Rows | Nf4:
    """Return the format of a name, `int8` or `nf4`.

    Raises:
        ValueError: there is no such format, or no such way to store scales.
        ImportError: NF4 needs bitsandbytes, which is not installed.
    """
    if scales not in get_args(Scales):
        raise ValueError(f"frozen_scales must be 8bit or fp32, got {scales!r}")
    if name == "int8":
        return Int8Rows()
    if name == "nf4":
        return Nf4(scales)
    raise ValueError(f"frozen_weights must be 'exact', 'int8', 'mixed' or 'nf4', got {name!r}")


def _encode_scales(largest_n: Tensor) -> dict[str, Tensor]:
    """Store float32 scales >= 0 in 8 bits each, and a float32 scale for 256 of them."""
    rest = -len(largest_n) % SCALES_AT_ONCE
    wide = torch.nn.functional.pad(largest_n, (0, rest)).view(-1, SCALES_AT_ONCE)
    step = wide.amax(1) / 255
    codes = (wide / step.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.uint8)
    return {"scales": codes.view(-1)[: len(largest_n)].clone(), "scales_of_scales": step}


def _decode_scales(codes_n: Tensor, step: Tensor) -> Tensor:
    return codes_n.float().mul_(step.repeat_interleave(SCALES_AT_ONCE)[: len(codes_n)])
