"""How `evaluate` and `generate` load models, and refuse those that do not fit."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lisatune.console import byte_text

if TYPE_CHECKING:
    import torch

__all__ = ["LoadOptions"]

LENGTH = 2048
"""Tokens of the question that the plan assumes, where the model reads as many."""


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded: the options of the command, for the model and for the one it is compared to."""

    device: str
    dtype: str
    attention: str | None
    trust_remote_code: bool

    def check(self, name: str) -> None:
        """Refuse a model that is not there or does not fit, before any weights load.

        Raises:
            FileNotFoundError: there is no such model, or adapters lack theirs.
            ValueError: it needs more memory than is free.
        """
        import torch

        from lisatune.memory.estimate import estimate_answering
        from lisatune.memory.plan import RESERVE_BYTES, RESERVE_SHARE
        from lisatune.memory.process import available_bytes
        from lisatune.models.load import adapter_base, meta_model
        from lisatune.nn.hidden import max_positions

        base, revision = adapter_base(name) or (name, None)
        try:
            shape = meta_model(base, revision=revision, **self._kinds(base, revision))
        except FileNotFoundError as error:
            if base == name:
                raise
            raise FileNotFoundError(f"the adapters in {name} belong to {base}: {error}") from error
        weights = sum(p.nbytes for p in shape.parameters())
        asked = min(max_positions(shape) or LENGTH, LENGTH)
        needed = round((weights + estimate_answering(shape, asked)) * (1 + RESERVE_SHARE))
        device = self.pick()
        needed += 0 if device.type == "cpu" else RESERVE_BYTES
        free = available_bytes(device)
        if free is not None and needed > free:
            raise ValueError(
                f"{name} needs {byte_text(needed)} by its plan (weights {byte_text(weights)}, one "
                f"question of {asked:,} tokens) and {byte_text(free)} are free on {device}; give --dtype "
                "bf16, take a larger device, or free some memory"
            )
        host = available_bytes(torch.device("cpu"))
        if host is not None and weights > host:
            raise ValueError(
                f"{name} loads {byte_text(weights)} of weights into host memory first and {byte_text(host)} "
                "are free; give --dtype bf16, or free some memory"
            )

    def load(self, name: str) -> tuple[Any, Any]:
        """Load a model and its tokenizer."""
        from lisatune.models.hf import announce_remote_code
        from lisatune.models.load import adapter_base, load_model, load_tokenizer

        announce_remote_code(name, self.trust_remote_code)
        base, revision = adapter_base(name) or (name, None)
        tokenizer = load_tokenizer(name, trust_remote_code=self.trust_remote_code)
        return load_model(name, **self._kinds(base, revision)).to(self.pick()), tokenizer

    def pick(self) -> "torch.device":
        """Return the device."""
        from lisatune.distributed.ranks import pick_device

        try:
            return pick_device(self.device)
        except ValueError as error:
            raise ValueError(str(error).replace("run.device", "--device")) from None

    def _kinds(self, base: str, revision: str | None) -> dict[str, Any]:
        import torch

        from lisatune.models.load import stored_dtype

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        trust = {"trust_remote_code": self.trust_remote_code}
        stored = None if self.dtype != "auto" else stored_dtype(base, revision=revision, **trust)
        dtype = dtypes.get(self.dtype) or stored or torch.float32
        return {"attention": self.attention, "dtype": dtype, **trust}
