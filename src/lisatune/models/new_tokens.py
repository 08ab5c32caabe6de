"""Tokens that a model does not know yet: added to its tokenizer, and rows for them to its embedding and head.

A new row is the mean of all rows that the tokenizer had before, so that the new token begins as likely as an
average one and does not disturb the others (Hewitt, "Initializing New Word Embeddings for Pretrained Language
Models", 2021, without its noise).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lisatune.distributed.shards import local_part, local_rows, part_of

__all__ = ["add_rows", "add_tokens", "fill_rows", "grow_config"]


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer. Text is never divided inside one of them.

    Raises:
        ValueError: a token is empty or given twice, or the tokenizer has it already.
    """
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not token.strip():
            raise ValueError(f"model.new_tokens: a token must be text, got {token!r}")
        if token in tokens[:number]:
            raise ValueError(f"model.new_tokens names {token!r} twice; leave one out")
        if token in known:
            raise ValueError(
                f"model.new_tokens: the tokenizer has {token!r} already, as number {known[token]}; leave it "
                "out"
            )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )


def grow_config(config: Any, tokenizer: Any) -> None:
    """Let a config ask for as many rows as the tokenizer has tokens, if it asks for fewer."""
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))


@torch.no_grad()
def add_rows(model: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add rows to a loaded model's embedding and head, and fill those of the new tokens with the mean row.

    Some models have more rows than their tokenizer has tokens. The first of these are then used.

    Args:
        model: a transformers model with its weights.
        tokenizer: after `add_tokens`.
        tokens: the new tokens.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fill_rows(model, tokenizer.convert_tokens_to_ids(list(tokens)))


@torch.no_grad()
def fill_rows(model: Any, new: Sequence[int]) -> None:
    """Fill rows of embedding and head with the mean of all rows before the first of them.

    Args:
        model: a transformers model with its weights, which may be divided; then every rank must call it.
        new: numbers of the rows.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights: dict[Tensor, None] = {end.weight: None for end in ends if end is not None}
    for weight in weights:  # tied ones are one
        known, part = local_rows(weight, (0, min(new) - 1)), local_part(weight)
        total_D = part_of(weight).sum(part[known].float().sum(dim=0))
        for row in new:
            part[local_rows(weight, (row, row))] = (total_D / min(new)).to(weight.dtype)
