import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import lisatune.train.flops
import tiny_run
from lisatune.nn.layers import find_layers
from lisatune.train.flops import PEAKS, needed_flops, peak_flops, utilization
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe

HEADS, SIZE, BLOCKS, LENGTH = 4, 8, 3, 24
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
CONFIG = LlamaConfig(**SHAPE)
ATTENTION = 2 * HEADS * SIZE * LENGTH**2
"""Forward FLOPs of attention in one block: what is needed is half of what the eager kernel computes."""


def counted(model: Any) -> int:
    """Let torch count the FLOPs of a step."""
    ids_BT = torch.arange(2 * LENGTH).view(2, LENGTH) % CONFIG.vocab_size
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return counter.get_total_flops()


def freeze(model: Any, *names: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in names))


@pytest.mark.parametrize("frozen", [(), ("layers.0", "layers.2"), ("layers.",)], ids=["full", "lisa", "ends"])
def test_flops_are_those_that_torch_counts(frozen: tuple[str, ...]) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    freeze(model, *frozen)
    needed = needed_flops(model, find_layers(model), [LENGTH, LENGTH])
    assert needed is not None
    rope = 2 * 2 * LENGTH * SIZE // 2  # torch counts the products that make the angles of positions
    assert counted(model) - needed - 2 * 3 * BLOCKS * ATTENTION == pytest.approx(0, abs=2 * rope)


def test_backward_ends_at_the_lowest_layer_that_trains() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    freeze(model, "layers.0", "layers.1", "embed_tokens", "lm_head", "norm")
    needed = needed_flops(model, find_layers(model), [LENGTH, LENGTH])
    assert needed is not None
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    forward, tokens = 2 * (BLOCKS * block + head), 2 * LENGTH
    assert needed == tokens * (forward + 2 * head + 2 * block + 2 * block) + 2 * (BLOCKS + 2) * ATTENTION
    # Autograd leaves out the input gradients of q, k and v of the lowest block too.
    qkv = 2 * tokens * (32 * 32 + 2 * 32 * 16)
    assert counted(model) == pytest.approx(needed + 2 * (BLOCKS + 2) * ATTENTION - qkv, abs=2 * tokens * SIZE)


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    config = Qwen3MoeConfig(
        **SHAPE, head_dim=SIZE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = find_layers(model)
    experts = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 3)
    sparse = needed_flops(model, layers, [LENGTH])
    model.config.num_experts_per_tok = 8
    dense = needed_flops(model, layers, [LENGTH])
    assert sparse is not None
    assert dense is not None
    assert dense - sparse == 3 * 2 * LENGTH * experts * 6 // 8
    model.config.num_experts_per_tok = 0
    assert needed_flops(model, layers, [LENGTH]) is None


def test_a_run_on_a_known_card_notes_its_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_run.write_model(tmp_path / "tiny"), tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = load_recipe(tiny_run.write_recipe(tmp_path, model, rows))
    monkeypatch.setattr(lisatune.train.flops, "peak_flops", lambda device: 1e9)
    train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["mfu"] > 0 for line in lines if "loss" in line)


def test_cards_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name_of_card, name in (
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L4", "L4"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name_of_card: name)
        assert peak_flops(torch.device("cuda")) == PEAKS[name]
    card = torch.device("cuda")
    assert utilization(10**12, 0.5, card, ranks=2) == {"mfu": 10**12 / PEAKS["L4"]}
    assert utilization(None, 0.5, card) == utilization(1, 1.0, torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce 256")
    assert peak_flops(torch.device("cuda")) is None
