"""What is known of a training step's memory: planned or measured. `lisatune.storage` says what is what."""

from dataclasses import dataclass

__all__ = ["CATEGORIES", "PHASES", "StepMemory"]

CATEGORIES = ("weights", "gradients", "optimizer state", "activations", "loss", "workspace")
PHASES = ("forward", "loss", "backward", "clip", "optimizer step")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one training step, in bytes of live tensor storages."""

    peak_bytes: int
    """Most bytes at once."""

    phase: str
    """Where that was, one of PHASES. The loss's backward pass belongs to `loss`."""

    at_peak: dict[str, int]
    """Bytes of each category at the peak; their sum is `peak_bytes`."""

    by_phase: dict[str, int]
    """Most bytes in each phase the step went through."""

    static_bytes: int
    """Bytes at the end of the step: weights and optimizer state."""

    host_bytes: int = 0
    """Bytes of optimizer state with `state_device: cpu`. In the step that makes it `peak_bytes` has it too;
    later no other figure counts it."""
