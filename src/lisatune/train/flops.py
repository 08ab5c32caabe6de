r"""FLOPs that a step needs, and which share of a card's peak they are: model FLOPs utilisation, MFU.

T tokens in sequences of L_1, L_2, … tokens; W the matrices through which every token goes, with those of
the head; A attention heads of d numbers in each of the blocks.

    forward           Σ_W 2·T·|W| + Σ_blocks 2·A·d·Σ_i L_i²     half of the scores: they are causal
    input gradients   the same with twice the attention, from the loss to the lowest layer that trains
    weight gradients  2·T·|W| of every W that trains

Recomputation (activation checkpointing) is no need, so it does not count, and frozen layers have no third
part: a method is not made to look fast by work that it saves. MFU is these FLOPs over the time of the whole
step, its data and optimizer included, and the card's peak (Chowdhery et al., arXiv 2204.02311, appendix B).
The peak is that of dense bf16 products in the card's data sheet, whatever dtype a run has.

Of a mixture of experts the experts count that a token is sent to.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lisatune.nn.coded import CodedLinear, own_parameter
from lisatune.nn.layers import LayerMap

__all__ = ["needed_flops", "peak_flops", "step_flops", "utilization"]

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOP/s of dense bf16 products with sums in float32, from NVIDIA's data sheets, by a part of a card's name.

The first entry that is a part of the name counts: "H100 PCIe" before "H100".
"""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names that configs give to the number of experts in a layer."""


def needed_flops(model: Any, layers: LayerMap, lengths: Sequence[int]) -> int | None:
    """Count the FLOPs that a step needs, with the parameters that train now.

    Args:
        model: a causal language model with a transformers config, as it trains: adapters in it.
        layers: its blocks and ends.
        lengths: tokens of each sequence of the step; of a packed row those of its documents.

    Returns:
        FLOPs, a multiplication and an addition being two; None if they cannot be told, because the config
        names no attention heads, or not how many of a layer's experts a token goes through.
    """
    config, output = model.config.get_text_config(), model.get_output_embeddings()
    heads, tokens = getattr(config, "num_attention_heads", None), sum(lengths)
    if not isinstance(heads, int):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * heads * head_size * sum(length**2 for length in lengths)
    experts = next((getattr(config, name) for name in EXPERTS if getattr(config, name, None)), 0)
    used = getattr(config, "num_experts_per_tok", None)
    embedding: Tensor = model.get_input_embeddings().weight
    passes, flops = bool(embedding.requires_grad), 0
    for name in layers.blocks:
        every = trained = 0
        for parameter in model.get_submodule(name).parameters():
            if parameter.ndim == 3 and not (experts and used):
                return None
            share = used / experts if parameter.ndim == 3 and experts and used else 1
            size = int(share * parameter.numel()) if parameter.ndim in (2, 3) else 0
            every, trained = every + size, trained + size * parameter.requires_grad
        passes = passes or trained > 0
        flops += (2 * tokens * every + attention) + 2 * tokens * trained
        flops += passes * (2 * tokens * every + 2 * attention)
    if output is None:  # a reward model's score, of one token in each sequence
        return flops
    head: Tensor = own_parameter(output) if isinstance(output, CodedLinear) else output.weight
    return flops + 2 * tokens * head.numel() * (1 + passes + head.requires_grad)


def step_flops(
    model: Any, layers: LayerMap, batches: Iterable[Iterable[Mapping[str, Any]]], device: torch.device
) -> int | None:
    """Count the FLOPs that a step on batches of rows needs; None also on a device whose peak is not known."""
    if peak_flops(device) is None:
        return None
    lengths: list[int] = []
    for row in chain.from_iterable(batches):
        lengths += row["seq_lengths"] if "seq_lengths" in row else [len(row["input_ids"])]
    return needed_flops(model, layers, lengths)


def peak_flops(device: torch.device) -> float | None:
    """Return a card's peak in FLOP/s of dense bf16 products; None for a card that is not in the table."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def utilization(
    flops: int | None, seconds: float, device: torch.device, *, ranks: int = 1
) -> dict[str, float]:
    """Return `mfu`, the share of the peak of `ranks` equal cards; nothing where it cannot be told.

    Args:
        flops: what the step needs, on all ranks together.
        seconds: time of the step.
        device: the card.
        ranks: number of cards.
    """
    peak = peak_flops(device)
    return {} if peak is None or flops is None else {"mfu": flops / (seconds * peak * ranks)}
