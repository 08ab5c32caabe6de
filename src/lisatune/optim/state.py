"""AdamW's state of a parameter: names, shapes, dtypes and devices; and torch's kernel that updates it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lisatune.optim import codecs
from lisatune.optim.codecs import BLOCK
from lisatune.optim.group import Group, Moments, Rounding, StateDevice
from lisatune.optim.rows import make_table, table_layout

__all__ = [
    "CHUNKED",
    "Home",
    "check_group",
    "fused_adamw",
    "home_of",
    "is_host_state",
    "layout_of",
    "low_rank_shape",
    "prepare",
    "read_moments",
    "unprojected",
    "write_moments",
]

SMALLEST_8BIT = 4096
"""Parameters of fewer elements keep float32 moments under `8bit`, as in bitsandbytes and torchao."""


CHUNKED = frozenset(
    ("exp_avg", "exp_avg_sq", "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scales", "exp_avg_sq_scales")
) | {"remainder"}
"""State that is read and written chunk by chunk, and that may live in host memory."""


def layout_of(
    group: Group, p: Tensor, size: int | None = None
) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    """Return shape and dtype of each tensor in a parameter's state; for rows, of the table at its longest.

    `size`: elements of the whole parameter, if `p` is this rank's part of it.
    """
    if group["rows"]:
        return dict(table_layout(p, len(p)))
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    layout: dict[str, tuple[Sequence[int], torch.dtype]] = {"step": ((), torch.float32)}
    moments = group["moments"]
    if "rank" in group:  # of projected gradients, see `lisatune.optim.galore`
        small = torch.empty(low_rank_shape(group, p), dtype=wide, device="meta")
        layout |= layout_of(unprojected(group), small) | {"basis": ((min(p.shape), group["rank"]), wide)}
    elif moments == "factored" and p.ndim >= 2:
        layout["exp_avg_sq_rows"] = (p.shape[:1], wide)
        layout["exp_avg_sq_columns"] = ((p.shape[1:].numel(),), wide)
    elif moments == "factored":
        layout["exp_avg_sq"] = (p.shape, wide)
    elif moments == "8bit" and (p.numel() if size is None else size) >= SMALLEST_8BIT:
        for name in ("exp_avg", "exp_avg_sq"):
            layout[f"{name}_codes"] = (p.shape, torch.uint8)
            layout[f"{name}_scales"] = ((-(-p.numel() // BLOCK),), torch.float32)
    else:
        dtype = torch.bfloat16 if moments == "bf16" else wide
        layout |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (p.shape, dtype))
    if p.dtype == torch.bfloat16 and group["rounding"] == "exact":
        layout["remainder"] = (p.shape, torch.int16)
    return layout


def unprojected(group: Group) -> Group:
    """Return the options that hold for a projected gradient: those of a group without projection."""
    plain = group.copy()
    del plain["rank"]
    return plain


def low_rank_shape(group: Group, p: Tensor) -> tuple[int, int]:
    """Return the shape of a matrix's projected gradient: the group's rank replaces its smaller side."""
    m, n = p.shape
    return (m, group["rank"]) if m >= n else (group["rank"], n)


def check_group(group: Group) -> None:
    """Raise ValueError for a param group's option out of range, ImportError for a missing package."""
    options: Mapping[str, Any] = group
    for name, allowed in (
        ("rounding", get_args(Rounding)),
        ("moments", get_args(Moments)),
        ("state_device", (None, *get_args(StateDevice))),
    ):
        if options[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {options[name]!r}")
    for name in ("amsgrad", "maximize"):
        if options.get(name):
            raise ValueError(f"lisatune.AdamW has no {name}; leave it out, or use torch.optim.AdamW")
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got {list(value.shape)}")
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    if group["moments"] == "8bit":
        codecs.check_8bit()  # a missing package shows now, not at the first step
    if group["rows"]:
        _check_rows(group)
    if "rank" in group:
        _check_projection(group)


def _check_projection(group: Group) -> None:
    """Refuse a rank that does not fit between 0 and both sides of the matrices, and a gap below 1."""
    for name in ("rank", "gap"):
        value: Any = group.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of a group whose gradients are projected must be >= 1, got {value}")
    for p in group["params"]:
        if p.ndim != 2 or min(p.shape) <= group["rank"]:
            raise ValueError(
                f"gradients are projected to rank {group['rank']} of matrices with both sides larger, got a "
                f"parameter of {list(p.shape)}; put it into a group without rank"
            )


def _check_rows(group: Group) -> None:
    """Refuse all but float32 moments beside the weight; a remainder would be as large as the weight."""
    options: Mapping[str, Any] = group
    for name, allowed in (("moments", "fp32"), ("state_device", None)):
        if options[name] != allowed:
            raise ValueError(f"a param group with rows: True has {name} {allowed}, got {options[name]!r}")
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(f"rows: True is for weights of nn.Embedding [V, D], got one of {list(p.shape)}")
        if p.dtype == torch.bfloat16 and group["rounding"] == "exact":
            raise ValueError(
                "rows: True cannot round bf16 weights exactly, because the remainder would be as large as "
                "the weight; set the group's rounding to stochastic"
            )


@dataclass(frozen=True)
class Home:
    """Place of one tensor of a state: its device, and whether its memory is pinned."""

    device: torch.device
    is_pinned: bool

    def take(self, value: Tensor) -> Tensor:
        """Move a tensor to this place."""
        here = value.to(self.device)
        return here.pin_memory() if self.is_pinned else here


def is_host_state(group: Group, key: str) -> bool:
    """Whether a piece of a parameter's state is kept in host memory, by its group's options."""
    is_host = group["state_device"] == "cpu" and key in CHUNKED
    return is_host and (key == "remainder" or group["moments"] != "factored")


def home_of(group: Group, p: Tensor, key: str) -> Home:
    """Return the place of one tensor of a parameter's state: beside the weight, or in host memory."""
    is_host = is_host_state(group, key)
    device = torch.device("cpu") if is_host else p.device
    return Home(device, is_pinned=is_host and p.device.type == "cuda")


def prepare(
    group: Group, p: Tensor, state: dict[str, Any], *, size: int | None = None, ids: int | None = None
) -> None:
    """Refuse a parameter that cannot be updated, and create its missing state.

    `size`: as in `layout_of`. `ids`: number of token ids in the step, before equal ones were merged.
    """
    assert p.grad is not None
    if p.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"lisatune.AdamW updates weights of bfloat16, float32 and float64, got {p.dtype}; "
            "load the model in one of these"
        )
    if p.grad.is_sparse and not group["rows"]:
        raise ValueError(
            "lisatune.AdamW takes a sparse gradient only in a param group with rows: True; build the "
            "embedding with sparse=False"
        )
    if group["rows"]:
        if not p.grad.is_sparse:
            raise ValueError(
                "a param group with rows: True takes sparse gradients, and got a dense one; build the "
                'embedding with sparse=True, or attach LISA with ends="rows", and use its weight nowhere else'
            )
        make_table(p, state, max(ids or 0, p.grad._nnz()))
        return
    for key, (shape, dtype) in layout_of(group, p, size).items():
        if key not in state:
            home = home_of(group, p, key)
            state[key] = torch.zeros(shape, dtype=dtype, device=home.device, pin_memory=home.is_pinned)


def read_moments(chunk: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both moments of a chunk in `dtype`: the stored tensors themselves if they have that dtype."""
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


def fused_adamw(
    group: Group,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Run torch's kernel. Gradient and moments have their weight's dtype; `steps` are counted up already."""
    for kind in dict.fromkeys((weight.device, weight.dtype) for weight in weights):
        mine = [i for i, weight in enumerate(weights) if (weight.device, weight.dtype) == kind]
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            lr = lr.to(kind[0], non_blocking=True)
        torch._fused_adamw_(
            [weights[i] for i in mine],
            [gradient for i in mine if (gradient := gradients[i]) is not None],
            [exp_avgs[i] for i in mine],
            [exp_avg_sqs[i] for i in mine],
            [],
            [steps[i] for i in mine],
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
