"""`lisatune layers`: every parameter in one row, whatever the model."""

import io

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    PreTrainedConfig,
)

from lisatune.cli.layers import list_layers, print_layers

SMALL = {"num_attention_heads": 4, "vocab_size": 100}
DEEPSEEK = DeepseekV3Config(
    num_hidden_layers=5,
    first_k_dense_replace=2,
    hidden_size=32,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_key_value_heads=4,
    **SMALL,
)
GEMMA = Gemma3Config(text_config={"num_hidden_layers": 3}, vision_config={"num_hidden_layers": 2})


@pytest.mark.parametrize(
    "config", [GPT2Config(n_layer=3), DEEPSEEK, GEMMA], ids=lambda config: config.model_type
)
def test_the_rows_hold_every_parameter_once(config: PreTrainedConfig) -> None:
    auto = AutoModelForImageTextToText if config is GEMMA else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    rows = list_layers(model)
    assert sum(count for *_, count in rows) == sum(p.numel() for p in model.parameters())
    blocks = {"gpt2": ["3 blocks"], "deepseek_v3": ["2 blocks", "3 blocks"], "gemma3": ["3 blocks"]}
    assert [kind for kind, *_ in rows if "block" in kind] == blocks[config.model_type]
    frozen = ["model.vision_tower", "model.multi_modal_projector"] if config is GEMMA else []
    assert [where for kind, where, *_ in rows if kind == "frozen"] == frozen


def test_tied_weights_and_the_share_that_trains_are_shown() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_layers("my/[gpt2]", model, console)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert "my/[gpt2]: 124.4M parameters" in out
    assert "transformer.wte.weight = lm_head.weight" in out
    assert "transformer.h.0 … transformer.h.11" in out
    assert "LISA with active=2 trains 53.6M parameters at a time (43.0%): the ends and 2 of 12 blocks." in out
    assert max(map(len, out.splitlines())) <= 100
