"""Tiny models made from configs, and a plain training loop over made-up tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune.nn.coded import exact_parameters

VOCABULARY = 128


def llama(*, tied: bool = False, blocks: int = 6, hidden: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """Build a Llama whose weights depend on `seed` alone."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tokens(step: int, *, batch_size: int = 2, length: int = 8) -> Tensor:
    """Make the token ids [B, T] of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (batch_size, length), generator=generator)


def backward(model: nn.Module, step: int) -> None:
    """Run forward and backward on the step's tokens."""
    ids = tokens(step)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range | int,
    *,
    after: Callable[[int], Any] = lambda step: None,
) -> None:
    """Train for `steps` in a plain loop; `after` is called with the number of steps done."""
    for step in range(steps) if isinstance(steps, int) else steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after(step + 1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters by name; of coded ones the exact weights."""
    return {name: parameter.detach().clone() for name, parameter in exact_parameters(model).items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Name the parameters that are not bit-identical to what they were."""
    return {name for name, p in exact_parameters(model).items() if not torch.equal(p.detach(), before[name])}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    """Compare two models bit for bit."""
    different = moved(weights(other), model)
    assert not different, f"differ: {sorted(different)}"
