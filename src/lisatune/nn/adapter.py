"""A low-rank term beside the weight of a linear layer, until it is merged into the weight.

    y = W x + s·B(A x),      A [r, in],  B [out, r]  in float32

The layer keeps its class, its weight and its parameters' names: A and B belong to the `Adapter`, not to the
layer. So an optimizer over the model's parameters does not hold them, and a frozen weight may be codes
(`lisatune.nn.coded`). Backward keeps the layer's input, as it is, for the gradient of A, and nothing else; if
the adapter does not train, not even that.

    state_dict         gives the merged weight, round(W + s·BA): float64 arithmetic, rounded once to W's dtype
    load_state_dict    replaces the sum: of the merged weight itself nothing changes; any other weight becomes
                       W, and B becomes zero

`state_dict(keep_vars=True)` and the attribute `weight` give W. Merged weights are made in host memory,
because beside the model there may be no room for a second one.

Shapes: r = rank, N = tokens of a batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lisatune.nn.coded import CodedLinear, own_parameter

__all__ = ["Adapter", "merge_adapters"]

AT_ONCE = 1 << 22
"""Elements of a weight that are merged at once, because that needs them in float64."""


class Adapter:
    """The low-rank term of one linear layer. It is added from now on, and is zero at first.

    Args:
        layer: a plain `nn.Linear`, whose weight may be codes.
        rank: r >= 1.
        scale: s.
        generator: on the CPU, for A: uniform in ±1/√in (Kaiming), as PEFT's.
    """

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float, generator: torch.Generator) -> None:
        changed: Any = layer
        self.layer, self.scale, weight = changed, scale, own_parameter(layer)
        values = torch.empty(rank, weight.shape[1]).uniform_(-1, 1, generator=generator)
        values *= weight.shape[1] ** -0.5
        self.A = nn.Parameter(values.to(weight.device))
        """[r, in], float32."""
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        """[out, r], float32."""
        self.is_new = False
        """Whether other weights were loaded, so that B is zero and its moments mean nothing."""
        changed._adapter = self
        changed.forward = self.forward
        self._hooks = [
            changed.register_state_dict_post_hook(_give_merged),
            changed.register_load_state_dict_pre_hook(_take_merged),
        ]

    @property
    def weight(self) -> Tensor:
        """The exact weight W, [out, in], without what the adapter adds."""
        layer = self.layer
        exact: Tensor = layer.coded_weight.exact() if isinstance(layer, CodedLinear) else layer.weight
        return exact.detach()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if isinstance(self.layer, CodedLinear):
            self.layer.coded_weight.load(value)
        else:
            self.layer.weight.data.copy_(value)

    def forward(self, input: Tensor) -> Tensor:
        """Replace the layer's `forward`: what its class computes now, and the adapter's term."""
        out: Tensor = type(self.layer).forward(self.layer, input)
        if out.dtype == torch.float16 and torch.is_grad_enabled():
            raise ValueError(
                "adapters beside frozen blocks cannot train in float16, because a loss scaler knows nothing "
                "of their gradients; train in bfloat16 or float32"
            )
        trains = self.A.requires_grad
        # A view is made outside, because a model may change what its layer returns in place (Llama 4 does).
        sum_NO: Tensor = _AddLowRank.apply(out, input, self.A, self.B, self.scale, trains)  # type: ignore[no-untyped-call]
        return sum_NO.view(out.shape)

    @torch.no_grad()
    def add_to(self, weight: Tensor, *, times: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Return weight + times·s·BA as a new tensor in the weight's dtype, rounded once.

        Args:
            weight: [out, in], on any device.
            times: 1, or -1 to take the term away.
            device: of the result. Default: the weight's.
        """
        # Not every device has float64.
        place = torch.device("cpu") if self.A.device.type == "mps" else self.A.device
        a, b = self.A.to(place, torch.float64), self.B.to(place, torch.float64) * (times * self.scale)
        result = torch.empty_like(weight, device=device)
        rows = max(AT_ONCE // max(weight.shape[1], 1), 1)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            wide = weight[part].to(place, torch.float64)
            result[part] = wide.addmm_(b[part], a).to(weight.dtype)
        return result

    @torch.no_grad()
    def clear(self) -> None:
        """Add nothing from now on."""
        self.B.zero_()
        self.A.grad = self.B.grad = None
        self.is_new = True

    def merge(self) -> None:
        """Put the term into the weight, once, and add nothing from now on."""
        if bool(self.B.any()):
            self.weight = self.add_to(self.weight)
        self.clear()

    def remove(self) -> None:
        """Take the term away from the layer; it is lost if it was not merged."""
        for hook in self._hooks:
            hook.remove()
        del self.layer._adapter, self.layer.forward


class _AddLowRank(torch.autograd.Function):
    """out + s·B(A x) as [N, out], computed in the dtype of `out`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, trains: bool) -> Tensor:
        ctx.scale, ctx.trains, ctx.dtype, ctx.shape = scale, trains, x.dtype, out.shape
        ctx.save_for_backward(A, B, *((x,) if trains else ()))
        low_Nr = x.reshape(-1, x.shape[-1]).to(out.dtype) @ A.to(out.dtype).T
        flat = out.reshape(-1, out.shape[-1])
        return torch.addmm(flat, low_Nr, B.to(out.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, B, *kept = ctx.saved_tensors
        grad_N = grads[0]
        a, b = A.to(grad_N.dtype), B.to(grad_N.dtype)
        low_Nr = (grad_N @ b).mul_(ctx.scale)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_x = (low_Nr @ a).view(*ctx.shape[:-1], a.shape[1]).to(ctx.dtype)
        if ctx.trains:
            x_N = kept[0].reshape(-1, a.shape[1]).to(grad_N.dtype)
            grad_a = (low_Nr.T @ x_N).to(A.dtype)
            grad_b = (grad_N.T @ (x_N @ a.T)).to(B.dtype).mul_(ctx.scale)
        return grad_N.view(ctx.shape), grad_x, grad_a, grad_b, None, None


def merge_adapters(model: nn.Module) -> None:
    """Merge all adapters of a model into the weights, once, and remove them."""
    for module in model.modules():
        adapter: Adapter | None = vars(module).get("_adapter")
        if adapter is not None:
            adapter.merge()
            adapter.remove()


def _give_merged(layer: Any, state_dict: Any, prefix: str, _: Any) -> None:
    """Give the merged weight, as a state-dict hook of the layer."""
    weight = state_dict.get(f"{prefix}weight")
    if weight is not None and not isinstance(weight, nn.Parameter):  # a parameter: keep_vars=True
        state_dict[f"{prefix}weight"] = layer._adapter.add_to(weight, device="cpu")


def _take_merged(layer: Any, state_dict: Any, prefix: str, *_: Any) -> None:
    """Keep W if the merged weight comes back; let any other weight take the place of the sum."""
    adapter: Adapter = layer._adapter
    given = state_dict.get(f"{prefix}weight")
    if given is None or given.shape != own_parameter(layer).shape or not bool(adapter.B.any()):
        return
    weight = adapter.weight
    if torch.equal(adapter.add_to(weight).to(given), given):
        state_dict[f"{prefix}weight"] = weight
    else:
        adapter.clear()
