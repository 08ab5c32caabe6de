"""The loss without full logits inside a model's own `forward`: for HF Trainer, PEFT and plain loops.

After `use_chunked_loss(model)`, `model(input_ids=…, labels=…).loss` is the loss it was before, computed by
`lisatune.losses.causal_lm`, and `.logits` is None. Calls without labels, such as generation, are unchanged,
and so are calls that ask for the loss of a mixture's router (`output_router_logits`).
"""

import functools
import inspect
from types import MethodType
from typing import Any, Self

from torch import Tensor, nn

from lisatune.losses.causal_lm import CausalLMLoss, chunked_cross_entropy
from lisatune.nn.hidden import unwrap_adapters

__all__ = ["ChunkedLoss", "use_chunked_loss"]

FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict")
"""Arguments of `forward` that are not passed to the decoder."""


def use_chunked_loss(model: Any, *, chunk_size: int = 128, in_evaluation: bool = True) -> "ChunkedLoss":
    """Let a model compute its loss without its full logits.

    `num_items_in_batch` (Trainer's token count over an accumulation window) divides the sum as before;
    without it the loss is the mean. `shift_labels` are taken as they are. Everything else, an
    `attention_mask` with padding on either side included, goes to the decoder as it was given.

    Args:
        model: a `transformers` causal language model, or a PEFT model around one, on its device. It is
            called twice, on a few tokens.
        chunk_size: tokens whose logits exist at once.
        in_evaluation: False keeps full logits when the model is in evaluation mode; `compute_metrics` of
            Trainer needs them.

    Returns:
        A handle: `undo()` gives the model its own forward back, and so does leaving it as a context.

    Raises:
        ValueError: the model changes its logits in a way its config does not name, or adds a router loss.
        RuntimeError: the model computes this loss already.

    Example:
        >>> use_chunked_loss(model)
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
    """
    model = unwrap_adapters(model)
    if isinstance(vars(model).get("_chunked_loss"), ChunkedLoss):
        raise RuntimeError(f"{type(model).__name__} computes its loss in chunks already; undo() that first")
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__} adds its router's auxiliary loss, which the chunked loss leaves out; "
            "set model.config.output_router_logits = False"
        )
    loss = CausalLMLoss(model, chunk_size=chunk_size, on_obstacle="raise")
    return ChunkedLoss(model, loss, in_evaluation=in_evaluation)


class ChunkedLoss:
    """Handle that `use_chunked_loss` returns."""

    def __init__(self, model: nn.Module, loss: CausalLMLoss, *, in_evaluation: bool) -> None:
        self._model, self.loss, self.in_evaluation = model, loss, in_evaluation
        self.forward = model.forward
        self._own = vars(model).get("forward")
        model._chunked_loss = self  # type: ignore[assignment]
        # The signature stays: Trainer reads from it which columns and loss arguments the model takes.
        model.forward = MethodType(functools.wraps(type(model).forward)(_forward), model)

    def undo(self) -> None:
        """Give the model its own forward back. A second call does nothing."""
        if vars(self._model).get("_chunked_loss") is not self:
            return
        del self._model._chunked_loss
        if self._own is None:
            del self._model.forward
        else:
            self._model.forward = self._own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the model's `forward`."""
    handle: ChunkedLoss = model._chunked_loss
    if args:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        kwargs |= dict(zip(names, args, strict=False))
    has_labels = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
    keeps_logits = not (model.training or handle.in_evaluation) or _is_set(kwargs.get("logits_to_keep"))
    if not has_labels or keeps_logits or _adds_router_loss(model, kwargs):
        return handle.forward(**kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    for_loss = {key: kwargs.pop(key, None) for key in FOR_THE_LOSS}
    out = _find_inner(model)(**kwargs)
    is_shifted = for_loss["shift_labels"] is not None
    labels_BT: Tensor = for_loss["shift_labels"] if is_shifted else for_loss["labels"]
    loss_sum, num_tokens = chunked_cross_entropy(
        out.last_hidden_state,
        model.get_output_embeddings(),
        labels_BT.to(out.last_hidden_state.device),
        chunk_size=handle.loss.chunk_size,
        transform=handle.loss.transform,
        is_shifted=is_shifted,
    )
    given = for_loss["num_items_in_batch"]
    count = num_tokens if given is None else given.to(loss_sum.device) if isinstance(given, Tensor) else given
    result = CausalLMOutputWithPast(
        loss=loss_sum / count,
        logits=None,
        past_key_values=out.get("past_key_values"),
        hidden_states=out.get("hidden_states"),
        attentions=out.get("attentions"),
    )
    return result.to_tuple() if for_loss["return_dict"] is False else result


def _adds_router_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model's own loss holds the router's auxiliary loss, which the chunked one leaves out."""
    asked = kwargs.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


def _find_inner(model: Any) -> nn.Module:
    """Return what is below the head. Where images are read too it is more than the decoder of text."""
    base: Any = model.base_model
    inner: nn.Module = model.get_decoder() if base is model else base
    return inner


def _is_set(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, Tensor) or bool(logits_to_keep)
