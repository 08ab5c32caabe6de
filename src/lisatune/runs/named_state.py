"""Optimizer state under parameter names, and any state as JSON with its tensors beside it.

`optimizer.state_dict()` numbers the parameters, so after a change of their order a state would load silently
onto the wrong ones. Here names replace the numbers, and loading compares them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "MisfitError",
    "check_kinds",
    "check_same",
    "from_json",
    "from_names",
    "to_json",
    "to_names",
]


class MisfitError(ValueError):
    """A saved state belongs to another model or optimizer."""


def to_names(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the optimizer's state_dict, with parameter names in place of numbers.

    Returns:
        The state_dict without its state tensors, and those tensors by "PARAMETER//KEY". Only parameters that
        have state are in either.

    Raises:
        ValueError: the optimizer holds a parameter that the model does not own.
    """
    names = _group_names(model, optimizer)
    flat = [name for group in names for name in group]
    state_dict = optimizer.state_dict()
    if "lisa" in state_dict:  # whose list of names says the same, in an order that no longer matters
        state_dict["lisa"] = {key: value for key, value in state_dict["lisa"].items() if key != "parameters"}
    plain: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for index, nested in state_dict["state"].items():
        entry = _flatten(nested)
        plain[flat[index]] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {
            f"{flat[index]}//{key}": value for key, value in entry.items() if isinstance(value, Tensor)
        }
    groups = [{**group, "params": names[i]} for i, group in enumerate(state_dict["param_groups"])]
    return {**state_dict, "state": plain, "param_groups": groups}, tensors


def from_names(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Turn the result of `to_names` back into a state_dict for `optimizer.load_state_dict`.

    Raises:
        MisfitError: a parameter is missing, new, or in another param group; the message names the first.
    """
    names = _group_names(model, optimizer)
    where = {name: f"in group {i}" for i, group in enumerate(names) for name in group}
    saved_where = {
        name: f"in group {i}" for i, group in enumerate(saved["param_groups"]) for name in group["params"]
    }
    check_same("the optimizer's parameters", saved_where, where)
    index = {name: i for i, name in enumerate(where)}
    flat = {index[name]: dict(entry) for name, entry in saved["state"].items()}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("//")
        flat[index[name]][part] = tensor
    state = {number: _nest(entry) for number, entry in flat.items()}
    groups = [
        {**group, "params": [index[name] for name in names[i]]}
        for i, group in enumerate(saved["param_groups"])
    ]
    return {**saved, "state": state, "param_groups": groups}


def _flatten(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dicts inside a parameter's state, which bitsandbytes has, into keys "OUTER/INNER"."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        inside = value.items() if isinstance(value, Mapping) else ()
        flat |= {f"{key}/{inner}": item for inner, item in inside} if inside else {key: value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_flatten`."""
    entry: dict[str, Any] = {}
    for key, value in flat.items():
        outer, has_inner, inner = key.partition("/")
        if has_inner:
            entry.setdefault(outer, {})[inner] = value
        else:
            entry[key] = value
    return entry


def check_same(what: str, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare two descriptions by name.

    Raises:
        MisfitError: they differ; the message names the first difference.
    """
    for name in (*saved, *now):
        if saved.get(name) != now.get(name):
            was, is_now = saved.get(name, "not there"), now.get(name, "not there")
            raise MisfitError(f"{what} are not the saved ones: {name} was {was} and is {is_now}")


def check_kinds(what: str, saved: Any, now: Any) -> None:
    """Compare the kinds of plain values, in depth: a number must match a number, text must match text.

    None matches anything, and lists of different lengths match whatever they hold.

    Raises:
        TypeError: two kinds differ; the message names the first.
    """
    if isinstance(now, Mapping):
        if not isinstance(saved, Mapping):
            raise TypeError(f"{what} is {saved!r:.80}")
        for key in now:
            if key in saved:
                check_kinds(f"{what}.{key}", saved[key], now[key])
    elif isinstance(now, list | tuple):
        if not isinstance(saved, list | tuple):
            raise TypeError(f"{what} is {saved!r:.80}")
        if len(saved) == len(now):
            for i, pair in enumerate(zip(saved, now, strict=True)):
                check_kinds(f"{what}.{i}", *pair)
    elif now is not None and saved is not None:
        kinds = int | float if isinstance(now, int | float) else type(now)
        if not isinstance(saved, kinds):
            raise TypeError(f"{what} is {saved!r:.80}")


def to_json(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a state into JSON, and move its tensors into `tensors`, named by their path.

    Tuples, and dicts whose keys are not text, are marked so that `from_json` restores them.

    Raises:
        TypeError: a value is neither a tensor nor JSON.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, tuple):
        return {"__tuple__": [to_json(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [to_json(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, to_json(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        is_json = all(isinstance(key, str) and not key.startswith("__") for key in value)
        return dict(items) if is_json else {"__items__": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot save {path}: {type(value).__name__} is neither a tensor nor JSON")


def from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Turn JSON from `to_json` back into the state."""
    if isinstance(value, list):
        return [from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(from_json(value["__tuple__"], tensors))
    items = value["__items__"] if "__items__" in value else value.items()
    return {key: from_json(item, tensors) for key, item in items}


def _group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"param group {i} holds a parameter of shape {list(parameter.shape)} that the model does "
                    "not own; build the optimizer over this model"
                )
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
