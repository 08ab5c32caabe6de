"""Written models have the names of weights that vLLM and llama.cpp look for.

vLLM cannot be installed beside this package. The names below are those that its loaders know in version
0.33.0: vllm/model_executor/models/llama.py and qwen2.py, class by class.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from lisatune.models import load, save_model
from tiny_text import CHATML, byte_tokenizer

STACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""vLLM's `hf_to_vllm_mapper`: which weights of a file go into which of its own."""

IN_BLOCK = (
    *("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias", "self_attn.o_proj.weight"),
    *("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
KINDS = {"llama": (LlamaConfig, gguf.MODEL_ARCH.LLAMA), "qwen2": (Qwen2Config, gguf.MODEL_ARCH.QWEN2)}


def write(folder: Path, kind: str, *, tied: bool) -> Any:
    """Write a model as a run does, and return it."""
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    config = KINDS[kind][0](vocab_size=len(tokenizer), tie_word_embeddings=tied, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 2]
    )
    save_model(model, tokenizer, folder)
    return model


def names_in(folder: Path) -> set[str]:
    """Names of all tensors in a folder's files."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_and_llama_cpp_know_every_name_and_miss_none(kind: str, tied: bool, tmp_path: Path) -> None:
    write(tmp_path / "out", kind, tied=tied)
    names = names_in(tmp_path / "out")

    vllms = {re.sub(r"\b(" + "|".join(STACKED) + r")\b", lambda match: STACKED[match[1]], n) for n in names}
    in_blocks = [f"model.layers.{i}.{name}" for i in range(3) for name in IN_BLOCK]
    if kind == "llama":
        in_blocks = [name for name in in_blocks if not name.endswith(".bias")]
    assert vllms == {*in_blocks, *OUTSIDE} - ({"lm_head.weight"} if tied else set())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied  # by which both take the embedding as head, or not
    assert config["architectures"] == [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]]

    known = gguf.get_tensor_name_map(KINDS[kind][1], 3)
    assert [name for name in names if known.get_name(name, (".weight", ".bias")) is None] == []


def test_generation_config_and_chat_template_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", "llama", tied=True)
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.eos_token_id) == (True, 0.6, 0.9, [1, 2])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


def test_weights_are_divided_into_files_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LARGEST_FILE", "20KB")
    model = write(tmp_path / "out", "llama", tied=False)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 22_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
