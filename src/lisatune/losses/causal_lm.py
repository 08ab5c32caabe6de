"""Next-token loss without the full logits.

For hidden states h_t, head W and labels y (-100 where no loss), position t predicts label t + 1:

    loss = sum over t with y_{t+1} != -100 of  -log softmax(W h_t)[y_{t+1}]

Positions without loss never reach the head. A head that is a plain `nn.Linear` without bias goes through
`cross_entropy.py`. Any other head (with a bias, hooks, adapters or quantised weights) is called on 128
tokens at a time, each chunk under `torch.utils.checkpoint`, so its logits exist for one chunk at a time.

Shapes: B = sequences, T = tokens, H = hidden size, V = vocabulary, N = positions with loss, C = chunk.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lisatune.distributed.shards import has_values, local_part, reshard
from lisatune.losses.base import Loss, Sums, as_forward
from lisatune.losses.cross_entropy import linear_cross_entropy
from lisatune.nn.coded import CodedLinear, exact_parameters, own_parameter
from lisatune.nn.hidden import hidden_states, logits, num_virtual_tokens, unwrap_adapters

__all__ = ["IGNORE", "CausalLMLoss", "chunked_cross_entropy", "evaluation_mode"]

IGNORE = -100
"""Label of a position that carries no loss."""


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference, relative to the largest logit, that rounding explains. A missing scale is far above."""


PROBE = 16
"""Tokens of a document that is packed to see whether documents see each other."""


SCALE_KEYS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config keys that scale logits. Some models multiply, others divide: the comparison tells which."""


def chunked_cross_entropy(
    hidden_BTD: Tensor,
    head: Callable[[Tensor], Tensor],
    labels_BT: Tensor,
    *,
    chunk_size: int = 128,
    transform: Callable[[Tensor], Tensor] | None = None,
    is_shifted: bool = False,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum the next-token losses of a batch, in float32 (float64 for float64).

    Args:
        hidden_BTD: input of the head, [B, T, H], any float dtype.
        head: maps [C, H] to logits [C, V].
        labels_BT: token ids, [B, T]; -100 carries no loss. Position t is scored on label t + 1.
        chunk_size: C, positions whose logits exist at once, >= 1.
        transform: elementwise change that the model makes to its logits, such as scaling or soft-capping.
        is_shifted: True scores position t on label t instead.
        by_row: True sums each row on its own.

    Returns:
        Loss sum (scalar, or [B] with `by_row`) and number of positions with loss (int64 scalar). With no such
        position the sum is a zero whose gradients are zeros.
    """
    target_BT = labels_BT if is_shifted else labels_BT[:, 1:]
    hidden_BTD = hidden_BTD[:, : target_BT.shape[1]]
    has_loss_BT = target_BT != IGNORE
    num_tokens = has_loss_BT.sum()
    # Waits for the device once per call: N must be known.
    hidden_ND, target_N = hidden_BTD[has_loss_BT], target_BT[has_loss_BT]
    how: dict[str, Any] = {"chunk_size": chunk_size, "transform": transform, "each": by_row}
    if _is_plain(head):
        read_rows = head.make_reader() if isinstance(head, CodedLinear) else None
        losses = linear_cross_entropy(hidden_ND, own_parameter(head), target_N, read_rows=read_rows, **how)
    else:
        losses = _recomputed_cross_entropy(hidden_ND, head, target_N, **how)
    return (_sum_rows(losses, has_loss_BT) if by_row else losses), num_tokens


def _recomputed_cross_entropy(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    target_N: Tensor,
    *,
    chunk_size: int,
    transform: Callable[[Tensor], Tensor] | None,
    each: bool,
) -> Tensor:
    """Do what `linear_cross_entropy` does, for any head: its logits are computed again in backward."""

    def chunk_loss(hidden_CD: Tensor, target_C: Tensor) -> Tensor:
        logits_CV = head(hidden_CD)
        if transform is not None:
            logits_CV = transform(logits_CV)
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        return cross_entropy(logits_CV.to(wide), target_C, reduction="none" if each else "sum")

    chunks: list[Tensor] = []
    for start in range(0, max(len(target_N), 1), chunk_size):  # one empty chunk if no position has loss
        chunk = hidden_ND[start : start + chunk_size], target_N[start : start + chunk_size]
        if torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(chunk_loss(*chunk))
    return torch.cat(chunks) if each else sum(chunks, torch.zeros((), device=hidden_ND.device))


def _sum_rows(losses_N: Tensor, has_loss_BT: Tensor) -> Tensor:
    """Sum the losses of each row, [B]."""
    losses_BT = losses_N.new_zeros(has_loss_BT.shape)
    losses_BT[has_loss_BT] = losses_N
    return losses_BT.sum(dim=1)


def _is_plain(head: Any) -> TypeGuard[nn.Linear]:
    """Whether calling the head is a product with its weight and nothing else."""
    return (
        type(head) in (nn.Linear, CodedLinear)
        and head.bias is None
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks)
        and not (head._backward_hooks or head._backward_pre_hooks)
        and (_is_plain_parameter(own_parameter(head)) or not has_values(own_parameter(head)))
    )


def _is_plain_parameter(weight: Tensor) -> bool:
    """Whether a weight is neither quantised nor divided among ranks, since both kinds are subclasses."""
    return type(weight) is nn.Parameter and type(weight.data) is Tensor


class CausalLMLoss(Loss):
    """Next-token loss of a Hugging Face causal language model, without its full logits.

    The decoder computes hidden states and the head is applied in chunks. The result must equal the model's
    own logits; that is proven here on a few tokens. A model that changes its logits in any other way uses its
    own forward with full logits instead, and a warning says so.

    `use_cache=False` and the batch's position_ids are always passed, an attention_mask never: sequences are
    padded on the right, where a causal model does not look, and packed documents are told apart by
    position_ids that start again at 0. The auxiliary loss of mixture-of-experts routers is not part of this
    loss.

    Of a model that FSDP2 has divided, a call is the forward pass: every rank must make this object, and call
    it.

    Args:
        model: a `transformers` causal language model on its device. It is called twice; without weights (on
            the meta device) it is not called, and its config is trusted.
        chunk_size: positions whose logits exist at once.
        on_obstacle: if the model needs its full logits, "warn" uses them and warns, "raise" raises.

    Attributes:
        is_chunked: False if the model needs its full logits.
        watch: if set, each call also calls it with the batch and the loss sum of each row, [B].
        transform: elementwise change that the model makes to its head's output; None if it makes none.

    Raises:
        ValueError: the model computes NaN, or needs its full logits and `on_obstacle` is "raise".

    Example:
        >>> loss = CausalLMLoss(model)
        >>> loss_sum, num_tokens = loss(batch)
        >>> (loss_sum / num_tokens).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_size: int = 128,
        on_obstacle: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__(model)
        self.watch: Callable[[Mapping[str, Tensor], Tensor], None] | None = None
        self.chunk_size = chunk_size
        self.transform: Callable[[Tensor], Tensor] | None = None
        obstacle = self._find_transform()
        self.is_chunked = obstacle is None
        if obstacle is not None and on_obstacle == "raise":
            raise ValueError(f"{type(model).__name__} needs its full logits: {obstacle}")
        if obstacle is not None:
            warnings.warn(
                f"the loss of {type(model).__name__} uses full logits, which takes more memory: {obstacle}",
                stacklevel=2,
            )
        if getattr(model.config, "output_router_logits", False):
            warnings.warn(
                f"the router's auxiliary loss of {type(model).__name__} is left out of the loss",
                stacklevel=2,
            )
        self._forward = as_forward(model, self._compute_losses)

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the token losses of a batch.

        Args:
            batch: `input_ids`, `labels` and `position_ids`, each int64 [B, T].

        Returns:
            Loss sum (float32 scalar) and number of tokens with loss (int64 scalar).
        """
        if self.watch is None:
            return self.sum_losses(batch, by_row=False)
        sums_B, num_tokens = self.sum_losses(batch, by_row=True)
        self.watch(batch, sums_B.detach())
        return sums_B.sum(), num_tokens

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Count what a step's loss is the mean over: the tokens with loss."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    def evaluate(self, batch: Mapping[str, Tensor]) -> Sums:
        """Return loss sum and count, and sums of further held-out figures by name: none."""
        return *self(batch), {}

    def sum_losses(self, batch: Mapping[str, Tensor], *, by_row: bool) -> tuple[Tensor, Tensor]:
        """Sum the token losses of a batch, or of each row, [B]; and count the tokens."""
        result: tuple[Tensor, Tensor] = self._forward(batch, by_row=by_row)
        return result

    def _compute_losses(self, batch: Mapping[str, Tensor], *, by_row: bool) -> tuple[Tensor, Tensor]:
        input_ids_BT, position_ids_BT = batch["input_ids"], batch["position_ids"]
        if self.is_chunked:
            inputs_BTD = hidden_states(self.model, input_ids_BT, position_ids_BT)
            head = self.model.get_output_embeddings()
        else:
            inputs_BTD, head = logits(self.model, input_ids_BT, position_ids_BT), _identity
        return chunked_cross_entropy(
            inputs_BTD,
            head,
            batch["labels"],
            chunk_size=self.chunk_size,
            transform=self.transform,
            by_row=by_row,
        )

    def check_packing(self) -> None:
        """Prove on some tokens that documents packed into one sequence do not see each other.

        Of three documents a, b, c, the logits of c must be the same after a, after b and alone. What rounding
        may change is measured on c before a, before b and alone: no token sees what follows it. On several
        ranks every rank must call it.

        Raises:
            ValueError: the documents see each other, as in models without position ids, with recurrent
                state, or in flash attention with more than one sequence per batch.
        """
        embedding = self.model.get_input_embeddings().weight
        rng = torch.Generator().manual_seed(0)
        a, b, c = torch.randint(embedding.shape[0], (3, PROBE), generator=rng).to(embedding.device)
        rows_BT = torch.stack([torch.cat(pair) for pair in ((a, c), (b, c), (c, a), (c, b))])
        once_BT = torch.arange(PROBE, device=embedding.device)[None]
        with torch.no_grad(), evaluation_mode(self.model):
            packed_BTV = logits(self.model, rows_BT, once_BT.repeat(4, 2))
            alone_TV = logits(self.model, c[None], once_BT)[0]
        after_a, after_b = packed_BTV[:2, PROBE:]
        before_a, before_b = packed_BTV[2:, :PROBE]
        unit = torch.finfo(alone_TV.dtype).eps
        rounding = min(max(4 * _distance(before_a, before_b), unit / 4), TOLERANCE[alone_TV.dtype])
        rounding_alone = 4 * max(_distance(before_a, alone_TV), unit)  # other shapes round otherwise
        if not (_distance(after_a, after_b) <= rounding and _distance(after_a, alone_TV) <= rounding_alone):
            raise ValueError(
                f"data.packing does not work with {type(unwrap_adapters(self.model)).__name__} and attention "
                f"{self.model.config._attn_implementation}: packed records would see each other; "
                "set data.packing: false"
            )
        reshard(self.model)

    def follow(self, model: nn.Module) -> None:
        """From now on compute the loss of `model`, a wrapper that a method has put around the old model.

        Raises:
            ValueError: with virtual tokens, decoder and head no longer give the model's own logits.
        """
        super().follow(model)
        obstacle = self._find_transform() if num_virtual_tokens(model) else None
        if obstacle is not None:
            raise ValueError(f"virtual tokens do not work with this model ({obstacle}); use another method")

    def _find_transform(self) -> str | None:
        """Find the change from the head's output to the model's logits; if there is none, return why."""
        head = self.model.get_output_embeddings()
        if head is None:
            return "it has no output head"
        candidates = _transforms(self.model.config.get_text_config(decoder=True))
        if not has_values(local_part(self.model.get_input_embeddings().weight)):
            self.transform = candidates[0]  # nothing to compare with
            return None
        probe = self._probe()
        with torch.no_grad(), evaluation_mode(self.model):
            want_BTV = logits(self.model, *probe)
            if want_BTV.isnan().any():
                raise ValueError(_why_nan(self.model))
            try:
                raw_BTV = head(hidden_states(self.model, *probe))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                return f"its decoder and head cannot be called separately ({error})"
            for transform in candidates:
                if _agree(raw_BTV if transform is None else transform(raw_BTV), want_BTV):
                    self.transform = transform
                    return None
        return "it changes its logits in a way that its config does not name"

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Two sequences of eight tokens: enough to compare, and no random number is drawn."""
        embedding = self.model.get_input_embeddings().weight
        ids_BT = torch.arange(16, device=embedding.device).view(2, 8) % embedding.shape[0]
        return ids_BT, torch.arange(8, device=embedding.device).expand(2, -1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside, and give every module its own training flag back at the end."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _transforms(config: Any) -> list[Callable[[Tensor], Tensor] | None]:
    """Return every change of the logits that the config's keys allow, the likeliest first."""
    values = [getattr(config, key, None) for key in SCALE_KEYS]
    factors = [factor for value in values if value for factor in (float(value), 1 / value)]
    cap = getattr(config, "final_logit_softcapping", None)
    ways = product({cap: 0, None: 0}, [*factors, 1.0])
    return [
        None if (cap, factor) == (None, 1) else partial(_scale_and_cap, factor=factor, cap=cap)
        for cap, factor in ways
    ]


def _scale_and_cap(logits: Tensor, *, factor: float, cap: float | None) -> Tensor:
    logits = logits if factor == 1 else logits * factor
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _why_nan(model: nn.Module) -> str:
    broken = [name for name, p in exact_parameters(model).items() if not p.isfinite().all()]
    if not broken:
        return f"{type(model).__name__} computes NaN from finite weights; try model.attention: eager"
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"the model's weights hold NaN or infinity, in {broken[0]}{more}; fetch or export the model again"


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _distance(a, b) <= TOLERANCE[b.dtype]  # NaN compares as False


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest number in the second."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))


def _identity(x: Tensor) -> Tensor:
    return x
