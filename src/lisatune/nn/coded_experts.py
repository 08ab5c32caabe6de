"""Experts of a mixture in one tensor, [E, A, B], that compute with codes of it while it is frozen.

In transformers, all classes of experts with `use_experts_implementation` compute the same. A token is sent to
k of E experts, and each of the S pairs of a token and an expert e goes through

    h = gate(x W_gate_up[e]ᵀ)    or  act(x W_up[e]ᵀ)
    y = h W_down[e]ᵀ;

what comes out for a token is the sum of its y times their routing weights. Here pairs are sorted by expert.
The matrix of one expert at a time is decoded, for forward and again for backward; none is kept.

Shapes: S = pairs, E = experts, k = experts of a token, I = inputs of a matrix, O = outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed.shards import has_values
from lisatune.nn.coded import CODED_CLASSES, Coded, own_parameter
from lisatune.nn.codes import PerExpert

__all__ = ["name_experts"]

LAYOUT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts", "_apply_gate")
"""What `use_experts_implementation` tells of a class, and the number of experts."""


def name_experts(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of experts that can be codes; none for a module of another kind."""
    plain = type(module)
    if "forward" in vars(module) or not all(hasattr(module, name) for name in LAYOUT):
        return ()
    if not hasattr(plain.forward, "__wrapped__") or getattr(module, "_is_expert_parallel", False):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not all(name in module._parameters and own_parameter(module, name).dim() == 3 for name in names):
        return ()
    if plain not in CODED_CLASSES:
        CODED_CLASSES[plain] = type(f"Coded{plain.__name__}", (CodedExperts, plain), {"plain": plain})
    return names


class CodedExperts(Coded):
    """Experts of which a weight at least is codes. Each class of experts has a subclass of its own."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], numbers of experts.
            top_k_weights: [tokens, k].
        """
        expert_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
        end_E = torch.searchsorted(
            expert_S, torch.arange(self.num_experts, device=expert_S.device), right=True
        )
        first, last = "gate_up_proj" if self.has_gate else "up_proj", "down_proj"
        dtype, kind = own_parameter(self, first).dtype, hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        x_SI = hidden_states[order_S // top_k_index.shape[-1]].to(dtype)
        out_SO = self._multiply(first, x_SI, expert_S, end_E)
        out_SO = self._apply_gate(out_SO) if self.has_gate else self.act_fn(out_SO)
        out_SO = self._multiply(last, out_SO.to(dtype), expert_S, end_E)
        if self.has_post_expert_norm:
            out_SO = self.post_expert_norm(out_SO)
        weighted_SO = out_SO * top_k_weights.reshape(-1)[order_S, None]
        weighted = weighted_SO[torch.argsort(order_S)].view(*top_k_index.shape, -1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _multiply(self, name: str, x_SI: Tensor, expert_S: Tensor, end_E: Tensor) -> Tensor:
        """Multiply each row with the matrix of its expert, and add the bias."""
        own, coded = own_parameter(self, name), self._coded.get(name)
        product = _Product(end_E, self.is_transposed, own.shape)
        kept: Sequence[Tensor] = (own,)
        if coded is not None and self._computes_exactly():
            product.exact, kept = coded.exact, ()
        elif coded is not None:
            assert isinstance(coded.format, PerExpert)
            product.format, product.names, kept = coded.format, coded.code_names, tuple(coded.codes.values())
        out_SO: Tensor = _Grouped.apply(x_SI, product, *kept)  # type: ignore[no-untyped-call]
        return out_SO + own_parameter(self, f"{name}_bias")[expert_S] if self.has_bias else out_SO


class _Product:
    """Where rows end, and where the matrices of their experts come from.

    Args:
        end_E: where the rows of each expert end.
        is_transposed: whether a matrix is [I, O] rather than [O, I].
        shape: of the whole weight.
    """

    def __init__(self, end_E: Tensor, is_transposed: bool, shape: torch.Size) -> None:
        self.end_E, self.is_transposed, self.shape = end_E, is_transposed, shape
        self.width = shape[2 if is_transposed else 1]
        self.exact: Callable[[], Tensor] | None = None
        """Returns the exact weight, on any device."""
        self.format: PerExpert | None = None
        self.names: tuple[str, ...] = ()
        """Names of the codes."""

    def matrices(self, kept: Sequence[Tensor], like: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield each expert that has rows, where they are, and its matrix [O, I], one at a time.

        In a memory plan nobody knows how many rows an expert has: all are the first one's.
        """
        ends = self.end_E.tolist() if has_values(self.end_E) else [len(like)]
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                matrix = self._read(kept, expert, like)
                yield expert, slice(start, end), matrix.T if self.is_transposed else matrix
                del matrix

    def _read(self, kept: Sequence[Tensor], expert: int, like: Tensor) -> Tensor:
        if self.format is not None:
            codes = dict(zip(self.names, kept, strict=True))
            return self.format.decode_expert(codes, expert, self.shape, like.dtype)
        weight = kept[0].detach() if self.exact is None else self.exact()
        return weight[expert].to(like.device, like.dtype)


class _Grouped(torch.autograd.Function):
    """Rows times the matrices of their experts. Of what is kept only an exact weight gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, product: _Product, *kept: Tensor) -> Tensor:
        ctx.product, ctx.trains = product, any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(*kept, *((x_SI,) if ctx.trains else ()))
        out_SO = x_SI.new_empty(len(x_SI), product.width)
        for _, rows, matrix in product.matrices(kept, x_SI):
            torch.mm(x_SI[rows], matrix.T, out=out_SO[rows])
            del matrix
        return out_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        product, grad_SO, saved = ctx.product, grads[0], ctx.saved_tensors
        kept = saved[:-1] if ctx.trains else saved
        grad_x = grad_SO.new_empty(len(grad_SO), product.shape[1 if product.is_transposed else 2])
        grad_weight = torch.zeros_like(kept[0]) if ctx.trains else None
        for expert, rows, matrix in product.matrices(kept, grad_SO):
            torch.mm(grad_SO[rows], matrix, out=grad_x[rows])
            del matrix
            if grad_weight is not None:
                grad = grad_SO[rows].T @ saved[-1][rows]
                grad_weight[expert] = grad.T if product.is_transposed else grad
        return grad_x, None, grad_weight, *[None] * (len(kept) - 1)
