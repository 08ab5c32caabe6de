"""LISA as slow and obvious as can be: the twin that `lisatune.LISA(state="reset")` is compared with.

Algorithm 1 of the paper by hand, on a Llama: freeze every block, thaw the drawn ones, build a fresh AdamW
over just what trains, run it for K steps, throw it away.
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
        for index, block in enumerate(model.model.layers):
            for parameter in block.parameters():
                parameter.requires_grad = index in blocks
        active = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(active, lr=lr, weight_decay=weight_decay)
        for _ in range(period):
            if step == steps:
                return
            tiny.backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
