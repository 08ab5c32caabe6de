"""Prompt tuning (Lester et al., arXiv 2104.08691) by way of PEFT: trained embeddings before a sequence."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lisatune.methods.adapters import VirtualTokens

__all__ = ["Prompt"]


@dataclass(frozen=True, kw_only=True)
class Prompt(VirtualTokens):
    """Embeddings of virtual tokens before the sequence train, no weight does."""

    lr_scale = 100.0

    name: Literal["prompt"] = "prompt"
    """Way to fine-tune."""

    init: Literal["vocabulary", "random"] = "vocabulary"
    """They start as embeddings of random tokens of the vocabulary, or as random numbers of variance 1."""

    def peft_config(self, model: nn.Module) -> Any:
        """PEFT's PromptTuningConfig."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            prompt_tuning_init={"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[self.init],
            task_type="CAUSAL_LM",
        )
