from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
)
from transformers.utils import logging

from lisatune.losses.causal_lm import CausalLMLoss, chunked_cross_entropy, evaluation_mode
from lisatune.models.load import load_model

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4}

CONFIGS = {
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**SHAPE),
    "gemma2 with a cap": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.05),
    "granite divides": GraniteConfig(**SHAPE, logits_scaling=8.0),
    "cohere multiplies": CohereConfig(**SHAPE, logit_scale=0.25),
    "gpt2": GPT2Config(**GPT2, loss_type="ForCausalLM"),
    "phi with a head bias": PhiConfig(**SHAPE),
    "opt with a projection": OPTConfig(**OPT, word_embed_proj_dim=16),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "bloom without position ids": BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()


def build(config: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def batch(rows: int = 2, length: int = 300) -> dict[str, Tensor]:
    ids_BT = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :50] = -100
    labels_BT[-1, 200:] = -100
    return {"input_ids": ids_BT, "labels": labels_BT, "position_ids": torch.arange(length).expand(rows, -1)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_are_those_of_transformers(config: object) -> None:
    model = build(config).eval()
    rows = batch()
    loss_fn = CausalLMLoss(model)
    loss_sum, num_tokens = loss_fn(rows)
    (loss_sum / num_tokens).backward()
    ours = gradients(model)
    theirs = model(input_ids=rows["input_ids"], labels=rows["labels"], use_cache=False).loss
    theirs.backward()

    assert loss_fn.is_chunked
    assert num_tokens == 250 + 199
    assert loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum / num_tokens, theirs, rtol=1e-6, atol=0)
    # Sums over 449 tokens in another order: float32 rounding, relative to gradients of about 1e-2.
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-7)


class OddHead(nn.Module):
    """A causal language model that does something to its logits that no config key names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build(CONFIGS["llama untied"])
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> object:
        out = self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        out.logits = out.logits**3 * 100
        return out

    def get_decoder(self) -> nn.Module:
        return self.inner.get_decoder()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()


def test_logits_that_the_config_does_not_explain_take_the_full_path_with_a_warning() -> None:
    model, rows = OddHead(), batch()
    with pytest.warns(UserWarning, match="OddHead uses full logits.*config does not name"):
        loss_fn = CausalLMLoss(model)
    loss_sum, num_tokens = loss_fn(rows)
    logits = model(rows["input_ids"], rows["position_ids"], False).logits[:, :-1]
    want = nn.functional.cross_entropy(
        logits.reshape(-1, 128), rows["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    assert not loss_fn.is_chunked
    torch.testing.assert_close(loss_sum, want)
    loss_sum.backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    assert num_tokens == 449


def test_a_model_without_head_takes_the_full_path_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OddHead()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.warns(UserWarning, match="has no output head"):
        assert not CausalLMLoss(model).is_chunked


def test_the_router_loss_left_out_is_named() -> None:
    model = build(MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True))
    with pytest.warns(UserWarning, match="router's auxiliary loss"):
        CausalLMLoss(model)


def test_the_proof_leaves_rng_training_flags_and_gradients_alone() -> None:
    model = build(GPT2Config(**GPT2)).train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    CausalLMLoss(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert gradients(model) == {}


def test_training_flags_come_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert model.training


def test_bf16_autocast_gives_the_loss_of_transformers_and_float32_gradients() -> None:
    model, rows = build(CONFIGS["llama tied"]), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum, num_tokens = CausalLMLoss(model)(rows)
        theirs = model(input_ids=rows["input_ids"], labels=rows["labels"], use_cache=False).loss
    (loss_sum / num_tokens).backward()
    ours = gradients(model)
    theirs.backward()
    torch.testing.assert_close(loss_sum / num_tokens, theirs, rtol=1e-5, atol=0)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    # bf16 has 8 bits: chunks sum the head's gradient in another order, 1 % of gradients of about 1e-2.
    torch.testing.assert_close(ours, gradients(model), rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    model = build(CONFIGS["llama untied"])
    model.get_submodule(frozen).requires_grad_(False)
    CausalLMLoss(model)(batch())[0].backward()
    assert {name.split(".")[0] for name in gradients(model)} == {"model", "lm_head"} - {frozen}


@pytest.mark.parametrize("chunk_size", [1, 7, 128, 10_000])
def test_chunk_size_does_not_change_the_loss(chunk_size: int) -> None:
    torch.manual_seed(0)
    hidden_BTD, head, labels_BT = torch.randn(2, 9, 4), nn.Linear(4, 11), torch.randint(0, 11, (2, 9))
    want = nn.functional.cross_entropy(
        head(hidden_BTD[:, :-1]).flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum"
    )
    got, num_tokens = chunked_cross_entropy(hidden_BTD, head, labels_BT, chunk_size=chunk_size)
    torch.testing.assert_close(got, want)
    assert num_tokens == 16


def test_log_softmax_and_sum_are_float32_for_bf16_weights() -> None:
    torch.manual_seed(0)
    hidden_BTD, head = torch.randn(1, 1001, 16).bfloat16(), nn.Linear(16, 50).bfloat16()
    labels_BT = torch.randint(0, 50, (1, 1001))
    got, _ = chunked_cross_entropy(hidden_BTD, head, labels_BT)
    want = nn.functional.cross_entropy(head(hidden_BTD[0, :-1]).double(), labels_BT[0, 1:], reduction="sum")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)  # a bf16 sum is off by 1e-3


def test_only_positions_with_loss_reach_the_head_one_chunk_at_a_time() -> None:
    seen: list[int] = []
    head = nn.Linear(4, 11)
    head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    labels_BT = torch.full((1, 101), -100)
    labels_BT[0, 71:] = 3
    with torch.no_grad():
        chunked_cross_entropy(torch.randn(1, 101, 4), head, labels_BT, chunk_size=12)
    assert seen == [12, 12, 6]


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_the_head_are_called(kind: str) -> None:
    seen: list[object] = []
    head = nn.Linear(4, 11, bias=False)
    getattr(head, f"register_{kind}_hook")(lambda *given: seen.append(given))
    hidden_BTD = torch.randn(1, 5, 4, requires_grad=True)
    chunked_cross_entropy(hidden_BTD, head, torch.zeros(1, 5, dtype=torch.long))[0].backward()
    assert seen


def test_without_any_label_the_loss_is_a_zero_whose_gradients_are_zero() -> None:
    model, rows = build(CONFIGS["llama tied"]), batch()
    rows["labels"] = torch.full_like(rows["labels"], -100)
    loss_sum, num_tokens = CausalLMLoss(model)(rows)
    loss_sum.backward()
    assert (loss_sum.item(), num_tokens.item()) == (0.0, 0)
    grads = gradients(model)
    assert len(grads) == len(list(model.parameters()))
    assert all(not grad.any() for grad in grads.values())


def test_backward_keeps_no_logits() -> None:
    vocabulary, hidden_BTD = 5000, torch.randn(1, 513, 8, requires_grad=True)
    head, largest = nn.Linear(8, vocabulary), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        if tensor.shape != head.weight.shape:
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden_BTD, head, torch.zeros(1, 513, dtype=torch.long))
    assert largest < 128 * vocabulary


@pytest.mark.parametrize("family", ["llama tied", "gpt2", "gemma2 with a cap", "mixtral"])
def test_packing_is_accepted_where_documents_do_not_see_each_other(family: str) -> None:
    model = build(CONFIGS[family])
    loss_fn = CausalLMLoss(model)
    loss_fn.check_packing()

    parts = [batch(1, 5), batch(1, 9)]
    for part in parts:
        part["labels"] = part["input_ids"].clone()
        part["labels"][:, 0] = -100  # or the first token is a target of the document before
    packed = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    with torch.no_grad(), evaluation_mode(model):
        single = sum(loss_fn(part)[0].item() for part in parts)
        loss_sum, num_tokens = loss_fn(packed)
    assert num_tokens == 4 + 8
    assert loss_sum.item() == pytest.approx(single, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_packing_is_accepted_with_adapters_around_the_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(CONFIGS["llama tied"]), LoraConfig(target_modules=["q_proj"], r=2))
    for each in (model, model.get_base_model()):
        CausalLMLoss(each).check_packing()


@pytest.mark.parametrize("family", ["bloom without position ids", "opt with a projection"])
def test_packing_is_refused_where_documents_see_each_other(family: str) -> None:
    loss_fn = CausalLMLoss(build(CONFIGS[family]))
    with pytest.raises(ValueError, match=r"data.packing does not work with \w+ForCausalLM"):
        loss_fn.check_packing()


def test_packing_is_refused_where_a_state_sums_over_tokens() -> None:
    """The sum does not depend on the order of the tokens in the document before."""
    model = build(CONFIGS["llama tied"])
    model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out + out.cumsum(1))
    with pytest.raises(ValueError, match=r"data.packing does not work with LlamaForCausalLM"):
        CausalLMLoss(model).check_packing()


def test_packing_is_refused_where_documents_see_little_of_each_other() -> None:
    """A short convolution between small weights: 2e-5 of the largest logit, a hundred units of rounding."""
    model = build(Lfm2Config(**SHAPE | {"layer_types": ["conv", "full_attention", "conv"]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7 if parameter.ndim > 1 else 1.0)
    with pytest.raises(ValueError, match=r"data.packing does not work with Lfm2ForCausalLM"):
        CausalLMLoss(model).check_packing()


def test_packing_is_refused_where_the_positions_run_on() -> None:
    """Then a document is not what it is alone, whatever stands before it."""
    model = build(CONFIGS["gpt2"])
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: forward(torch.arange(ids.shape[1]).expand_as(ids))
    with pytest.raises(ValueError, match=r"data.packing does not work with GPT2LMHeadModel"):
        CausalLMLoss(model).check_packing()


@pytest.mark.smollm2
def test_smollm2_loss_is_that_of_transformers() -> None:
    model = load_model("smollm2-135m")
    ids_BT = torch.arange(1000, 1200).view(2, 100)
    rows = {"input_ids": ids_BT, "labels": ids_BT, "position_ids": torch.arange(100).expand(2, -1)}
    with torch.no_grad():
        loss_sum, num_tokens = CausalLMLoss(model)(rows)
        theirs = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    torch.testing.assert_close(loss_sum / num_tokens, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "changes"), [("llama untied", False), ("gemma2 with a cap", True)])
def test_without_weights_the_config_is_believed(kind: str, changes: bool) -> None:
    with torch.device("meta"):
        model = build(CONFIGS[kind])
    model.forward = None  # a call would fail
    loss = CausalLMLoss(model)
    assert loss.is_chunked
    assert (loss.transform is not None) == changes
