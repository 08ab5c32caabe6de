"""What happens to optimizer state when a parameter freezes, and when it thaws.

`LISA(state=…)` names the policy for moments. An optimizer may also name keys that must outlive a freeze, in
its attribute `lasting_state`. In `lisatune.AdamW` that is `remainder`, the low 16 bits of a bf16 weight's
float32 value: it is part of the weight, and dropping it would round the weight. Under every policy these keys
go to host memory when a parameter freezes and come back when it thaws; a reset leaves them in place. The
optimizer initialises the keys that it does not find.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.optim.meter import restore_dtypes, tensors_bytes

__all__ = ["FrozenState", "HostState", "StatePolicy"]

StatePolicy = Literal["drop", "reset", "second_moment", "cpu", "keep"]
"""What happens to the optimizer state of a parameter that freezes; see `LISA`."""


class FrozenState:
    """Releases the state of parameters that freeze, or keeps it in host memory until they thaw.

    Args:
        optimizer: whose state it is. The keys in its attribute `lasting_state` outlive every freeze.
        policy: `drop` and `reset` release all other state. `cpu` keeps it in host memory, `second_moment`
            all but AdamW's first moment. `keep` does nothing.
    """

    def __init__(self, optimizer: Optimizer, policy: StatePolicy) -> None:
        self._optimizer, self._policy = optimizer, policy
        self._lasting: tuple[str, ...] = tuple(getattr(optimizer, "lasting_state", ()))
        self._host = HostState()

    def freeze(self, parameter: nn.Parameter) -> None:
        """Take a parameter's state out of the optimizer, and keep in host memory what the policy keeps."""
        if self._policy == "keep" or parameter not in self._optimizer.state:
            return
        released = self._optimizer.state.pop(parameter)
        kept = self._select_lasting(released)
        if self._policy == "cpu":
            kept = released
        elif self._policy == "second_moment":
            kept |= _select_second_moment(released)
        if kept:
            self._host.put(parameter, kept)

    def thaw(self, parameter: nn.Parameter) -> None:
        """Give the optimizer back what was kept."""
        kept = self._host.take(parameter)
        if kept is None:
            return
        if self._policy == "second_moment" and "exp_avg_sq" in kept:
            # torch's AdamW initialises all state or none
            kept["exp_avg"] = torch.zeros_like(kept["exp_avg_sq"])
        self._optimizer.state[parameter] = kept

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Release all state of parameters, also in host memory; `keep` does nothing."""
        for parameter in parameters if self._policy != "keep" else ():
            self._optimizer.state.pop(parameter, None)
            self._host.drop(parameter)

    def reset(self) -> None:
        """Clear the optimizer's state, except for lasting keys."""
        lasting = {p: self._select_lasting(entry) for p, entry in self._optimizer.state.items()}
        self._optimizer.state.clear()
        self._optimizer.state.update({p: entry for p, entry in lasting.items() if entry})

    def detach(self) -> None:
        """Give the optimizer back the lasting keys of all parameters, and forget the rest."""
        for parameter in self._host.parameters():
            kept = self._host.take(parameter)
            lasting = self._select_lasting(kept or {})
            if lasting:
                self._optimizer.state[parameter] = lasting

    def add_to(self, state: dict[int, Any]) -> None:
        """Add the kept state to the `state` of a state_dict."""
        for index, parameter in enumerate(_iterate(self._optimizer)):
            kept = self._host.get(parameter)
            if kept is not None:
                state[index] = kept

    def load(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Forget the kept state, because the optimizer has just loaded a state_dict.

        Args:
            saved: the `state` of that state_dict.
        """
        self._host.clear()
        if self._lasting:  # loading may have cast an integer remainder to a float
            restore_dtypes(self._optimizer, saved)

    def nbytes(self) -> int:
        """Count the bytes kept in host memory."""
        return self._host.nbytes()

    def _select_lasting(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: entry[key] for key in self._lasting if key in entry}


class HostState:
    """Optimizer state of frozen parameters in host memory.

    Tensors come back to the device they were on, so a step counter that AdamW keeps on the CPU stays there.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, dict[str, Any]] = {}
        self._devices: dict[nn.Parameter, dict[str, torch.device]] = {}

    def put(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Move one parameter's state to host memory."""
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        self._devices[parameter] = {key: value.device for key, value in tensors.items()}
        self._kept[parameter] = {**state, **{key: value.cpu() for key, value in tensors.items()}}

    def take(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """Move one parameter's state back to its device; None if there is none."""
        state = self._kept.pop(parameter, None)
        if state is None:
            return None
        devices = self._devices.pop(parameter)
        return {key: value.to(devices[key]) if key in devices else value for key, value in state.items()}

    def get(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """Return one parameter's state as it is kept; None if there is none."""
        return self._kept.get(parameter)

    def drop(self, parameter: nn.Parameter) -> None:
        """Forget one parameter's state."""
        self._kept.pop(parameter, None)
        self._devices.pop(parameter, None)

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters whose state is kept."""
        return tuple(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._devices.clear()

    def nbytes(self) -> int:
        """Count the bytes kept."""
        return tensors_bytes(
            v for state in self._kept.values() for v in state.values() if isinstance(v, Tensor)
        )


def _select_second_moment(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return all but the first moment; empty for state without Adam's second moment.

    Empty too if the optimizer would miss what is left out: only one `exp_avg` of the second moment's shape
    comes back, as zeros, and `lisatune.AdamW` makes its 8-bit codes anew.
    """
    kept = {key: value for key, value in entry.items() if not _is_first_moment(key)}
    if "step" not in kept or not any(key.startswith("exp_avg_sq") for key in kept):
        return {}
    left_out = entry.keys() - kept.keys()
    comes_back = {"exp_avg"} if "exp_avg_sq" in kept else {"exp_avg_codes", "exp_avg_scales"}
    return kept if left_out <= comes_back else {}


def _is_first_moment(key: str) -> bool:
    return key.startswith("exp_avg") and not key.startswith("exp_avg_sq")


def _iterate(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    """Iterate over parameters in the order in which a state_dict numbers them."""
    return (p for group in optimizer.param_groups for p in group["params"])
