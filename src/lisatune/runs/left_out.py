"""Weights that a checkpoint need not hold: those of the base model that never change, such as LoRA's.

The model that resumes has loaded them from the base model already. The checkpoint holds a hash of each in
their place, so a base model that has changed since is refused.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed.shards import reshard
from lisatune.files.tensors import named_weights
from lisatune.lisa.proof import fingerprint_whole
from lisatune.runs.named_state import MisfitError

__all__ = ["check_left_out", "hash_fixed", "name_fixed"]


def name_fixed(model: nn.Module, optimizer: Optimizer) -> set[str]:
    """Name the parameters that never change, because the optimizer does not hold them."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if p not in held}


def hash_fixed(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Hash the parameters that never change, by name; every rank must call it."""
    reshard(model)
    fixed = name_fixed(model, optimizer)
    return {name: fingerprint_whole(each) for name, each in named_weights(model).items() if name in fixed}


def check_left_out(left_out: Mapping[str, int], weights: Mapping[str, Tensor]) -> None:
    """Compare weights with the hashes that a checkpoint holds of them; every rank must call it.

    Args:
        left_out: from `hash_fixed`, when the checkpoint was saved.
        weights: those of the model that resumes.

    Raises:
        MisfitError: a weight has changed.
        LookupError, TypeError: `left_out` is not what `hash_fixed` gave.
    """
    for name, was in left_out.items():
        if not isinstance(was, int):
            raise TypeError(f"left_out.{name} is {was!r:.80}")
    changed = [name for name, was in left_out.items() if fingerprint_whole(weights[name]) != was]
    if changed:
        raise MisfitError(
            f"it holds only what trains, and the base model is another one: {len(changed)} of "
            f"{len(left_out)} frozen weights changed, first {changed[0]}; resume with the base model that "
            "the run began with"
        )
