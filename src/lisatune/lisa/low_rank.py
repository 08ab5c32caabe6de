"""Adapters beside the linear layers of all blocks, and what trains, saves and merges them.

`lisatune.lisa.correction` says what they are for, `lisatune.nn.adapter` how one of them computes. LISA calls
`train` at each draw and `step` after each step of the optimizer.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import has_values
from lisatune.lisa.checks import is_copied
from lisatune.lisa.correction import Corrected, Correction, FrozenCorrection
from lisatune.lisa.proof import INTEGERS, fingerprint
from lisatune.nn.adapter import Adapter
from lisatune.nn.coded import CodedLinear, own_parameter, refuse_bypassed
from lisatune.nn.layers import LayerMap, select_named
from lisatune.nn.units import UnitMap
from lisatune.optim.adamw import AdamW
from lisatune.optim.group import Group, Moments
from lisatune.optim.loss_scaler import refuse_scaled_step, stop_telling, tell_of_scaler
from lisatune.optim.state import prepare

__all__ = ["LowRankCorrection"]

SCALE = 2.0
"""s. A rank that is twice as large needs no other learning rate, because s does not depend on it."""


WHICH: dict[Corrected, str] = {
    "all": "all blocks",
    "above": "active blocks and those above them",
    "frozen": "frozen blocks",
}
"""Blocks whose adapters train, in words."""


class LowRankCorrection(FrozenCorrection):
    """Adapters on the linear layers of all blocks, and the AdamW that trains them.

    The moments of the adapters have the format that `lisatune.AdamW` uses for the blocks: 8-bit beside 8-bit
    ones; float32 beside another optimizer.

    Args:
        model: has its weights on the training device.
        layers: its blocks.
        optimizer: trains the model; its learning rates say where in the schedule a step is.
        correction: rank, rates and places.
        seed: names the random numbers of A.

    Raises:
        ValueError: a rank is too large, a name is unknown, there is nothing to correct, or the model is
            divided among ranks.
    """

    def __init__(
        self, model: nn.Module, layers: LayerMap, optimizer: Optimizer, correction: Correction, *, seed: int
    ) -> None:
        if ranks.count() > 1 and not is_copied(model):
            raise ValueError(
                "correction lora works in one process, or in a loop of your own with a model that "
                "fully_shard has not divided, because adapters are not divided; use correction none"
            )
        linear = _find_linear(model, layers)
        chosen = list(linear)
        if correction.matrices:
            chosen = select_named(chosen, correction.matrices, "correction_matrices")
        self.names: dict[Adapter, str] = {}
        self.optimizer: AdamW
        self.blocks: list[list[Adapter]] = [[] for _ in layers.blocks]
        is_divided = isinstance(layers, UnitMap)
        self._block_names = [
            f"adapters of {path}" if is_divided else f"adapters of block {i}"
            for i, path in enumerate(layers.blocks)
        ]
        corrected = {name: own_parameter(linear[name][0]) for name in chosen}
        for name, weight in corrected.items():
            _check_rank(name, weight, correction.rank)
        refuse_bypassed(model, corrected.values(), "adapters; use correction none or sign")
        for name in chosen:
            layer, block = linear[name]
            key = hashlib.blake2b(f"{seed}/correction/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
            adapter = Adapter(layer, rank=correction.rank, scale=SCALE, generator=generator)
            self.names[adapter] = name
            self.blocks[block].append(adapter)
        self.optimizer = _build_optimizer(self.adapters, correction, optimizer)
        self._full_lr = _find_peak_lr(optimizer)
        self.says = f"adapters of {WHICH[correction.blocks]} moved"
        super().__init__(model, optimizer, correction)
        self._hook = optimizer.register_step_pre_hook(_refuse_scaler)
        self._was_told = tell_of_scaler(optimizer)

    @property
    def adapters(self) -> list[Adapter]:
        """All adapters, in the order of the blocks."""
        return list(self.names)

    def all_parameters(self) -> list[nn.Parameter]:
        """Return A and B of all adapters."""
        return [p for adapter in self.adapters for p in (adapter.A, adapter.B)]

    def layers(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each block's adapters, for a proof."""
        added = ([p for adapter in block for p in (adapter.A, adapter.B)] for block in self.blocks)
        return dict(zip(self._block_names, added, strict=True))

    def moving(self, active: Sequence[int]) -> set[str]:
        """Return the names of the `layers` that train while these blocks do."""
        return {name for i, name in enumerate(self.layers()) if self.trains(i, active)}

    def train(self, active: Sequence[int]) -> None:
        """Let the right adapters train, now that these blocks do."""
        for i, block in enumerate(self.blocks):
            trains = self.trains(i, active)
            for adapter in block:
                adapter.A.requires_grad_(trains)
                adapter.B.requires_grad_(trains)
                if not trains:
                    adapter.A.grad = adapter.B.grad = None

    def trains(self, block: int, active: Sequence[int]) -> bool:
        """Tell whether a block's adapters train while the blocks `active` do."""
        if self.correction.blocks == "frozen":
            return block not in active
        return self.correction.blocks == "all" or (bool(active) and block >= min(active))

    def groups(self) -> list[Group]:
        """Return A's and B's param group, with learning rates that follow the model's schedule."""
        for group, ratio in zip(self.optimizer.param_groups, (1.0, self.correction.lr_ratio), strict=True):
            group["lr"] = self.correction.lr * ratio * self._share()
        return self.optimizer.param_groups

    def step(self) -> None:
        """Update the adapters from their gradients, and release these."""
        for adapter in self.adapters:
            if adapter.is_new:
                for p in (adapter.A, adapter.B):
                    self.optimizer.state.pop(p, None)
                adapter.is_new = False
        self.groups()
        self.optimizer.step()
        self.drop_gradients()

    def make_state(self) -> None:
        """Make the moments of all adapters, as their first steps will."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
                prepare(group, p, self.optimizer.state[p])
        self.drop_gradients()

    def has_gradients(self) -> bool:
        """Whether an adapter has a gradient."""
        return any(p.grad is not None for p in self.all_parameters())

    def drop_gradients(self) -> None:
        """Release the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def detach(self, model: nn.Module) -> None:
        """Merge the adapters into the weights, once, and remove them."""
        self.merge()
        for adapter in self.adapters:
            adapter.remove()
        self._hook.remove()
        if not self._was_told:
            stop_telling(self._follows)
        super().detach(model)

    def merge(self) -> None:
        """Put what the adapters add into the weights, once. They are zero afterwards."""
        for adapter in self.adapters:
            adapter.merge()

    def _share(self) -> float:
        """Return the optimizer's learning rate as a share of its peak, such as 0.5 in a warm-up."""
        rate = _find_leading(self._follows)["lr"]
        full = _find_peak_lr(self._follows, self._full_lr)
        return 1.0 if rate is None or not full else float(rate) / full

    # ---- save and resume

    def state_dict(self) -> dict[str, Any]:
        """Return A, B, their moments, and what tells merged weights from unmerged ones.

        `base` and `merged` are fingerprints of W and of round(W + s·BA), and taking s·BA away from the
        merged weight gives W but for the elements at `places`, which were `values`. So weights that were
        saved merged are brought back bit for bit.
        """
        return {
            "full_lr": self._full_lr,
            "steps_done": self.optimizer.param_groups[0]["steps_done"],  # names the noise of bf16 moments
            "adapters": {name: self._describe(adapter) for adapter, name in self.names.items()},
        }

    def _describe(self, adapter: Adapter) -> dict[str, Any]:
        weight = adapter.weight
        described = {
            "A": adapter.A.detach(),
            "B": adapter.B.detach(),
            "A_state": dict(self.optimizer.state.get(adapter.A, {})),
            "B_state": dict(self.optimizer.state.get(adapter.B, {})),
        }
        if not has_values(weight):  # in a memory plan
            return described
        merged = adapter.add_to(weight)
        places = _find_differing(adapter.add_to(merged, times=-1), weight)
        return described | {
            "base": _print_of(weight),
            "merged": _print_of(merged),
            "places": places.to(torch.int32),
            "values": weight.reshape(-1)[places],
        }

    def check_saved(self, saved: Mapping[str, Any]) -> None:
        """Compare what `state_dict` returned with this model, and with the weights that are loaded already.

        Raises:
            ValueError: it belongs to another model, or the weights are neither those that it was saved beside
                nor these merged with the adapters.
        """
        adapters = saved["adapters"]
        for adapter, name in self.names.items():
            shapes = [tuple(adapters[name][key].shape) if name in adapters else None for key in ("A", "B")]
            if shapes != [tuple(adapter.A.shape), tuple(adapter.B.shape)]:
                raise ValueError(f"the saved adapters are those of another model: {name} has {shapes}")
        self._find_merged(adapters)

    def _find_merged(self, saved: Mapping[str, Any]) -> set[Adapter]:
        """Find the adapters whose layers hold the merged weight; the others hold the one that was trained."""
        merged = set()
        for adapter, name in self.names.items():
            found = _print_of(adapter.weight)
            if found not in (saved[name]["base"], saved[name]["merged"]):
                raise ValueError(
                    f"the weight of {name} is not the one that this optimizer state was saved beside; load "
                    "the model's weights of the same checkpoint first, and then the optimizer's state"
                )
            if found != saved[name]["base"]:
                merged.add(adapter)
        return merged

    @torch.no_grad()
    def load_weights(self, saved: Mapping[str, Any]) -> None:
        """Take A and B out of what `state_dict` returned, and nothing else."""
        for adapter, name in self.names.items():
            adapter.A.copy_(saved["adapters"][name]["A"])
            adapter.B.copy_(saved["adapters"][name]["B"])
            adapter.is_new = False

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue with saved adapters. From merged weights what the adapters had added is taken away.

        Warns if this machine computes that with other last bits than the one that saved it.
        """
        adapters, self._full_lr = saved["adapters"], saved["full_lr"]
        for group in self.optimizer.param_groups:
            group["steps_done"] = saved.get("steps_done", 0)  # older versions did not save it
        merged = self._find_merged(adapters)
        self.load_weights(saved)
        inexact = False
        for adapter, name in self.names.items():
            entry = adapters[name]
            for p, key in ((adapter.A, "A_state"), (adapter.B, "B_state")):
                self.optimizer.state.pop(p, None)
                if entry[key]:
                    self.optimizer.state[p] = {
                        k: value.detach().to(p.device, copy=True) for k, value in entry[key].items()
                    }
            if adapter in merged:
                weight = adapter.add_to(adapter.weight, times=-1)
                places = entry["places"].to(weight.device, torch.int64)
                weight.view(-1)[places] = entry["values"].to(weight)
                inexact |= _print_of(weight) != entry["base"]
                adapter.weight = weight
        if inexact:
            warnings.warn(
                "the saved weights have the adapters merged into them, and this device takes them out with "
                "other last bits than the one that saved them: training continues, and not bit for bit",
                stacklevel=2,
            )


def _find_linear(model: nn.Module, layers: LayerMap) -> dict[str, tuple[nn.Linear, int]]:
    """Return the plain linear layers of the blocks that can train, by path, each with its block's number.

    A layer with a `forward` of its own, as Accelerate's hooks give it, is not plain: an adapter would take
    that away, and W + s·BA need not do in it what W and the adapter do.
    """
    blocks: dict[Tensor, int] = {
        p: i for i, block in enumerate(layers.block_parameters(model)) for p in block.values()
    }
    found: dict[str, tuple[nn.Linear, int]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_plain = type(module) in (nn.Linear, CodedLinear) and "forward" not in vars(module)
        if is_plain and weight in blocks:
            assert isinstance(module, nn.Linear)
            found[name] = module, blocks[weight]
    if not found:
        raise ValueError(
            f"correction lora needs blocks with torch.nn.Linear layers, and those of {type(model).__name__} "
            "have none, or only such with a forward of their own; use correction none"
        )
    return found


def _check_rank(name: str, weight: Tensor, rank: int) -> None:
    if rank > min(weight.shape):
        raise ValueError(
            f"correction_rank {rank} is above the smaller side of {name} {list(weight.shape)}; use at "
            f"most {min(weight.shape)}, or name other layers in correction_matrices"
        )
    if weight.dtype == torch.float16:
        raise ValueError("correction lora cannot train beside float16 weights; load the model in bfloat16")


def _build_optimizer(adapters: Sequence[Adapter], correction: Correction, beside: Optimizer) -> AdamW:
    given: Moments = beside.defaults["moments"] if isinstance(beside, AdamW) else "fp32"
    moments: Moments = "fp32" if given == "factored" else given
    groups = [
        {"params": [adapter.A for adapter in adapters]},
        {"params": [adapter.B for adapter in adapters]},
    ]
    return AdamW(groups, lr=correction.lr, weight_decay=0.0, moments=moments)


def _find_leading(optimizer: Optimizer) -> dict[str, Any]:
    """Return the last param group whose learning rate is not zero all the time."""
    groups = optimizer.param_groups
    return next((group for group in reversed(groups) if _peak_of(group) or group["lr"]), groups[-1])


def _find_peak_lr(optimizer: Optimizer, at_attach: float | None = None) -> float | None:
    """Return the peak learning rate of a schedule; without a schedule, the one at the start."""
    group = _find_leading(optimizer)
    if (peak := _peak_of(group)) is not None:
        return peak
    return at_attach if at_attach is not None or group["lr"] is None else float(group["lr"])


def _peak_of(group: dict[str, Any]) -> float | None:
    """Return the peak that a schedule has written into a param group; None without a schedule."""
    for key in ("max_lr", "initial_lr"):  # of OneCycleLR; of every scheduler
        if group.get(key) is not None:
            return float(group[key])
    return None


def _refuse_scaler(optimizer: Optimizer, *_: Any) -> None:
    """Refuse a step of a loss scaler, as a hook of the optimizer."""
    refuse_scaled_step(optimizer, 'the gradients of adapters beside frozen blocks (correction="lora")')


def _print_of(weight: Tensor) -> int:
    return int(fingerprint([weight]))


def _find_differing(one: Tensor, other: Tensor) -> Tensor:
    """Return the places, int64, at which the bits of two tensors of one shape and dtype differ."""
    kind = INTEGERS[one.element_size()]
    return (one.reshape(-1).view(kind) != other.reshape(-1).view(kind)).nonzero()[:, 0]
