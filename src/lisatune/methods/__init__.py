"""The ways to fine-tune a model, by name. Adding one: its file, its line here, its page in docs/methods."""

from lisatune.methods.base import Method
from lisatune.methods.full import Full
from lisatune.methods.lisa import Lisa

__all__ = ["METHODS", "Full", "Lisa", "Method"]

METHODS: dict[str, type[Method]] = {"full": Full, "lisa": Lisa}
