"""The ways to fine-tune a model, by name. Adding one: its file, its line here, its page in docs/methods."""

from lisatune.methods.base import Method
from lisatune.methods.full import Full
from lisatune.methods.galore import GaLore
from lisatune.methods.lisa import Lisa
from lisatune.methods.lora import Lora

__all__ = ["METHODS", "Full", "GaLore", "Lisa", "Lora", "Method"]

METHODS: dict[str, type[Method]] = {"full": Full, "galore": GaLore, "lisa": Lisa, "lora": Lora}
