"""Prompt tuning (Lester et al., arXiv 2104.08691) with PEFT: trained embeddings before a sequence."""

from dataclasses import dataclass
from typing import Any, Literal, final

from torch import nn

from lisatune.methods.adapters import VirtualTokens

__all__ = ["Prompt"]


@final
@dataclass(frozen=True, kw_only=True)
class Prompt(VirtualTokens):
    """Embeddings of virtual tokens before the sequence train, no weight does."""

    name = "prompt"
    lr_scale = 100.0

    init: Literal["vocabulary", "random"] = "vocabulary"
    """They start as embeddings of random tokens of the vocabulary, or as random numbers of variance 1."""

    def make_config(self, model: nn.Module) -> Any:
        """Make PEFT's PromptTuningConfig."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            prompt_tuning_init={"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}[self.init],
            task_type="CAUSAL_LM",
        )
