"""Loss scalers, and what holds gradients that they do not divide.

torch's GradScaler multiplies the loss. In `scaler.unscale_(optimizer)` and `scaler.step(optimizer)` it
divides the gradients of the parameters in `optimizer.param_groups`, and no others. So adapters that are in no
group would train on gradients that are too large by the scale, and an update in backward comes before the
division.

GradScaler tells an optimizer of itself if the optimizer says that it divides its own gradients, as torch's
fused ones do: for the length of `step()` it has the attributes `grad_scale` and `found_inf`.
"""

from torch.optim import Optimizer

__all__ = ["refuse_scaled_step", "stop_telling", "tell_of_scaler"]

SAYS = "_step_supports_amp_scaling"
"""The attribute by which an optimizer says that it divides its own gradients."""


def tell_of_scaler(optimizer: Optimizer) -> bool:
    """Let a loss scaler tell this optimizer of itself, and return whether it would have done so before.

    Call `refuse_scaled_step` at the start of each step then, because the scaler leaves dividing to the
    optimizer.
    """
    told = bool(getattr(optimizer, SAYS, False))
    setattr(optimizer, SAYS, True)
    return told


def stop_telling(optimizer: Optimizer) -> None:
    """Undo `tell_of_scaler`; only if that returned False."""
    vars(optimizer).pop(SAYS, None)


def refuse_scaled_step(optimizer: Optimizer, what: str) -> None:
    """Refuse a step that a loss scaler makes.

    Args:
        optimizer: `tell_of_scaler` was called for it.
        what: which gradients the scaler does not divide, as the subject of a sentence.

    Raises:
        ValueError: an enabled loss scaler has called `optimizer.step()`.
    """
    given = vars(optimizer)
    if given.pop("found_inf", None) is not None:
        given.pop("grad_scale", None)
        raise ValueError(
            f"{what} are still multiplied by the scale of a loss scaler (GradScaler), which divides only the "
            "gradients that the optimizer's parameters hold when it steps; bfloat16 and float32 need no "
            "scaler, so use GradScaler(enabled=False)"
        )
