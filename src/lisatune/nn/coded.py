"""Layers that compute with codes of a weight while it is frozen.

A `CodedWeight` looks after one weight. While the weight is frozen, its exact numbers are in a store outside
the device, the layer holds codes of them, and the parameter is a placeholder: one NaN, expanded to the
weight's shape, so 2 or 4 bytes. The `nn.Parameter` object, its name, shape and dtype never change, so
optimizer, hooks and names stay valid. Reading a placeholder by mistake gives NaN, and writing into it fails.

The layer's class changes with it, `nn.Linear` to `CodedLinear` and back; those of experts are in
`lisatune.nn.coded_experts`. A coded layer

    computes with its codes while it trains; forward and backward save the codes alone, never a dense weight;
    computes with the exact weight in evaluation mode without gradients, so that held-out loss and generated
    text are those of the model that is saved;
    gives what it computes with, made dense anew, to code that reads `weight` of a linear layer past a call
    of it, as the losses of TRL and Liger read the head's; `own_parameter` is the parameter itself;
    gives and takes the exact weight in `state_dict` and `load_state_dict`; no checkpoint holds codes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from lisatune.nn.codes import Codes, Format, Int8Rows

__all__ = [
    "CODED_CLASSES",
    "Coded",
    "CodedEmbedding",
    "CodedLinear",
    "CodedWeight",
    "Masters",
    "can_be_coded",
    "coded_weights",
    "exact_parameters",
    "own_parameter",
    "refuse_bypassed",
]


class Masters(Protocol):
    """A store of exact weights outside the device, each under its parameter's name."""

    def keep(self, name: str, weight: Tensor) -> None:
        """Store a weight from any device. The caller gives the tensor up, so it need not be copied."""

    def get(self, name: str) -> Tensor:
        """Return a stored weight, in host memory, to be read only."""

    def take(self, name: str, device: torch.device) -> Tensor:
        """Return a stored weight on a device, as a tensor that the caller may change.

        The store need not have it afterwards, until the next `keep`.
        """

    def host_bytes(self) -> int:
        """Count the bytes of host memory that the stored weights take."""


class CodedWeight:
    """One weight that is exact on the device while it trains, and codes while it is frozen.

    Args:
        name: the parameter's name in the model; in a layer it is the last part of it.
        layers: the layers that own the parameter, of classes in `CODED_CLASSES`. Tied layers share their
            codes. Their forward must be the class's own.
        format: of the codes; embeddings need `Int8Rows`.
        masters: where the exact weight is kept.
    """

    def __init__(self, name: str, layers: Iterable[nn.Module], format: Format, masters: Masters) -> None:
        self.name, self.format, self.masters = name, format, masters
        self.attribute = name.rpartition(".")[2]
        self.layers: tuple[Any, ...] = tuple(layers)
        self.parameter = own_parameter(self.layers[0], self.attribute)
        self.code_names: tuple[str, ...] = ()
        """Names of the codes; empty while the weight is exact."""
        self._rounded: Tensor | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether the device holds codes."""
        return bool(self.code_names)

    @property
    def codes(self) -> Codes:
        """The codes on the device; empty while the weight is exact."""
        return {name: self.layers[0]._buffers[f"{self.attribute}_{name}"] for name in self.code_names}

    def exact(self) -> Tensor:
        """Return the exact weight, on the device if it trains and in host memory if it is frozen."""
        if self._rounded is not None:
            return self._rounded
        return self.masters.get(self.name) if self.is_frozen else self.parameter.detach()

    @contextmanager
    def held_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Let `exact` return the frozen weight in another dtype meanwhile, and keep it rounded to that."""
        self._rounded = self.exact().to(dtype)
        try:
            yield
        finally:
            rounded, self._rounded = self._rounded, None
            self.load(rounded)

    def freeze(self, device: torch.device | None = None) -> None:
        """Move the exact weight to the store and put codes on the device. Does nothing if it is frozen.

        Args:
            device: where the codes go. Default: where the weight is.
        """
        if self.is_frozen:
            return
        weight = self.parameter.detach()
        device = device or weight.device
        codes = self.format.encode(weight.to(device))
        self.masters.keep(self.name, weight)
        self.parameter.data = torch.full((), torch.nan, dtype=weight.dtype, device=device).expand(
            weight.shape
        )
        self.code_names = tuple(codes)
        for layer in self.layers:
            for name, tensor in codes.items():
                layer.register_buffer(f"{self.attribute}_{name}", tensor, persistent=False)
            vars(layer).setdefault("_coded", {})[self.attribute] = self
            layer.__class__ = CODED_CLASSES.get(type(layer), type(layer))

    def thaw(self) -> None:
        """Put the exact weight onto the device, and drop the codes. Does nothing if the weight is exact."""
        if not self.is_frozen:
            return
        for layer in self.layers:
            for name in self.code_names:
                del layer._buffers[f"{self.attribute}_{name}"]
                layer._non_persistent_buffers_set.discard(f"{self.attribute}_{name}")
            del layer._coded[self.attribute]
            if not layer._coded:
                layer.__class__ = layer.plain
                del layer._coded
        self.code_names = ()
        self.parameter.data = self.masters.take(self.name, self.parameter.device)

    def load(self, weight: Tensor) -> None:
        """Replace the exact weight, of the same shape, and the codes of it."""
        if not self.is_frozen:
            with torch.no_grad():
                self.parameter.copy_(weight)
            return
        self.masters.keep(self.name, weight.to(self.parameter.dtype, copy=True))
        for name, tensor in self.format.encode(self.masters.get(self.name).to(self.parameter.device)).items():
            self.codes[name].copy_(tensor)

    def codes_fit(self) -> bool:
        """Encode the exact weight anew and tell whether the codes on the device are the same."""
        now = self.codes
        again = self.format.encode(self.exact().to(self.parameter.device))
        # NaN is the same as NaN: a diverged weight has codes too.
        return all(
            torch.allclose(now[name], tensor, rtol=0, atol=0, equal_nan=True)
            for name, tensor in again.items()
        )


class Coded(nn.Module):
    """What coded layers have in common."""

    plain: type[nn.Module]
    """The class of the layer while all its weights are exact."""
    _coded: dict[str, CodedWeight]
    """Weights that are codes now, by the parameter's name in the layer."""

    def _computes_exactly(self) -> bool:
        # Reentrant checkpointing runs forward without gradients too, but in training mode.
        return not (self.training or torch.is_grad_enabled())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the layer to another device; what `Module.to` makes of a placeholder would be a whole weight.

        Raises:
            RuntimeError: it would change the dtype, which the exact weight in its store would not follow.
        """
        own = {name: own_parameter(self, name) for name in self._coded}
        shapes = {name: parameter.shape for name, parameter in own.items()}
        for name, parameter in own.items():
            if (dtype := fn(parameter.new_empty(0)).dtype) != parameter.dtype:
                raise RuntimeError(
                    f"the frozen weight {self._coded[name].name} is codes of {parameter.dtype} numbers and "
                    f"cannot become {dtype}; convert the model before attaching LISA, or call detach() first"
                )
        for parameter in own.values():
            parameter.data = parameter.detach()[(0,) * parameter.dim()]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, parameter in own.items():
                for each in (parameter, own_parameter(self, name)):  # another one on a device such as meta
                    each.data = each.detach().expand(shapes[name])
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: coded.exact() for name, coded in self._coded.items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        coded = {prefix + name: weight for name, weight in self._coded.items()}
        # Hooks must see the weights, and may put others in their place; torch's own call lacks them.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, local_metadata, strict, *lists)
            rest = {key: value for key, value in state_dict.items() if key not in coded}
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, *lists)
        finally:
            self._load_state_dict_pre_hooks = hooks
        missing, _, errors = lists
        missing[:] = [key for key in missing if key not in coded or key not in state_dict]
        for name, weight in coded.items():
            if name not in state_dict:
                continue
            given, own = state_dict[name], weight.parameter
            if given.shape != own.shape:
                errors.append(f"size mismatch for {name}: {tuple(given.shape)}, not {tuple(own.shape)}")
            else:
                weight.load(given)


class CodedLinear(Coded, nn.Linear):
    """A linear layer with a frozen weight that is stored as codes."""

    plain = nn.Linear

    @property
    def coded_weight(self) -> CodedWeight:
        """What looks after the weight."""
        return self._coded["weight"]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What `forward` computes with now, [out, in], made anew; writing into it changes nothing."""
        return self.make_reader()(slice(None), own_parameter(self).dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer in the dtype of its input, or of autocast."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self._computes_exactly():
            exact = self.coded_weight.exact().to(input.device, non_blocking=True)
            return linear(input, exact, self.bias)
        names = self.coded_weight.code_names
        tensors = [self._buffers[f"weight_{name}"] for name in names]
        coded = self.coded_weight.format
        shape = own_parameter(self).shape
        out: Tensor = _Product.apply(input.to(dtype), coded, shape, names, *tensors)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(dtype)

    def make_reader(self) -> Callable[[slice, torch.dtype], Tensor]:
        """Return a function that returns rows of the weight, [rows, in], in a dtype, as a new tensor.

        Whether they come from the codes or from the exact weight is decided now, as in a forward pass.
        """
        coded, own = self.coded_weight, own_parameter(self)
        shape, device = own.shape, own.device
        if self._computes_exactly():
            return lambda rows, dtype: coded.exact()[rows].to(device, dtype)
        codes, format = coded.codes, coded.format
        if isinstance(format, Int8Rows):
            return lambda rows, dtype: format.decode_rows(codes, rows, dtype)
        return lambda rows, dtype: format.decode(codes, shape, dtype)[rows]


class CodedEmbedding(Coded, nn.Embedding):
    """An embedding with a frozen weight that is stored as int8 rows."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows, in the weight's dtype."""
        coded = self._coded["weight"]
        if self._computes_exactly():
            master = coded.exact()
            return embedding(input.to(master.device), master).to(input.device)
        assert isinstance(coded.format, Int8Rows)
        return coded.format.decode_rows(coded.codes, input, own_parameter(self).dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ with W from codes, and in backward the gradient of x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, format: Format, shape: torch.Size, names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.format, ctx.shape, ctx.names = format, shape, names
        return linear(x, format.decode(dict(zip(names, tensors, strict=True)), shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        grad = grads[0] @ ctx.format.decode(codes, ctx.shape, grads[0].dtype)
        return grad, None, None, None, *[None] * len(codes)


CODED_CLASSES: dict[type[nn.Module], type[Coded]] = {nn.Linear: CodedLinear, nn.Embedding: CodedEmbedding}
"""What the class of a layer becomes while a weight of it is codes."""


def can_be_coded(layer: nn.Module) -> bool:
    """Whether a layer is a plain `nn.Linear` or `nn.Embedding`, whose forward does nothing else.

    A `forward` of its own, as Accelerate's hooks give it, would keep the decoded weight for backward.
    """
    if "forward" in vars(layer):
        return False
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.sparse
    return type(layer) is nn.Linear


def own_parameter(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """Return a parameter of a layer itself, which is a placeholder while the weight is codes."""
    parameter = layer._parameters[name]
    assert parameter is not None
    return parameter


def refuse_bypassed(model: nn.Module, weights: Iterable[Tensor], what: str) -> None:
    """Refuse weights that a module of torch reads in evaluation without a call of the layers that own them.

    Args:
        model: has them.
        weights: of linear layers that are to compute with something else.
        what: what would be left out, and what to use instead.

    Raises:
        ValueError: there is one.
    """
    wanted = set(weights)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not wanted.isdisjoint(module.parameters()):
            raise ValueError(
                "in evaluation torch.nn.TransformerEncoderLayer reads the weights of its linear layers "
                f"without calling them, past {what}"
            )


def coded_weights(model: nn.Module) -> dict[str, CodedWeight]:
    """Return the model's weights that are codes now, by the parameter's name."""
    layers = [module for module in model.modules() if isinstance(module, Coded)]
    owners = {own_parameter(layer, name): coded for layer in layers for name, coded in layer._coded.items()}
    return {name: owners[p] for name, p in model.named_parameters() if p in owners} if owners else {}


def exact_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, tied ones once; exact weights in place of placeholders."""
    exact = {name: weight.exact() for name, weight in coded_weights(model).items()}
    return {name: exact.get(name, p) for name, p in model.named_parameters()}
