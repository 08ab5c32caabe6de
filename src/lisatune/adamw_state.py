"""What AdamW keeps for a parameter: names, shapes, dtypes and places (see `lisatune.adamw`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisatune import codecs
from lisatune.codecs import BLOCK

__all__ = [
    "CHUNKED",
    "MOMENTS",
    "ROUNDINGS",
    "Home",
    "home_of",
    "is_host_state",
    "layout_of",
    "low_rank_shape",
    "prepare",
    "read_moments",
    "write_moments",
]

ROUNDINGS = ("exact", "stochastic", "nearest")
MOMENTS = ("fp32", "bf16", "8bit", "factored")
SMALLEST_8BIT = 4096
"""Parameters of fewer elements keep float32 moments under `8bit`, as in bitsandbytes and torchao."""

CHUNKED = frozenset(
    ("exp_avg", "exp_avg_sq", "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scales", "exp_avg_sq_scales")
) | {"remainder"}
"""State that is read and written chunk by chunk, and that may live in host memory."""


def layout_of(group: dict[str, Any], p: Tensor) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    """Shape and dtype of everything that a parameter's state holds."""
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    layout: dict[str, tuple[Sequence[int], torch.dtype]] = {"step": ((), torch.float32)}
    moments = group["moments"]
    if "rank" in group:  # of projected gradients, see `lisatune.galore`
        plain = {name: value for name, value in group.items() if name != "rank"}
        small = torch.empty(low_rank_shape(group, p), dtype=wide, device="meta")
        layout |= layout_of(plain, small) | {"basis": ((min(p.shape), group["rank"]), wide)}
    elif moments == "factored" and p.ndim >= 2:
        layout["exp_avg_sq_rows"] = (p.shape[:1], wide)
        layout["exp_avg_sq_columns"] = ((p[0].numel() if len(p) else 0,), wide)
    elif moments == "factored":
        layout["exp_avg_sq"] = (p.shape, wide)
    elif moments == "8bit" and p.numel() >= SMALLEST_8BIT:
        for name in ("exp_avg", "exp_avg_sq"):
            layout[f"{name}_codes"] = (p.shape, torch.uint8)
            layout[f"{name}_scales"] = ((-(-p.numel() // BLOCK),), torch.float32)
    else:
        dtype = torch.bfloat16 if moments == "bf16" else wide
        layout |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (p.shape, dtype))
    if p.dtype == torch.bfloat16 and group["rounding"] == "exact":
        layout["remainder"] = (p.shape, torch.int16)
    return layout


def low_rank_shape(group: dict[str, Any], p: Tensor) -> tuple[int, int]:
    """Shape of a matrix's projected gradient: its smaller side becomes the group's rank."""
    m, n = p.shape
    return (m, group["rank"]) if m >= n else (group["rank"], n)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a param group's option out of range, ImportError for a missing package."""
    for name, allowed in (("rounding", ROUNDINGS), ("moments", MOMENTS), ("state_device", (None, "cpu"))):
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {group[name]!r}")
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(group[name], Tensor) and not group[name] >= 0:
            raise ValueError(f"{name} must be >= 0, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    if group["moments"] == "8bit":
        codecs.check_8bit()  # a missing package shows now, not at the first step


@dataclass(frozen=True)
class Home:
    """Where a piece of state lives."""

    device: torch.device
    is_pinned: bool

    def take(self, value: Tensor) -> Tensor:
        """Bring a tensor here."""
        here = value.to(self.device)
        return here.pin_memory() if self.is_pinned else here


def is_host_state(group: dict[str, Any], key: str) -> bool:
    """Whether a piece of a parameter's state is kept in host memory, by its group's options."""
    is_host = group["state_device"] == "cpu" and key in CHUNKED
    return is_host and (key == "remainder" or group["moments"] != "factored")


def home_of(group: dict[str, Any], p: Tensor, key: str) -> Home:
    """Tell where a piece of a parameter's state lives: beside the weight, or in host memory."""
    is_host = is_host_state(group, key)
    device = torch.device("cpu") if is_host else p.device
    return Home(device, is_pinned=is_host and p.device.type == "cuda")


def prepare(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    """Refuse what can't be updated, and start state that is missing."""
    assert p.grad is not None
    if p.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"lisatune.AdamW updates weights of bfloat16, float32 and float64, got {p.dtype}; "
            "load the model in one of these"
        )
    if p.grad.is_sparse:
        raise ValueError("lisatune.AdamW takes dense gradients; build the embedding with sparse=False")
    for key, (shape, dtype) in layout_of(group, p).items():
        if key not in state:
            home = home_of(group, p, key)
            state[key] = torch.zeros(shape, dtype=dtype, device=home.device, pin_memory=home.is_pinned)


def read_moments(chunk: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both moments of a chunk in `dtype`; where they are stored in it, the stored ones."""
    if "exp_avg_codes" in chunk:
        exp_avg = codecs.dequantize(chunk["exp_avg_codes"], chunk["exp_avg_scales"], signed=True)
        exp_avg_sq = codecs.dequantize(chunk["exp_avg_sq_codes"], chunk["exp_avg_sq_scales"], signed=False)
        return exp_avg.to(dtype), exp_avg_sq.to(dtype)
    return chunk["exp_avg"].to(dtype), chunk["exp_avg_sq"].to(dtype)


def write_moments(
    chunk: dict[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, noise: Tensor | None
) -> None:
    """Store what `read_moments` returned, after it was updated; uses the upper half of `noise`."""
    if "exp_avg_codes" in chunk:
        codecs.quantize(exp_avg.float(), chunk["exp_avg_codes"], chunk["exp_avg_scales"], signed=True)
        codecs.quantize(
            exp_avg_sq.float(), chunk["exp_avg_sq_codes"], chunk["exp_avg_sq_scales"], signed=False
        )
    elif chunk["exp_avg"].dtype == torch.bfloat16:
        assert noise is not None
        chunk["exp_avg"].copy_(exp_avg)
        codecs.round_stochastically(exp_avg_sq.float(), chunk["exp_avg_sq"], noise >> 16)
