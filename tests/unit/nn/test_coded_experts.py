"""Experts that are codes compute what transformers' own do with the decoded weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

import tiny
from lisatune import LISA, AdamW
from lisatune.nn.coded import CODED_CLASSES, coded_weights, exact_parameters
from lisatune.nn.coded_experts import CodedExperts, name_experts

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 40},
    "gpt_oss": {"num_local_experts": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention", "moe"],
        "n_routed_experts": 5,
        "moe_intermediate_size": 40,
        "moe_latent_size": None,
    },
}
"""Gated; narrow; interleaved with biases and transposed matrices; without a gate."""

family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).to(dtype)


def attach(model: nn.Module, **options: Any) -> tuple[AdamW, LISA]:
    """γ = 1 and the full proof, in int8."""
    optimizer = AdamW(model.parameters(), lr=1e-2)
    chosen = {"active": 1, "period": 2, "verify": "full", "frozen_weights": "int8", **options}
    return optimizer, LISA(model, optimizer, **chosen)


def experts(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, CodedExperts) or name_experts(each)]


def logits(model: Any, *, step: int = 0) -> Tensor:
    result: Tensor = model(input_ids=tiny.tokens(step) % 32, use_cache=False).logits
    return result


def decoded(model: nn.Module, family: str, dtype: torch.dtype) -> Any:
    """A model of transformers alone, with the decoded weights."""
    plain = make(family, dtype)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, coded in coded_weights(model).items():
            weight = plain.get_parameter(name)
            weight.copy_(coded.format.decode(coded.codes, weight.shape, dtype))
    return plain


@family
@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_coded_experts_compute_with_decoded_weights(family: str, bits: str, implementation: str) -> None:
    model = make(family)
    attach(model, frozen_weights=bits, ends="frozen")
    assert sum(isinstance(each, CodedExperts) for each in experts(model)) >= len(experts(model)) - 1 > 0
    plain = decoded(model, family, torch.float32)
    plain.set_experts_implementation(implementation)
    for each in (model, plain):
        each.train()
        (logits(each) ** 2).sum().backward()
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, atol=1e-5, rtol=1e-3, msg=name)


@family
def test_evaluation_computes_with_exact_experts(family: str) -> None:
    model, exact = make(family), make(family)
    attach(model, frozen_weights="nf4")
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits(model.eval()), logits(exact.eval()), atol=1e-5, rtol=1e-4)
        coded = logits(model.train())
    assert (coded - logits(exact)).abs().max() > 1e-3


@family
@pytest.mark.parametrize("unit", ["block", "module"])
def test_experts_train_while_they_are_exact_and_stay_what_they_were_while_they_are_codes(
    family: str, unit: str
) -> None:
    model = make(family)
    kinds = {type(each) for each in experts(model)}
    before = tiny.weights(model)
    optimizer, lisa = attach(model, unit=unit)
    for step in range(8):
        logits(model, step=step).log_softmax(-1)[..., 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    lisa.check()
    moved = tiny.moved(before, model)
    lisa.detach()
    assert tiny.moved(before, model) == moved
    assert any("experts" in name for name in moved)
    assert {type(each) for each in experts(model)} == kinds
    assert coded_weights(model) == {}


@family
@pytest.mark.filterwarnings("ignore:.*did not require grad when LISA was attached:UserWarning")
def test_experts_of_which_only_one_matrix_trains_have_the_gradients_of_exact_ones(family: str) -> None:
    model = make(family)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("up_proj"))  # frozen by the user, so codes in all periods
    attach(model, active=len(experts(model)), sampler="uniform")
    halves = [each for each in experts(model) if isinstance(each, CodedExperts) and len(each._coded) == 1]
    assert halves
    plain = decoded(model, family, torch.float32)
    for each in (model, plain):
        (logits(each.train()) ** 2).sum().backward()
    for half in halves:
        name = next(name for name, p in model.named_parameters() if p is half.down_proj)
        expected = plain.get_parameter(name).grad
        torch.testing.assert_close(half.down_proj.grad, expected, atol=1e-5, rtol=1e-3)


def test_bf16_copies_checkpointing_and_autocast() -> None:
    model = make("qwen3_moe", torch.bfloat16)
    attach(model)
    plain = decoded(model, "qwen3_moe", torch.bfloat16)
    torch.testing.assert_close(logits(model.train()), logits(plain.train()), atol=2e-2, rtol=2e-2)
    twin = copy.deepcopy(model)
    assert coded_weights(twin).keys() == coded_weights(model).keys()
    assert torch.equal(logits(twin), logits(model))
    wide = make("qwen3_moe")
    attach(wide)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = logits(wide.train())
    torch.testing.assert_close(narrow, logits(wide), atol=3e-2, rtol=3e-2, check_dtype=False)
    gradients = []
    for reentrant in (None, True, False):
        model = make("qwen3_moe")
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        attach(model)
        logits(model.train()).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.equal(other[name], gradient) for name, gradient in gradients[0].items())


def test_exact_experts_are_what_a_state_dict_holds_and_takes() -> None:
    model = make("gpt_oss")
    attach(model)
    name = next(name for name in coded_weights(model) if name.endswith("gate_up_proj"))
    other = {name: weight + 1 for name, weight in model.state_dict().items()}
    assert not any("codes" in key for key in other)
    model.load_state_dict(other)
    assert torch.equal(exact_parameters(model)[name], other[name])
    assert torch.equal(coded_weights(model)[name].codes["scales"], other[name].abs().amax(-1) / 127)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_resume_in_the_middle_of_a_period_is_bit_equal(bits: str) -> None:
    def go(model: Any, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            logits(model.train(), step=step).log_softmax(-1)[..., 0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, begun, resumed = make("qwen3_moe"), make("qwen3_moe"), make("qwen3_moe")
    optimizer, _ = attach(whole, frozen_weights=bits)
    go(whole, optimizer, range(7))
    optimizer, _ = attach(begun, frozen_weights=bits)
    go(begun, optimizer, range(3))
    resumed.load_state_dict(begun.state_dict())
    other, _ = attach(resumed, frozen_weights=bits)
    other.load_state_dict(optimizer.state_dict())
    go(resumed, other, range(3, 7))
    tiny.assert_same_weights(resumed, whole)


def test_experts_with_a_forward_of_another_kind_stay_exact() -> None:
    config = Llama4TextConfig(**SMALL | {"num_local_experts": 4, "intermediate_size_mlp": 24})
    model = Llama4ForCausalLM(config)
    with pytest.raises(
        ValueError,
        match=r"only \d+% .* or transformers' experts.* in Llama4TextExperts; use frozen_weights exact",
    ):
        attach(model)
    model = make("mixtral")
    first = experts(model)[0]
    first.forward = type(first).forward.__get__(first)  # as hooks of Accelerate's device_map do
    assert name_experts(first) == ()
    assert type(experts(model)[0]) in CODED_CLASSES
