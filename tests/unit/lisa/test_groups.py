from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import tiny
from lisatune import LISA, build_adamw, find_layers, param_groups
from lisatune.lisa.checks import check_parameters, unwrap_optimizer
from lisatune.methods import Full, GaLore, Lisa
from lisatune.methods.optimizers import build_optimizer
from lisatune.optim.meter import state_bytes
from lisatune.recipe import OptimizerConfig


def test_one_group_per_layer_ends_first(tiny_llama: nn.Module) -> None:
    layers = find_layers(tiny_llama)
    groups = param_groups(tiny_llama, layers)
    assert [group["layer"] for group in groups] == ["ends", *(f"block {i}" for i in range(6))]
    assert [name for name, _ in groups[0]["params"]] == list(layers.ends)
    held = [p for group in groups for _, p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in tiny_llama.parameters()}
    assert len(held) == len(set(held))


def test_weight_decay_spares_norms_biases_and_embeddings(tiny_llama: nn.Module) -> None:
    groups = param_groups(tiny_llama, find_layers(tiny_llama), weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    spared = {name for name, value in decay.items() if value == 0}
    assert all("norm" in name or "embed_tokens" in name for name in spared)
    assert len(spared) == 2 + 2 * 6
    assert {value for name, value in decay.items() if name not in spared} == {0.1}
    order = [group["layer"] for group in groups]
    assert order == sorted(order, key=lambda layer: -1 if layer == "ends" else int(layer.split()[1]))


def test_weight_decay_spares_an_embedding_known_by_its_heads_name() -> None:
    model = nn.Module()
    model.head = nn.Linear(4, 7, bias=False)
    model.embed = nn.Embedding(7, 4)
    model.embed.weight = model.head.weight
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    groups = param_groups(model, find_layers(model, blocks="blocks"), weight_decay=0.1)
    assert [(g["layer"], g["weight_decay"]) for g in groups if g["layer"] == "ends"] == [("ends", 0.0)]


def test_build_adamw_is_fused_and_names_its_parameters(untied_llama: nn.Module) -> None:
    optimizer = build_adamw(untied_llama, find_layers(untied_llama), lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    assert optimizer.defaults["fused"]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["eps"] == 1e-6
    assert optimizer.param_groups[1]["param_names"][0] == "model.layers.0.self_attn.q_proj.weight"


def test_build_adamw_updates_strided_weights_as_contiguous_ones() -> None:
    results = []
    for is_strided in (True, False):
        model = nn.Module()
        model.embed, model.blocks = nn.Embedding(7, 4), nn.ModuleList([nn.Linear(4, 4, bias=False)])
        values = torch.linspace(-1, 1, 16).view(4, 4)
        strided = torch.stack([values, values], dim=-1)[..., 0]
        model.blocks[0].weight = nn.Parameter(strided if is_strided else strided.contiguous())
        optimizer = build_adamw(model, find_layers(model, blocks="blocks"), lr=0.1)
        assert optimizer.defaults["fused"] is not is_strided
        for _ in range(3):
            model.blocks[0](torch.eye(4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.blocks[0].weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ends_lr_is_that_of_the_ends_alone(untied_llama: nn.Module, weight_decay: float) -> None:
    layers = find_layers(untied_llama)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": weight_decay, "ends_lr": 5e-5}
    config = OptimizerConfig(**options)
    for optimizer in (
        build_adamw(untied_llama, layers, **options),
        build_optimizer(untied_llama, layers, config),
        build_optimizer(untied_llama, layers, config, ends="rows+8bit"),
        Full().build_optimizer(untied_llama, layers, config),
        Lisa(lr_scaling="none").build_optimizer(untied_llama, layers, config),
        GaLore(rank=16).build_optimizer(untied_llama, layers, config),
    ):
        rates = {(group["layer"] == "ends", group["lr"]) for group in optimizer.param_groups}
        assert rates == {(True, 5e-5), (False, 1e-3)}


@pytest.mark.parametrize("moments", ["fp32", "8bit"])  # torch's AdamW, and ours
def test_ends_lr_equal_to_lr_changes_no_bit(moments: Literal["fp32", "8bit"]) -> None:
    trained = []
    for ends_lr in (None, 1e-2, 2e-2):
        model = tiny.llama()
        layers = find_layers(model)
        config = OptimizerConfig(lr=1e-2, ends_lr=ends_lr, weight_decay=0.1, moments=moments)
        optimizer = build_optimizer(model, layers, config)
        LISA(model, optimizer, period=2, warmup=1, ends="every:2", layers=layers)
        tiny.fit(model, optimizer, 6)
        trained.append(model)
    tiny.assert_same_weights(trained[0], trained[1])
    assert tiny.moved(tiny.weights(trained[0]), trained[2]) >= {"lm_head.weight"}


def test_state_bytes_counts_every_tensor(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    assert state_bytes(optimizer) == 0
    tiny.fit(untied_llama, optimizer, 1)
    parameters = list(untied_llama.parameters())
    assert state_bytes(optimizer) == sum(8 * p.numel() + 4 for p in parameters)


def test_optimizer_inside_accelerates_wrapper_is_found(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.SGD(untied_llama.parameters())
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    assert unwrap_optimizer(untied_llama, wrapped) is optimizer
    assert unwrap_optimizer(untied_llama, optimizer) is optimizer


def deepspeed_like(base: type) -> Any:
    made = type("DeepSpeedThing", (base,), {"__module__": "deepspeed.runtime.engine"})
    return made.__new__(made)


def test_deepspeed_is_refused(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.SGD(untied_llama.parameters())
    engine = deepspeed_like(nn.Module)
    with pytest.raises(TypeError, match="cannot work with DeepSpeed"):
        unwrap_optimizer(engine, optimizer)
    with pytest.raises(TypeError, match="cannot work with DeepSpeed"):
        unwrap_optimizer(untied_llama, deepspeed_like(object))
    wrapper: Any = type("Wrapper", (), {})()
    wrapper.optimizer = deepspeed_like(object)
    with pytest.raises(TypeError, match="cannot work with DeepSpeed"):
        LISA(untied_llama, wrapper)


def test_what_is_no_optimizer_is_refused(untied_llama: nn.Module) -> None:
    wrong: Any = [1, 2]
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got list"):
        unwrap_optimizer(untied_llama, wrong)


def test_parameter_missing_in_the_optimizer_is_named(untied_llama: nn.Module) -> None:
    layers = find_layers(untied_llama)
    missing = "model.layers.3.mlp.up_proj.weight"
    optimizer = torch.optim.SGD([p for name, p in untied_llama.named_parameters() if name != missing])
    with pytest.raises(ValueError, match=f"'{missing}' is not in the optimizer, so it would never train"):
        check_parameters(layers, untied_llama, optimizer)


def test_quantised_parameter_is_named(untied_llama: nn.Module) -> None:
    head = untied_llama.lm_head
    head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    optimizer = torch.optim.SGD(untied_llama.parameters())
    with pytest.raises(ValueError, match=r"'lm_head.weight' is torch.int8 and cannot train"):
        check_parameters(find_layers(untied_llama), untied_llama, optimizer)
