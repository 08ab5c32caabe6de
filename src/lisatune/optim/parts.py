"""Optimizers of torch and of other packages on several ranks: each rank updates its part of every parameter.

The optimizer sees the parts as if they were whole parameters. This is right if its step is elementwise, or
takes each row of a matrix on its own, and `works_on_parts` tries that. State then has the shape of a part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import part_to_update

__all__ = ["on_parts", "works_on_parts"]


def on_parts(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """Return the class of optimizers that are like `kind` and update parts; `kind` itself in one process."""
    base: Any = kind
    return kind if ranks.count() == 1 else _make_class(base)


@cache
def _make_class(kind: Any) -> Callable[..., Optimizer]:
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        plain = kind.step
        if getattr(plain, "hooked", False):  # torch calls the step's hooks around this function already
            plain = plain.__wrapped__
        with _parts_for_params(self):
            return plain(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"step": step})


@contextmanager
def _parts_for_params(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the optimizer's groups and state hold this rank's parts in place of divided parameters."""
    held = [list(group["params"]) for group in optimizer.param_groups]
    parts = {p: part_to_update(p) for params in held for p in params if p.grad is not None}
    for group, params in zip(optimizer.param_groups, held, strict=True):
        group["params"][:] = [parts.get(p, p) for p in params]
    _rename(optimizer, parts)
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"][:] = params
        _rename(optimizer, {part: p for p, part in parts.items()})


def _rename(optimizer: Optimizer, names: dict[Any, Any]) -> None:
    state: dict[Any, Any] = optimizer.state
    for old, new in names.items():
        if old in state:
            state[new] = state.pop(old)


def works_on_parts(build: Callable[[list[tuple[str, nn.Parameter]]], Optimizer]) -> bool:
    """Try whether three steps on small parameters are those of an optimizer for each half of them.

    Args:
        build: makes the optimizer over (name, parameter) pairs.
    """
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):  # also inside a memory plan
        torch.manual_seed(0)
        starts = {"matrix": torch.randn(8, 4), "vector": torch.randn(8)}
        steps = [{name: torch.randn_like(each) for name, each in starts.items()} for _ in range(3)]
        whole = _train(build, starts, steps)
        halves = [
            _train(build, _cut(starts, half), [_cut(gradients, half) for gradients in steps])
            for half in (slice(0, 4), slice(4, 8))
        ]
        return all(
            torch.allclose(whole[name], torch.cat([half[name] for half in halves]), rtol=1e-5, atol=1e-7)
            for name in starts
        )


def _cut(tensors: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _train(
    build: Callable[[list[tuple[str, nn.Parameter]]], Optimizer],
    starts: dict[str, Tensor],
    steps: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    named = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    optimizer = build(list(named.items()))
    for gradients in steps:
        for name, p in named.items():
            p.grad = gradients[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}
