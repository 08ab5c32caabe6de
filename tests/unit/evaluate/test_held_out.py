import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lisatune.evaluate.held_out import generate_answers, held_out_loss
from lisatune.losses.causal_lm import CausalLMLoss

WORDS = ["<pad>", "<end>", "user", "assistant", "a", "b", "c", "d"]
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}assistant"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **shape, vocab_size=8, attention_dropout=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )


def row(length: int, first_label: int) -> dict[str, Tensor]:
    ids = torch.arange(length)[None] % 8
    labels = ids.clone()
    labels[:, :first_label] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}


def test_every_token_counts_the_same_whatever_its_batch(model: LlamaForCausalLM) -> None:
    loss_fn, batches = CausalLMLoss(model), [row(20, 1), row(5, 3)]
    held_out = held_out_loss(loss_fn, iter(batches), device="cpu")
    model.eval()
    sums = [
        nn.functional.cross_entropy(model(b["input_ids"]).logits[0, :-1], b["labels"][0, 1:], reduction="sum")
        for b in batches
    ]
    assert held_out.num_tokens == 19 + 2
    assert held_out.loss == pytest.approx(sum(sums).item() / 21, rel=1e-6)


def test_dropout_is_off_during_evaluation_and_every_flag_comes_back(model: LlamaForCausalLM) -> None:
    model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    loss_fn = CausalLMLoss(model)
    first, second = (held_out_loss(loss_fn, [row(9, 0)], device=torch.device("cpu")) for _ in range(2))
    assert first == second
    assert flags == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_computes_in_its_dtype(model: LlamaForCausalLM) -> None:
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loss_fn = CausalLMLoss(model)
    seen.clear()
    in_bf16 = held_out_loss(loss_fn, [row(9, 0)], device="cpu", autocast=torch.bfloat16)
    in_fp32 = held_out_loss(loss_fn, [row(9, 0)], device="cpu")
    assert seen == [torch.bfloat16, torch.float32]
    assert in_bf16.loss == pytest.approx(in_fp32.loss, rel=1e-2)


def test_data_without_any_loss_is_an_error(model: LlamaForCausalLM) -> None:
    for batches in ([], [row(4, 4)]):
        with pytest.raises(ValueError, match="no token of the held-out data carries loss"):
            held_out_loss(CausalLMLoss(model), batches, device="cpu")


def greedy(model: LlamaForCausalLM, ids: list[int], steps: int) -> list[int]:
    new: list[int] = []
    with torch.no_grad():
        while len(new) < steps and 1 not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_answers_are_greedy_and_hold_the_new_text_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.generation_config.update(do_sample=True, temperature=5.0)
    flags = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    answers = generate_answers(
        model, tokenizer, ["a b c", [{"role": "user", "content": "d"}]], max_new_tokens=4
    )
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())

    model.eval()
    want = [greedy(model, [4, 5, 6], 4), greedy(model, [2, 7, 3], 4)]
    assert answers == [tokenizer.decode(ids, skip_special_tokens=True) for ids in want]
    assert all(answers)


def test_answers_stop_at_the_end_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[5] = 100 * model.model.norm.weight.data
    bias = torch.zeros(8)
    model.lm_head.register_forward_hook(lambda module, args, out: bias.expand_as(out))
    bias[1] = 1.0
    assert generate_answers(model, tokenizer, ["a"], max_new_tokens=8) == [""]
    bias[5] = 2.0
    assert generate_answers(model, tokenizer, ["a"], max_new_tokens=3) == ["b b b"]


def test_answers_end_where_the_model_reads_no_more(tokenizer: PreTrainedTokenizerFast) -> None:
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=6, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    tokenizer.eos_token = None  # no answer ends by itself
    (answer,) = generate_answers(model, tokenizer, ["a b c"], max_new_tokens=64)
    assert len(tokenizer.tokenize(answer)) <= 3
    with pytest.raises(ValueError, match="a prompt has 6 tokens and the model reads at most 6"):
        generate_answers(model, tokenizer, ["a b c d a b"], max_new_tokens=1)
