r"""QLISA: frozen blocks are codes on the device, exact weights are outside it.

A frozen block needs no exact weight on the device, only something to compute with. Its linear layers hold
codes (`lisatune.nn.codes`), and a store of masters holds the exact weights: `RamMasters` in host memory, or a
file. At a draw

    1. every block that freezes gives its exact weights to the store and gets codes of them;
    2. every block that thaws gets its exact weights back.

Weights never train through codes, and codes are never made of codes: both would lose most of an update. The
model that is saved is the exact one; blocks that never trained are bit-identical in it.

With N blocks of P_b numbers, γ of them active, c bytes for a coded number (int8 rows 1 + 4/columns, NF4
0.516) and w bytes for an exact one, the weights take on the device

    (N - γ) · P_b · c  +  γ · P_b · w  +  ends,

and in the store (N - γ) · P_b · w. Frozen ends are stored as int8 rows, whatever format the blocks have:
embedding and head lose more by NF4. Norms and biases stay exact.

`mixed` stores the smallest matrices of a block as int8 rows, as many as have a third of its numbers together,
and the others as NF4. In models of today the small ones are attention's, which lose most by NF4.
"""

import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import has_values
from lisatune.lisa.checks import is_copied
from lisatune.lisa.proof import ProofError
from lisatune.nn.coded import CodedWeight, Masters, can_be_coded, refuse_bypassed
from lisatune.nn.coded_experts import name_experts
from lisatune.nn.codes import CODE_NAMES, Format, Int8Rows, PerExpert, Scales, make_format
from lisatune.nn.layers import LayerMap

__all__ = ["FrozenWeights", "RamMasters", "ShapeMasters", "find_frozen_weights"]

LEAST_SHARE = 0.5
"""Share of a model's block parameters that codes must be able to replace."""

IGNORED_BY_DDP: Final = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model in which DistributedDataParallel looks for names when it wraps the model."""

SMALL_SHARE = 1 / 3
"""Share of a block's coded numbers that are int8 under `mixed`, at most."""


class RamMasters:
    """Exact weights in host memory.

    Args:
        pinned: weights by name that will be stored, for page-locked memory, from which a CUDA device copies
            faster. Default: plain memory.
    """

    def __init__(self, pinned: Mapping[str, Tensor] | None = None) -> None:
        self._kept: dict[str, Tensor] = {}
        self._is_pinned = pinned is not None
        if pinned:
            self._kept = _allocate_pinned(pinned)

    def keep(self, name: str, weight: Tensor) -> None:
        """Hold a weight that is in host memory; copy one from another device, or into pinned memory."""
        if self._is_pinned:
            self._kept[name].copy_(weight)
        else:
            self._kept[name] = weight.cpu()

    def get(self, name: str) -> Tensor:
        """Return the stored weight itself."""
        return self._kept[name]

    def take(self, name: str, device: torch.device) -> Tensor:
        """Return the weight on a device; plain memory on the CPU is handed back without a copy."""
        if self._is_pinned:
            return self._kept[name].to(device, copy=True, non_blocking=True)
        return self._kept.pop(name).to(device)

    def host_bytes(self) -> int:
        """Count the bytes of the stored weights."""
        return sum(weight.nbytes for weight in self._kept.values())


class ShapeMasters:
    """Stands for a store where weights have only shapes, as in a memory plan: it holds nothing.

    Args:
        is_pinned: count what a pinned store takes, which keeps the place of weights that train.
        on_disk: count what a store on disk takes: nothing.
    """

    def __init__(self, *, is_pinned: bool = False, on_disk: bool = False) -> None:
        self._is_pinned, self._on_disk = is_pinned, on_disk
        self._shapes: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}

    def keep(self, name: str, weight: Tensor) -> None:
        """Note the weight's shape."""
        self._shapes[name] = weight.shape, weight.dtype, weight.device

    def get(self, name: str) -> Tensor:
        """Return a new tensor of the noted shape."""
        shape, dtype, device = self._shapes[name]
        return torch.empty(shape, dtype=dtype, device=device)

    def take(self, name: str, device: torch.device) -> Tensor:
        """Return a new tensor of the noted shape."""
        weight = self.get(name).to(device)
        if not self._is_pinned:
            del self._shapes[name]
        return weight

    def host_bytes(self) -> int:
        """Count the bytes of host memory that a real store would hold."""
        if self._on_disk:
            return 0
        return sum(shape.numel() * dtype.itemsize for shape, dtype, _ in self._shapes.values())


class FrozenWeights:
    """The weights of a model that become codes while they are frozen. All are exact at first.

    Args:
        model: has its exact weights, on any device.
        layers: its blocks and ends.
        name: format of the blocks' codes: `int8`, `nf4`, or `mixed`, which is both.
        scales: how NF4 stores its scales.
        masters: where exact weights go. Default: `RamMasters`.
        device: where the model will train. Default: where it is.

    Raises:
        ValueError: the model cannot be trained so; the message says why.
        ImportError: NF4 needs bitsandbytes, which is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerMap,
        name: str,
        *,
        scales: Scales = "8bit",
        masters: Masters | None = None,
        device: torch.device | None = None,
    ) -> None:
        if ranks.count() > 1 and not is_copied(model):
            raise ValueError(
                f"frozen_weights {name!r} works in one process, or in a loop of your own with a model that "
                "fully_shard has not divided, because codes are not divided; use frozen_weights exact"
            )
        self.name = name
        """Format of the blocks' codes."""
        by_block = [list(block.values()) for block in layers.block_parameters(model)]
        blocks = {p for block in by_block for p in block}
        ends = set(layers.end_parameters(model).values())
        owners = _find_owners(model)
        coded = {
            weight
            for weight, layers_of in owners.items()
            if weight in ends or (weight in blocks and nn.Embedding not in map(type, layers_of))
        }
        coarse, fine = make_format("nf4" if name == "mixed" else name, scales=scales), Int8Rows()
        in_fine = coded - blocks
        if name == "mixed":
            in_fine |= {p for block in by_block for p in _find_small([p for p in block if p in coded])}
        formats: dict[nn.Parameter, Format] = {w: fine if w in in_fine else coarse for w in coded}
        formats |= {w: PerExpert(format) for w, format in formats.items() if w.dim() == 3}
        _check_share(model, blocks, formats.keys())
        refuse_bypassed(model, formats, "their codes; use frozen_weights exact")
        named = {path: p for path, p in model.named_parameters() if p in formats}
        self.masters: Any = masters
        if not all(has_values(p) for p in named.values()):
            self.masters = masters if isinstance(masters, ShapeMasters) else ShapeMasters()
        elif masters is None:
            devices = {device} if device else {p.device for p in named.values()}
            on_cuda = any(each.type == "cuda" for each in devices)
            self.masters = RamMasters(named if on_cuda else None)
        self._weights = {
            p: CodedWeight(path, owners[p], formats[p], self.masters) for path, p in named.items()
        }
        model._frozen_weights = self  # type: ignore[assignment]
        self._ignored: list[str] | None = None
        """What DistributedDataParallel ignored before; None if it was not told of these weights."""
        if ranks.count() > 1:
            self._hide_from_ddp(model)

    @classmethod
    def of(cls, model: nn.Module) -> "FrozenWeights | None":
        """Return the object that looks after a model's frozen weights; None if there is none."""
        return vars(model).get("_frozen_weights")

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter becomes codes when it is frozen."""
        return parameter in self._weights

    def freeze(self, parameter: nn.Parameter, device: torch.device | None = None) -> None:
        """Replace a weight by codes on a device, by default its own; does nothing to other parameters."""
        if parameter in self._weights:
            self._weights[parameter].freeze(device)

    def thaw(self, parameter: nn.Parameter) -> None:
        """Put a weight's exact numbers back onto the device; does nothing to other parameters."""
        if parameter in self._weights:
            self._weights[parameter].thaw()

    def read(self, parameter: nn.Parameter) -> tuple[Tensor, ...]:
        """Return what a fingerprint of a parameter reads: its codes and exact numbers if it is coded."""
        weight = self._weights.get(parameter)
        if weight is None or not weight.is_frozen:
            return (parameter,)
        return (*weight.codes.values(), weight.exact())

    def exact(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's exact numbers, in host memory if it is coded."""
        weight = self._weights.get(parameter)
        return parameter.detach() if weight is None else weight.exact()

    def prove(self, period: int) -> None:
        """Prove that the codes of one frozen weight, another one in each period, are those of its numbers.

        Raises:
            ProofError: they are not.
        """
        frozen = [weight for weight in self._weights.values() if weight.is_frozen]
        if frozen and not (chosen := frozen[period % len(frozen)]).codes_fit():
            raise ProofError(
                f"period {period}: the codes of the frozen weight {chosen.name} are not those of its exact "
                "numbers; something besides LISA changed one of them"
            )

    def host_bytes(self) -> int:
        """Count the bytes of exact weights that are in host memory because blocks are frozen."""
        return int(self.masters.host_bytes())

    def detach(self, model: nn.Module) -> None:
        """Put every exact weight back onto the device."""
        for parameter in self._weights:
            self.thaw(parameter)
        if self.of(model) is self:
            del model._frozen_weights
        if self._ignored is not None:
            setattr(model, IGNORED_BY_DDP, self._ignored)

    def _hide_from_ddp(self, model: nn.Module) -> None:
        """Let a DistributedDataParallel that wraps the model from now on leave weights and codes alone.

        It would write into placeholders, keep codes that are gone, and send codes in each forward pass.
        """
        names: dict[nn.Module, set[str]] = {}
        for weight in self._weights.values():
            for layer in weight.layers:
                own = names.setdefault(layer, set())
                own |= {weight.attribute, *(f"{weight.attribute}_{name}" for name in CODE_NAMES)}
        modules = model.named_modules(remove_duplicate=False)
        ignored = [f"{path}.{name}" for path, module in modules for name in names.get(module, ())]
        self._ignored = list(getattr(model, IGNORED_BY_DDP, ()))
        setattr(model, IGNORED_BY_DDP, [*self._ignored, *ignored])


def find_frozen_weights(
    model: nn.Module, layers: LayerMap, name: str, masters: Masters | None, undo: ExitStack
) -> FrozenWeights | None:
    """Return what looks after a model's frozen weights, made anew unless the model has it in this format.

    Args:
        model, layers, masters: as of `FrozenWeights`.
        name: format of the codes, or `exact`, for which there is nothing.
        undo: gets the call that takes away again what is made here.

    Raises:
        ValueError: `masters` for `exact`, or as by `FrozenWeights`.
    """
    if name == "exact" and masters is not None:
        raise ValueError(
            f"masters keeps exact weights of blocks that are codes, and frozen_weights is {name!r}; leave "
            "masters out, or use int8, mixed or nf4"
        )
    known = FrozenWeights.of(model)
    if known is not None and (known.name != name or masters is not None):  # of a copy of another model
        known.detach(model)
        known = None
    if known is None and name != "exact":
        known = FrozenWeights(model, layers, name, masters=masters)
        undo.callback(known.detach, model)
    return known


def _find_owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """Return the layers that own each weight, for weights whose every owner can be coded."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(module)
    return {
        parameter: modules
        for parameter, modules in owners.items()
        if all(
            any(module._parameters.get(name) is parameter for name in _name_coded(module))
            for module in modules
        )
    }


def _name_coded(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's weights that can be codes."""
    return ("weight",) if can_be_coded(module) else name_experts(module)


def _find_small(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return a block's smallest weights, as many as have `SMALL_SHARE` of its numbers together."""
    ordered = sorted(weights, key=torch.Tensor.numel)
    sums = list(accumulate(map(torch.Tensor.numel, ordered)))
    return [weight for weight, so_far in zip(ordered, sums, strict=True) if so_far <= SMALL_SHARE * sums[-1]]


def _check_share(model: nn.Module, blocks: set[nn.Parameter], coded: Iterable[nn.Parameter]) -> None:
    """Refuse a model whose blocks are mostly something other than linear layers.

    Raises:
        ValueError: names the largest weight that stays exact.
    """
    rest = blocks - set(coded)
    share = 1 - sum(p.numel() for p in rest) / max(sum(p.numel() for p in blocks), 1)
    if share >= LEAST_SHARE:
        return
    named = {name: p for name, p in model.named_parameters() if p in rest}
    name, largest = max(named.items(), key=lambda item: item[1].numel())
    owner = model.get_submodule(name.rpartition(".")[0])
    how = " with a forward of its own" if "forward" in vars(owner) else ""
    raise ValueError(
        f"only {share:.0%} of the numbers in the blocks of {type(model).__name__} are in torch.nn.Linear or "
        f"transformers' experts, which is what codes can replace; {name} is {list(largest.shape)} in "
        f"{type(owner).__name__}{how}; use frozen_weights exact"
    )


def _allocate_pinned(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Allocate one page-locked area for all weights. torch's own would be rounded up to a power of two.

    Each tensor has a storage of its own, because tensors that share one cannot be saved without a copy.
    """
    ends = list(accumulate(-(-weight.nbytes // 64) * 64 for weight in weights.values()))
    area = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cuda.cudaHostRegister(area.data_ptr(), area.nbytes, 0))
    weakref.finalize(area.untyped_storage(), cuda.cudaHostUnregister, area.data_ptr())
    memory = area.numpy().data
    return {
        name: torch.frombuffer(memory[start : start + weight.nbytes], dtype=torch.uint8)
        .view(weight.dtype)
        .view(weight.shape)
        for (name, weight), start in zip(weights.items(), [0, *ends], strict=False)
    }
