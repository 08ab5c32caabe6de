"""How good the model is now: loss on held-out text, and what it answers."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisatune.data.chat import prompt_ids
from lisatune.distributed import ranks
from lisatune.distributed.shards import reshard
from lisatune.losses.causal_lm import CausalLMLoss, evaluation_mode

__all__ = ["HeldOut", "generate_answers", "held_out_loss"]


@dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation."""

    loss: float
    """Mean loss of a token in nats; every token counts the same, whichever batch it was in."""

    num_tokens: int
    """Tokens that carried loss."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def held_out_loss(
    loss_fn: CausalLMLoss,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> HeldOut:
    """Mean loss over all tokens of `batches`, of all ranks, without dropout. Training flags are given back.

    Args:
        loss_fn: holds the model, which is on `device`.
        batches: what `loss_fn` takes, on any device.
        device: where the model is.
        autocast: dtype of matrix products, such as torch.bfloat16; None computes in the weights' dtype.

    Raises:
        ValueError: no token in `batches` carries loss.
    """
    total, num_tokens = 0.0, 0
    device = torch.device(device)
    with (
        torch.no_grad(),
        evaluation_mode(loss_fn.model),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        for batch in batches:
            loss_sum, count = loss_fn({name: tensor.to(device) for name, tensor in batch.items()})
            total += loss_sum.item()
            num_tokens += int(count)
    reshard(loss_fn.model)
    total, all_tokens = ranks.sum_over_ranks(total, num_tokens)
    num_tokens = int(all_tokens)
    if num_tokens == 0:
        raise ValueError(
            "no token of the held-out data carries loss; give it more rows or a larger max_length"
        )
    return HeldOut(total / num_tokens, num_tokens)


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]], *, max_new_tokens: int
) -> list[str]:
    """Answer each prompt greedily, up to the end token or `max_new_tokens`.

    A repetition penalty in the model's generation config stays in force.

    Args:
        model: a `transformers` causal language model. Training flags are given back.
        tokenizer: its tokenizer.
        prompts: plain text to go on from, or messages (`role`, `content`) for the chat template.
        max_new_tokens: longest answer, >= 1.

    Returns:
        The new text of each, without prompt and special tokens.
    """
    from transformers import GenerationConfig

    ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)} - {None}
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    with torch.no_grad(), evaluation_mode(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT's, of virtual tokens
        for prompt in prompts:
            ids = prompt_ids(tokenizer, prompt)
            prompt_BT = torch.tensor([ids], device=model.device)
            out_BT = model.generate(
                prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=greedy
            )
            answers.append(tokenizer.decode(out_BT[0, len(ids) :], skip_special_tokens=True))
    reshard(model)
    return answers


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
