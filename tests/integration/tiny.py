"""A tiny llama for the integration tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """6 blocks, untied; the same weights for the same seed."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
