"""LISA as slow and obvious as can be, on a Llama: twins that `lisatune.LISA` is compared with.

`train_reference` is Algorithm 1 of the paper by hand, and `state="reset"` here: freeze every block, thaw the
drawn ones, build a fresh AdamW over just what trains, run it for K steps, throw it away.

`train_by_flags` is LISA as callbacks of trainers have it, and `state="keep"` here: one AdamW over all, and
nothing but `requires_grad` changes at a draw.
"""

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM

import tiny


def train_reference(
    model: LlamaForCausalLM,
    drawn: Sequence[Sequence[int]],
    *,
    period: int,
    steps: int,
    lr: float,
    weight_decay: float,
) -> None:
    """Train for `steps`; `drawn` holds the blocks of each period."""
    step = 0
    for blocks in drawn:
        for parameter in model.parameters():
            parameter.requires_grad = True
        _set_flags(model, blocks)
        active = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(active, lr=lr, weight_decay=weight_decay)
        for _ in range(period):
            if step == steps:
                return
            tiny.backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def train_by_flags(
    model: LlamaForCausalLM,
    drawn: Sequence[Sequence[int]],
    *,
    period: int,
    steps: int,
    lr: float,
    weight_decay: float,
) -> None:
    """Train for `steps`; `drawn` holds the blocks of each period."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        if step % period == 0:
            _set_flags(model, drawn[step // period])
        tiny.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def _set_flags(model: LlamaForCausalLM, blocks: Sequence[int]) -> None:
    for index, block in enumerate(model.model.layers):
        for parameter in block.parameters():
            parameter.requires_grad = index in blocks
