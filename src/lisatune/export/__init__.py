"""A run's model in other forms: the weights that changed, LoRA adapters, GGUF, and the hub."""

from lisatune.export.delta import apply_delta as apply_delta
from lisatune.export.delta import write_delta as write_delta
from lisatune.export.lora import extract_lora as extract_lora
