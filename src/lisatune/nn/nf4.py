"""Frozen linear layers in 4 bits: NF4 (QLoRA, Dettmers et al., arXiv 2305.14314, section 3) by bitsandbytes.

Every 64 weights w share their largest magnitude a, in float32; each is stored as the nearest of the 16
quantiles q of a normal distribution: w ≈ a · q_i, in 4 + 32/64 bits. The layer computes with a copy in the
dtype of its input. The copy is made for the product and again in backward; it is never kept.

Why not `bitsandbytes.nn.Linear4bit`: on a CPU with avx512_bf16, after one forward pass without gradients (an
evaluation), its next training step gets no gradient for the input. This layer does.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lisatune.distributed.shards import is_stand_in, like_shard, local_part, stand_in
from lisatune.nn.layers import find_layers
from lisatune.nn.notices import silence_import_notices

__all__ = [
    "Linear4",
    "check_nf4",
    "decode_nf4",
    "encode_nf4",
    "import_bitsandbytes",
    "note_quantized",
    "quantize_as_noted",
    "quantize_linear_layers",
]

NOTE = "quantized_base.json"


BLOCK = 64
"""Weights that share a scale."""


class Linear4(nn.Linear):
    """A linear layer whose weight is stored in 4 bits, two in a byte, and never trains."""

    absmax: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        codes, absmax = encode_nf4(plain.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)  # no buffer, which FSDP2 does not divide
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer in the dtype of its input, or of autocast."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        out: Tensor = _Product.apply(input.to(dtype), self.weight, self.absmax, self.shape)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(dtype)

    def load(self, weight: Tensor) -> None:
        """Store another weight of the same shape; on several ranks, this rank's part of its codes."""
        mine = self.weight, self.absmax
        for own, whole in zip(mine, encode_nf4(weight.to(self.weight.device)), strict=True):
            local_part(own).copy_(like_shard(whole, own))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that is stored."""
        return self.out_features, self.in_features


class _Product(torch.autograd.Function):
    """x Wᵀ, and in backward the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        ctx.shape = shape
        return linear(x, decode_nf4(codes, absmax, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, absmax = ctx.saved_tensors
        return grads[0] @ decode_nf4(codes, absmax, ctx.shape, grads[0].dtype), None, None, None


def encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store a weight of n numbers as codes, uint8 [⌈n/2⌉, 1], and float32 scales of ⌈n/64⌉ blocks."""
    if is_stand_in(weight):
        blocks = -(-weight.numel() // BLOCK)
        return stand_in((-(-weight.numel() // 2), 1), torch.uint8), stand_in((blocks,), torch.float32)
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes, absmax


def decode_nf4(codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a weight of a shape and dtype out of its codes and scales."""
    # As one row: the CPU kernel of bitsandbytes 0.50 reads wrong scales for rows of 96, 160, … numbers, which
    # are a multiple of 32 and not of 64. Asked for one dimension it returns two, which compiled code refuses.
    one_row = [1, math.prod(shape)]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", one_row, dtype)
    return weight.view(shape)


def quantize_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of the model's blocks, in place.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the blocks have no linear layers.
    """
    import_bitsandbytes()
    blocks = tuple(f"{path}." for path in find_layers(model).blocks)
    modules = model.named_modules()
    plain = [path for path, module in modules if path.startswith(blocks) and type(module) is nn.Linear]
    if not plain:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.Linear in its blocks to store in 4 bits; use method lora"
        )
    for path in plain:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, Linear4(layer))


def note_quantized(model: nn.Module, folder: Path) -> None:
    """Write beside adapters that their model's weights were in 4 bits; PEFT ignores the file."""
    if any(isinstance(module, Linear4) for module in model.modules()):
        (folder / NOTE).write_text('{"linear_layers_of_blocks": "nf4"}\n', encoding="utf-8")


def quantize_as_noted(model: nn.Module, folder: Path) -> None:
    """Store a model's weights in 4 bits if the adapters in `folder` were trained beside 4-bit weights."""
    if (folder / NOTE).is_file():
        quantize_linear_layers(model)


def check_nf4(device: torch.device, *, otherwise: str = "method lora") -> None:
    """Store a few numbers in 4 bits on the device and read them.

    Args:
        device: where they are stored.
        otherwise: what the error advises to use instead.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: 4-bit weights do not work on the device.
    """
    import_bitsandbytes(otherwise=otherwise)
    try:
        layer = Linear4(nn.Linear(BLOCK, 2, bias=False, device=device))
        layer(torch.ones(1, BLOCK, device=device))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"4-bit weights do not work on {device} with this bitsandbytes ({reason}); use {otherwise}"
        ) from error


def import_bitsandbytes(*, otherwise: str = "method lora") -> None:
    """Import bitsandbytes, or raise ImportError with the line that installs it."""
    silence_import_notices()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'4-bit weights need bitsandbytes: pip install "lisatune[train,qlora]", or use {otherwise}'
        ) from error
