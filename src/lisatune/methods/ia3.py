"""IA3 (Liu et al., arXiv 2205.05638) by way of PEFT: learned vectors scale activations."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lisatune.methods.adapters import Adapters, linear_layers, named_modules_among

__all__ = ["Ia3"]


@dataclass(frozen=True, kw_only=True)
class Ia3(Adapters):
    """Vectors that scale keys, values and the feed-forward's inner activations train, no weight does."""

    lr_scale = 30.0

    name: Literal["ia3"] = "ia3"
    """Way to fine-tune."""

    targets: tuple[str, ...] = ()
    """Names of the linear layers that are scaled. Default: PEFT's choice for the architecture."""

    feedforward: tuple[str, ...] = ()
    """Those among `targets` whose input is scaled, not their output. Default: PEFT's choice."""

    def __post_init__(self) -> None:
        if self.targets and not set(self.feedforward) <= set(self.targets):
            other = sorted(set(self.feedforward) - set(self.targets))
            raise ValueError(f"method.feedforward names {other[0]!r}, which is not in method.targets; add it")
        if self.feedforward and not self.targets:
            raise ValueError("method.feedforward needs method.targets; name all layers that are scaled")

    def peft_config(self, model: nn.Module) -> Any:
        """PEFT's IA3Config; ValueError where a target is no layer of the model, or none is known."""
        from peft import IA3Config
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

        linear = linear_layers(model)
        if self.targets:
            targets = named_modules_among(linear, self.targets, "method.targets")
            inputs = named_modules_among(linear, self.feedforward, "method.feedforward")
            return IA3Config(target_modules=targets, feedforward_modules=inputs, task_type="CAUSAL_LM")
        kind = model.config.get_text_config().model_type  # type: ignore[operator,union-attr]
        if kind not in KNOWN:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(
                f"PEFT has no choice of layers for ia3 in {kind}; name those of keys, values and the last of "
                f"the feed-forward in method.targets, the last in method.feedforward too, out of {names}"
            )
        return IA3Config(task_type="CAUSAL_LM")
