from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lisatune.data.batches import collate
from lisatune.data.examples import Examples, pack
from lisatune.data.records import Records
from lisatune.data.rows import Rows
from lisatune.data.tokens import tokenize
from tiny_text import byte_tokenizer


def made_up(lengths: list[int], vocabulary: int = 128) -> Examples:
    """Sequences of random tokens; about a third of the labels carry loss."""
    rng = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=rng)
        labels = torch.where(torch.rand(length, generator=rng) < 0.3, ids, -100)
        labels[0] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Examples(Rows.of(rows), 1, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=40))
def test_packing_loses_no_token_and_keeps_documents_whole(lengths: list[int]) -> None:
    examples = made_up(lengths)
    packed = pack(examples, 32)
    documents: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for row in packed.rows:
        assert int(row["seq_lengths"].sum()) == len(row["input_ids"]) == len(row["labels"]) <= 32
        ids, labels = iter(row["input_ids"].tolist()), iter(row["labels"].tolist())
        for length in row["seq_lengths"].tolist():
            documents[
                tuple(next(ids) for _ in range(length)), tuple(next(labels) for _ in range(length))
            ] += 1
    assert documents == Counter(
        (tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in examples.rows
    )
    assert all(labels[0] == -100 for _, labels in documents)
    assert (packed.num_tokens, packed.num_loss_tokens) == (examples.num_tokens, examples.num_loss_tokens)
    assert (packed.num_cut, packed.num_without_loss) == (1, 2)


def test_packing_fills_rows_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    packed = pack(made_up([10, 20, 12, 22] * 50), 32)
    assert len(packed.rows) == 100
    assert capfd.readouterr() == ("", "")


def test_packing_too_long_a_sequence_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot pack 9 tokens into max_length=8"):
        pack(made_up([3, 9]), 8)


def loss_and_gradients(
    model: LlamaForCausalLM, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [B, T, V], summed loss, and the gradients of that sum."""
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    return logits.detach(), loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double()


# Weights are float64, but norms and the softmax of eager attention compute in float32: errors of about 1e-7.
EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_do_not_see_each_other(model: LlamaForCausalLM, padded: bool) -> None:
    """Logits, loss and gradients of packed rows are those of the documents one by one."""
    examples = made_up([9, 7, 12, 5, 3, 6, 8] if padded else [9, 7, 10, 6])
    packed = pack(examples, 16)
    assert len({len(row["input_ids"]) for row in packed.rows}) == (4 if padded else 1)
    logits, loss, gradients = loss_and_gradients(model, collate(list(packed.rows)))

    alone = {
        tuple(row["input_ids"].tolist()): loss_and_gradients(model, collate([row])) for row in examples.rows
    }
    torch.testing.assert_close(loss, sum(result[1] for result in alone.values()), **EXACT)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(result[2][index] for result in alone.values()), **EXACT)
    for row, row_logits in zip(packed.rows, logits, strict=True):
        start = 0
        for length in row["seq_lengths"].tolist():
            document = tuple(row["input_ids"][start : start + length].tolist())
            torch.testing.assert_close(row_logits[start : start + length], alone[document][0][0], **EXACT)
            start += length


def test_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    examples = made_up([9, 16, 3])
    logits, loss, gradients = loss_and_gradients(model, collate(examples.rows))
    alone = [loss_and_gradients(model, collate([row])) for row in examples.rows]
    torch.testing.assert_close(loss, sum(result[1] for result in alone), **EXACT)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(result[2][index] for result in alone), **EXACT)
    for row_logits, (row_alone, _, _) in zip(logits, alone, strict=True):
        torch.testing.assert_close(row_logits[: row_alone.shape[1]], row_alone[0], **EXACT)


def test_split_text_packs_with_its_borders_kept() -> None:
    tokenizer = byte_tokenizer(None)
    rows = Records([{"text": "abcdefghij"}, {"text": "xy"}], "text", 0, "data.jsonl")
    packed = pack(tokenize(rows, tokenizer, max_length=8), 8)
    assert packed.num_tokens == 11 + 3
    assert sorted(length for row in packed.rows for length in row["seq_lengths"].tolist()) == [3, 3, 8]
    assert sum(len(row["input_ids"]) for row in packed.rows) == 14


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 48), min_size=1, max_size=120), st.sampled_from([48, 50, 64]))
def test_packing_makes_the_rows_of_trl_in_its_order(lengths: list[int], max_length: int) -> None:
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    ids = [[index] * length for index, length in enumerate(lengths)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    theirs = pack_dataset(rows, max_length, "bfd", {"batch_size": len(rows)}).to_list()
    ours = pack(Examples(Rows.of({"input_ids": each, "labels": each} for each in ids)), max_length)
    assert [row["input_ids"].tolist() for row in ours.rows] == [row["input_ids"] for row in theirs]
    assert [row["seq_lengths"].tolist() for row in ours.rows] == [row["seq_lengths"] for row in theirs]
