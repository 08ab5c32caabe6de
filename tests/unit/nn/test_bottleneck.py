"""Where bottleneck adapters go, what they compute, and which models do not show their places."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)

import tiny
from lisatune.nn.bottleneck import Bottleneck, add_bottlenecks, find_bottlenecks, find_outputs, find_tuned

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

PLACES = {
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), ["attn.c_proj", "mlp.c_proj"]),
    "opt": (OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), ["self_attn.out_proj", "fc2"]),
    "neox": (GPTNeoXConfig(**SIZES), ["attention.dense", "mlp.dense_4h_to_h"]),
    "phi3": (Phi3Config(**SIZES, pad_token_id=0), ["self_attn.o_proj", "mlp.down_proj"]),
    "falcon": (FalconConfig(**SIZES, ffn_hidden_size=48), ["self_attention.dense", "mlp.dense_4h_to_h"]),
}


@pytest.mark.parametrize("kind", PLACES)
def test_adapters_follow_the_last_layer_of_attention_and_of_mlp(kind: str) -> None:
    config, places = PLACES[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_outputs(model)
    assert len(found) == 4
    assert [path.rpartition(".0.")[2] for path in found[:2]] == places


def test_experts_do_not_show_where_an_mlp_ends() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_key_value_heads=4))
    with pytest.raises(ValueError, match=r"does not show which layers end its attention .* k_proj, o_proj"):
        find_outputs(model)
    assert len(find_outputs(model, ["o_proj"])) == 2


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["o_proj", "fc2"], "no linear layer 'fc2'"),
        (["gate_proj"], "has 48 outputs and the hidden size is 32"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_outputs(tiny.llama(), names)


def test_an_adapter_adds_what_the_paper_says() -> None:
    torch.manual_seed(0)
    adapter = Bottleneck(8, 3, torch.device("cpu"))
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 8)
    for row in (0, 1):
        for t in range(5):
            narrow = [_gelu(adapter.down[i] @ x[row, t] + adapter.down_bias[i]) for i in range(3)]
            added = sum(adapter.up[:, i] * narrow[i] for i in range(3)) + adapter.up_bias
            torch.testing.assert_close(adapter(x)[row, t], x[row, t] + added)


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_nearly_the_identity_in_any_dtype(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    ids = tiny.tokens(0)
    before = model(ids).logits
    add_bottlenecks(model, 8, find_outputs(model))
    after = model(ids).logits
    assert len(find_bottlenecks(model)) == 12
    assert after.dtype == dtype
    assert not torch.equal(before, after)
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_norms_train_with_the_adapters_if_asked() -> None:
    model = tiny.llama(blocks=1)
    add_bottlenecks(model, 8, find_outputs(model))
    adapters = set(find_tuned(model, norms=False))
    assert len(adapters) == 8
    norms = {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
    assert set(find_tuned(model, norms=True)) == adapters | norms
