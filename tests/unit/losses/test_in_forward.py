"""`model(labels=…).loss` is what it was, without logits."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

import tiny
from lisatune import use_chunked_loss
from lisatune.losses.causal_lm import chunked_cross_entropy
from lisatune.memory.fake import fake_tensors


def batch(padding: str = "right") -> dict[str, Tensor]:
    ids = tiny.tokens(0, batch_size=3, length=12)
    mask = torch.ones_like(ids)
    mask[0, slice(8, None) if padding == "right" else slice(None, 4)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_and_gradients(model: LlamaForCausalLM, **inputs: object) -> list[Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    "more",
    [{}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(50)}],
    ids=["mean", "int", "tensor"],
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_loss_and_gradients_are_those_of_the_model(
    tiny_llama: LlamaForCausalLM, padding: str, more: dict[str, object]
) -> None:
    inputs = batch(padding) | more
    want = loss_and_gradients(tiny_llama, **inputs)
    with use_chunked_loss(tiny_llama):
        got = loss_and_gradients(tiny_llama, **inputs)
        assert tiny_llama(**inputs).logits is None
    # Float32 sums in another order.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert tiny_llama(**inputs).logits is not None


def test_shift_labels_are_taken_as_they_are(untied_llama: LlamaForCausalLM) -> None:
    inputs = batch()
    inputs["shift_labels"] = inputs["labels"].roll(3, dims=1)
    want = loss_and_gradients(untied_llama, **inputs)
    with use_chunked_loss(untied_llama):
        torch.testing.assert_close(loss_and_gradients(untied_llama, **inputs), want, rtol=1e-5, atol=1e-7)


def test_positional_arguments_are_understood(untied_llama: LlamaForCausalLM) -> None:
    inputs = batch()
    want = untied_llama(**inputs).loss
    use_chunked_loss(untied_llama)
    out = untied_llama(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert out.logits is None
    torch.testing.assert_close(out.loss, want)


def test_evaluation_may_keep_its_logits(untied_llama: LlamaForCausalLM) -> None:
    inputs = batch()
    use_chunked_loss(untied_llama, in_evaluation=False)
    assert untied_llama.train()(**inputs).logits is None
    assert untied_llama.eval()(**inputs).logits is not None


def test_calls_without_labels_and_generation_are_unchanged(untied_llama: LlamaForCausalLM) -> None:
    ids = batch()["input_ids"]
    want = untied_llama.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    use_chunked_loss(untied_llama)
    assert untied_llama(input_ids=ids).logits.shape == (3, 12, tiny.VOCABULARY)
    assert torch.equal(untied_llama.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), want)


def test_parameter_names_stay_and_a_copy_has_its_own_loss(untied_llama: LlamaForCausalLM) -> None:
    names = list(untied_llama.state_dict())
    use_chunked_loss(untied_llama)
    assert list(untied_llama.state_dict()) == names
    other = copy.deepcopy(untied_llama)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    inputs = batch()
    assert other(**inputs).logits is None
    torch.testing.assert_close(other(**inputs).loss, torch.tensor(128.0).log())
    assert abs(untied_llama(**inputs).loss - torch.tensor(128.0).log()) > 1e-5


def test_undo_gives_the_forward_back_and_twice_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2))
    handle = use_chunked_loss(model)
    with pytest.raises(RuntimeError, match="GPT2LMHeadModel computes its loss in chunks already"):
        use_chunked_loss(model)
    handle.undo()
    handle.undo()
    assert "forward" not in vars(model)
    use_chunked_loss(model).undo()


def mixtral(**more: object) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, **more,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_a_router_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router's auxiliary loss.*set model.config.output_router_logits"):
        use_chunked_loss(mixtral(output_router_logits=True))


def test_a_call_that_asks_for_the_router_loss_gets_it() -> None:
    model, inputs = mixtral(), batch()
    want = model(**inputs, output_router_logits=True)
    assert want.aux_loss > 0
    use_chunked_loss(model)
    got = model(**inputs, output_router_logits=True)
    torch.testing.assert_close((got.loss, got.aux_loss), (want.loss, want.aux_loss), rtol=0, atol=0)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**inputs).loss, want.loss, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_head_with_adapters_takes_the_general_path() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    inputs = batch()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(model.get_parameter(name).grad for name in names)]

    want = run()
    with use_chunked_loss(model):
        assert model(**inputs).logits is None
        torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-7)


def test_images_are_seen() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**sizes, vocab_size=64),
            vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
            image_token_index=60,
            vision_feature_layer=-1,
        )
    ).train()
    ids = tiny.tokens(0) % 60
    ids[:, 1:5] = 60
    inputs = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    want = loss_and_gradients(model, **inputs)
    other = model(**inputs | {"pixel_values": torch.zeros(2, 3, 8, 8)}).loss
    with use_chunked_loss(model):
        got = loss_and_gradients(model, **inputs)
    used = [grad is not None for grad in want]
    assert [grad is not None for grad in got] == used
    torch.testing.assert_close(
        *([g for g in each if g is not None] for each in (got, want)), rtol=1e-5, atol=1e-7
    )
    assert not torch.isclose(other, want[0])


def test_a_trace_without_memory_reads_real_labels() -> None:
    labels = torch.zeros(2, 9, dtype=torch.long)
    with fake_tensors():
        head = torch.nn.Linear(8, 50, bias=False)
        hidden = torch.empty(2, 9, 8, requires_grad=True)
        loss, _ = chunked_cross_entropy(hidden, head, labels)
        loss.backward()
    assert head.weight.grad.shape == (50, 8)
