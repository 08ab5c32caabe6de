"""Measure how good a model is: its loss on held-out data, and its answers to prompts."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lisatune.data.chat import encode_prompt
from lisatune.distributed import ranks
from lisatune.distributed.shards import reshard
from lisatune.losses.base import Loss
from lisatune.losses.causal_lm import evaluation_mode
from lisatune.nn.hidden import max_positions

__all__ = ["HeldOut", "generate_answers", "held_out_loss", "make_generation_config"]


@dataclass(frozen=True)
class HeldOut:
    """The result of an evaluation."""

    loss: float
    """Mean loss of a token (or a pair) in nats. Each counts the same, whatever batch it was in."""

    num_tokens: int
    """Number of tokens that carried loss; of a loss of pairs, number of pairs."""

    more: dict[str, float] = field(default_factory=dict)
    """Further means of a loss of pairs: `accuracy`, the share of pairs ordered rightly, and `margin`."""


def held_out_loss(
    loss_fn: Loss,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    device: torch.device | str,
    autocast: torch.dtype | None = None,
) -> HeldOut:
    """Compute the mean loss over all tokens, or pairs, of `batches`, without dropout and without gradients.

    On several ranks every rank must call it with its own batches, and all get the mean over all of them. The
    model's training flags are restored at the end.

    Args:
        loss_fn: the loss with its model, which is on `device`.
        batches: batches from `data.tokens.collate`, on any device: `input_ids`, `labels` (-100 where there is
            no loss) and `position_ids`, int64 of shape [B, T].
        device: the model's device.
        autocast: dtype of matrix products, such as torch.bfloat16; None computes in the weights' dtype.

    Returns:
        Loss in nats per token, and the number of tokens that carried loss.

    Raises:
        ValueError: no token in `batches` carries loss.

    Example:
        >>> result = held_out_loss(CausalLMLoss(model), [collate(rows)], device="cpu")
        >>> result.loss, result.num_tokens
    """
    total, num_tokens = 0.0, 0
    more: dict[str, float] = {}
    device = torch.device(device)
    with (
        torch.no_grad(),
        evaluation_mode(loss_fn.model),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            loss_sum, count, others = loss_fn.evaluate(on_device)
            total += loss_sum.item()
            num_tokens += int(count)
            more = {name: more.get(name, 0.0) + float(value) for name, value in others.items()}
    reshard(loss_fn.model)
    total, all_tokens, *sums = ranks.sum_over_ranks(total, num_tokens, *more.values())
    num_tokens = int(all_tokens)
    if num_tokens == 0:
        raise ValueError(
            "no token of the held-out data carries loss; give it more rows or a larger max_length"
        )
    return HeldOut(
        total / num_tokens,
        num_tokens,
        {name: value / num_tokens for name, value in zip(more, sums, strict=True)},
    )


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    date: str | None = None,
    batch: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: Callable[[str], None] | None = None,
) -> list[str]:
    """Answer each prompt, up to the end-of-sequence token or `max_new_tokens` tokens; greedily by default.

    A repetition penalty in the model's generation config stays in force. The model's training flags are
    restored at the end.

    Args:
        model: a transformers causal language model, on any device.
        tokenizer: its tokenizer.
        prompts: plain texts to continue, or lists of messages (`role`, `content`) for the chat template.
        max_new_tokens: length of the longest answer in tokens, >= 1. An answer also ends where the model can
            read no more.
        date: the day that the chat template sees as today, YYYY-MM-DD. Default: today.
        batch: prompts that are answered at once, >= 1; the shorter ones are padded on the left. The answers
            are those of `batch=1` up to rounding, unless a prompt of the batch nearly fills the model.
        temperature: 0 takes the most likely token each time, > 0 draws tokens at that temperature.
        top_p: draw among the most likely tokens that together have this probability, in (0, 1].
        stream: called with each new piece of text as it is generated; with a batch of 1 only.

    Returns:
        The new text for each prompt, without the prompt and without special tokens.

    Raises:
        ValueError: the chat template refuses a prompt, or a prompt is longer than the model reads.

    Example:
        >>> question = [{"role": "user", "content": "What is the capital of France?"}]
        >>> generate_answers(model, tokenizer, [question, "Once upon a time"], max_new_tokens=32)
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else None
    config = make_generation_config(model, tokenizer, max_new_tokens, sampling)
    answers, limit = [], max_positions(model)
    streamer = None if stream is None else _streamer(tokenizer, stream)
    encoded = [encode_prompt(tokenizer, prompt, date=date) for prompt in prompts]
    with torch.no_grad(), evaluation_mode(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT's, of virtual tokens
        for start in range(0, len(encoded), batch):
            rows = encoded[start : start + batch]
            longest = max(map(len, rows))
            if limit is not None:
                if longest >= limit:
                    raise ValueError(f"a prompt has {longest} tokens and the model reads at most {limit}")
                config.max_new_tokens = min(max_new_tokens, limit - longest)
            padding = [[0] * (longest - len(ids)) for ids in rows]
            prompt_BT = torch.tensor(
                [[tokenizer.pad_token_id] * len(pad) + ids for pad, ids in zip(padding, rows, strict=True)],
                device=model.device,
            )
            mask_BT = torch.tensor(
                [pad + [1] * len(ids) for pad, ids in zip(padding, rows, strict=True)], device=model.device
            )
            out_BT = model.generate(
                prompt_BT, attention_mask=mask_BT, generation_config=config, streamer=streamer
            )
            answers += tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
    reshard(model)
    return answers


def make_generation_config(
    model: Any, tokenizer: Any, max_new_tokens: int, sampling: Mapping[str, float] | None
) -> Any:
    """Make transformers' config of an answer that ends with the tokenizer's or the model's own end of text.

    Args:
        model, tokenizer, max_new_tokens: as in `generate_answers`.
        sampling: temperature, top_p and top_k; None decodes greedily.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        **(sampling or {}),
        do_sample=sampling is not None,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    """Make transformers' streamer, which waits for the end of a word, call a function."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: stream(text)
    return streamer
