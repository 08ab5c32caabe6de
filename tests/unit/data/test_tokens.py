import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lisatune.data.chat import encode_prompt
from lisatune.data.records import Records
from lisatune.data.tokens import IGNORE, Examples, Order, collate, pack, tokenize
from tiny_text import CHATML, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "Hello"},
    "plain": {"prompt": "Hi", "completion": "Hello"},
    "chat": {"prompt": [USER], "completion": [BOT]},
    "messages": {"messages": [USER, BOT]},
}


def records(*rows: dict[str, Any], kind: str = "messages") -> Records:
    return Records(list(rows), kind, 0, "data.jsonl")


def learned(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the tokens that carry loss, as text."""
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def test_only_answers_and_the_end_of_their_turns_carry_loss() -> None:
    tokenizer = byte_tokenizer(CHATML)
    rows = [
        FORMS["chat"],
        FORMS["messages"],
        {"messages": [USER, BOT, USER, BOT | {"content": "Bye"}, USER]},
        {"prompt": [USER, BOT, USER], "completion": [BOT | {"content": "Bye"}]},
        {"prompt": "Hi", "completion": " there"},
    ]
    examples = tokenize(records(*rows), tokenizer, max_length=1000)
    assert [learned(row, tokenizer) for row in examples.rows] == [
        "Hello<eos>",
        "Hello<eos>",
        "Hello<eos>Bye<eos>",
        "Bye<eos>",
        " there<eos>",
    ]
    assert (examples.num_cut, examples.num_without_loss) == (0, 0)
    assert examples.num_loss_tokens == 6 + 6 + 10 + 4 + 7
    assert examples.num_tokens == sum(len(row["input_ids"]) for row in examples.rows)
    assert examples.longest == max(len(row["input_ids"]) for row in examples.rows)


@pytest.mark.parametrize("template", [CHATML, None, CHATML.replace("eos_token", "''")])
@pytest.mark.parametrize("loss_on", ["auto", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_learns_to_stop(form: str, loss_on: Any, template: str | None) -> None:
    """Although the end-of-sequence token pads too, and whether or not the template writes it."""
    tokenizer = byte_tokenizer(template)
    examples = tokenize(records(FORMS[form]), tokenizer, max_length=1000, loss_on=loss_on)
    assert learned(examples.rows[0], tokenizer).rstrip().endswith("<eos>")
    batch = collate([*examples.rows, {"input_ids": [1] * 99, "labels": [1] * 99}])
    stops = examples.rows[0]["labels"].count(tokenizer.eos_token_id)
    assert (batch["labels"][0] == tokenizer.eos_token_id).sum() == stops > 0


def test_text_carries_loss_on_all_but_the_first_token() -> None:
    tokenizer = byte_tokenizer(None)
    (row,) = tokenize(records(FORMS["text"], kind="text"), tokenizer, max_length=1000).rows
    assert learned(row, tokenizer) == "ello<eos>"
    assert tokenizer.chat_template is None


def test_loss_on_all_takes_prompts_and_needs_no_answer_borders() -> None:
    tokenizer = byte_tokenizer(
        CHATML.replace("message['content']", "('' if loop.last else 'Old: ') + message['content']")
    )
    (row,) = tokenize(records({"messages": [USER, BOT]}), tokenizer, max_length=1000, loss_on="all").rows
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_special_tokens_are_written_once() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True)
    texts = [
        tokenizer.decode(tokenize(records(row), tokenizer, max_length=1000).rows[0]["input_ids"])
        for row in (FORMS["messages"], FORMS["plain"], FORMS["text"], {"text": "Hello<eos>"})
    ]
    assert [text.count("<bos>") for text in texts] == [1, 1, 1, 1]
    assert texts[1:] == ["<bos>HiHello<eos>", "<bos>Hello<eos>", "<bos>Hello<eos>"]


def test_an_answer_marked_not_to_be_learned_from_carries_no_loss() -> None:
    tokenizer = byte_tokenizer(CHATML)
    bad = {"role": "assistant", "content": "BAD", "train": False}
    question, good = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "GOOD"}
    rows = records({"messages": [question, bad, question, good]})
    (row,) = tokenize(rows, tokenizer, max_length=1000).rows
    assert "BAD" in tokenizer.decode(row["input_ids"])
    assert "BAD" not in learned(row, tokenizer)
    assert "GOOD" in learned(row, tokenizer)
    with pytest.raises(ValueError, match="loss_on all would learn from it; use loss_on answers"):
        tokenize(rows, tokenizer, max_length=1000, loss_on="all")


def test_text_that_brings_its_own_bos_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(None, adds_bos=True)
    rows = records({"text": "<bos>ab"}, {"prompt": "<bos>a", "completion": "b"}, {"text": "ab"})
    texts = [tokenizer.decode(row["input_ids"]) for row in tokenize(rows, tokenizer, max_length=99).rows]
    assert texts == ["<bos>ab<eos>"] * 3
    assert learned(tokenize(rows, tokenizer, max_length=99).rows[1], tokenizer) == "b<eos>"
    assert encode_prompt(tokenizer, "<bos>a") == encode_prompt(tokenizer, "a")


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = byte_tokenizer(None, merges=[("b", "c")])
    (row,) = tokenize(records({"prompt": "ab", "completion": "cd"}), tokenizer, max_length=1000).rows
    assert len(row["input_ids"]) == 4
    assert learned(row, tokenizer) == "bcd<eos>"


def test_a_tokenizer_without_chat_template_gets_the_plain_one() -> None:
    tokenizer = byte_tokenizer(None)
    (row,) = tokenize(records(FORMS["messages"]), tokenizer, max_length=1000).rows
    assert tokenizer.decode(row["input_ids"]) == "### User:\nHi\n\n### Assistant:\nHello<eos>\n\n"
    assert tokenizer.chat_template is not None


def test_long_records_are_cut_and_counted_and_those_without_answer_left_out() -> None:
    tokenizer = byte_tokenizer(None)
    rows = [
        {"prompt": "1234", "completion": "5"},
        {"prompt": "1234", "completion": "56"},
        {"prompt": "12345678", "completion": "9"},
    ]
    examples = tokenize(records(*rows), tokenizer, max_length=6)
    assert [learned(row, tokenizer) for row in examples.rows] == ["5<eos>", "56"]
    assert (examples.num_cut, examples.num_without_loss, examples.longest) == (2, 1, 6)
    assert (examples.num_lost_tokens, examples.lost_share) == (11, 11 / 23)
    with pytest.raises(
        ValueError,
        match=r"cut off by max_length=4: the shortest prompt of data\.jsonl has 4 tokens; set max_length",
    ):
        tokenize(records(*rows), tokenizer, max_length=4)


def test_long_text_becomes_several_rows_and_no_token_is_lost() -> None:
    tokenizer = byte_tokenizer(None)
    examples = tokenize(records({"text": "abcdefgh"}, {"text": "xyz"}, kind="text"), tokenizer, max_length=4)
    texts = [tokenizer.decode(row["input_ids"]) for row in examples.rows]
    assert texts == ["abcd", "efgh", "xyz<eos>"]  # <eos> alone has nothing to learn from
    assert [row["labels"][0] for row in examples.rows] == [IGNORE] * 3
    assert examples.num_loss_tokens == 9
    assert (examples.num_split, examples.num_cut, examples.num_lost_tokens) == (1, 0, 1)


@pytest.mark.parametrize(
    ("long", "texts", "counts"),
    [
        ("split", ["abcd", "efg<eos>", "x<eos>"], (1, 0, 0, 0)),
        ("cut", ["abcd", "x<eos>"], (0, 1, 0, 4)),
        ("drop", ["x<eos>"], (0, 0, 1, 8)),
    ],
)
def test_long_records_are_split_cut_or_dropped_as_asked(
    long: Any, texts: list[str], counts: tuple[int, ...]
) -> None:
    tokenizer = byte_tokenizer(None)
    rows = records({"text": "abcdefg"}, {"text": "x"}, kind="text")
    examples = tokenize(rows, tokenizer, max_length=4, long=long)
    assert [tokenizer.decode(row["input_ids"]) for row in examples.rows] == texts
    found = (examples.num_split, examples.num_cut, examples.num_dropped, examples.num_lost_tokens)
    assert found == counts
    assert examples.num_tokens + examples.num_lost_tokens == 10


def test_dropping_every_record_is_refused() -> None:
    rows = records({"text": "abcdefg"}, kind="text")
    with pytest.raises(ValueError, match=r"all 1 records of data\.jsonl are longer than max_length=4 tokens"):
        tokenize(rows, byte_tokenizer(None), max_length=4, long="drop")


def test_split_text_packs_with_its_borders_kept() -> None:
    tokenizer = byte_tokenizer(None)
    rows = records({"text": "abcdefghij"}, {"text": "xy"}, kind="text")
    packed = pack(tokenize(rows, tokenizer, max_length=8), 8)
    assert packed.num_tokens == 11 + 3
    assert sorted(length for row in packed.rows for length in row["seq_lengths"]) == [3, 3, 8]
    assert sum(len(row["input_ids"]) for row in packed.rows) == 14


def test_wrong_wishes_are_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(
        ValueError, match=r"data\.jsonl is plain text, which has no answers; set loss_on to all"
    ):
        tokenize(records(FORMS["text"], kind="text"), tokenizer, max_length=9, loss_on="answers")
    with pytest.raises(ValueError, match="loss_on must be auto, answers, last or all, got 'answer'"):
        tokenize(records(FORMS["text"]), tokenizer, max_length=9, loss_on="answer")  # type: ignore[arg-type]


def test_a_record_the_template_refuses_is_named() -> None:
    tokenizer = byte_tokenizer(
        "{{ raise_exception('No system') if messages[0]['role'] == 'system' }}" + CHATML
    )
    bad = {"messages": [{"role": "system", "content": "Be brief."}, USER, BOT]}
    with pytest.raises(ValueError, match=r"^data\.jsonl, record 2: the chat template refuses .*: No system$"):
        tokenize(records(FORMS["messages"], bad), tokenizer, max_length=99)


def test_a_tokenizer_without_end_of_sequence_token_is_refused() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match=r"record 1: the tokenizer has no end-of-sequence token .* set its eos_token"
    ):
        tokenize(records(FORMS["text"]), tokenizer, max_length=99)


def made_up(lengths: list[int], vocabulary: int = 128) -> Examples:
    """Sequences of random tokens; about a third of the labels carry loss."""
    rng = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=rng)
        labels = torch.where(torch.rand(length, generator=rng) < 0.3, ids, -100)
        labels[0] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Examples(rows, 1, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=40))
def test_packing_loses_no_token_and_keeps_documents_whole(lengths: list[int]) -> None:
    examples = made_up(lengths)
    packed = pack(examples, 32)
    documents: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for row in packed.rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 32
        ids, labels = iter(row["input_ids"]), iter(row["labels"])
        for length in row["seq_lengths"]:
            documents[
                tuple(next(ids) for _ in range(length)), tuple(next(labels) for _ in range(length))
            ] += 1
    assert documents == Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in examples.rows)
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


def test_collate_pads_on_the_right_without_loss() -> None:
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    batch = collate(rows)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 5], [7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        collate([])


def test_positions_of_packed_rows_restart_at_each_document_and_each_padding_token() -> None:
    rows = [
        {"input_ids": [1] * 5, "labels": [1] * 5, "seq_lengths": [3, 2]},
        {"input_ids": [1] * 7, "labels": [1] * 7, "seq_lengths": [7]},
    ]
    assert collate(rows)["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


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
    logits, loss, gradients = loss_and_gradients(model, collate(packed.rows))

    alone = {tuple(row["input_ids"]): loss_and_gradients(model, collate([row])) for row in examples.rows}
    torch.testing.assert_close(loss, sum(result[1] for result in alone.values()), **EXACT)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(result[2][index] for result in alone.values()), **EXACT)
    for row, row_logits in zip(packed.rows, logits, strict=True):
        start = 0
        for length in row["seq_lengths"]:
            document = tuple(row["input_ids"][start : start + length])
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


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**63))
def test_every_epoch_visits_each_row_once(num_rows: int, batch_size: int, seed: int) -> None:
    order = Order(num_rows, batch_size, seed)
    per_epoch = order.batches_per_epoch
    for epoch in range(3):
        batches = [order.batch(epoch * per_epoch + index) for index in range(per_epoch)]
        assert sorted(row for batch in batches for row in batch) == list(range(num_rows))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert 0 < len(batches[-1]) <= batch_size


def test_a_batch_depends_on_seed_and_micro_step_alone() -> None:
    order = Order(100, 8, seed=3)
    straight = [order.batch(step) for step in range(40)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    resumed = Order(100, 8, seed=3)
    assert [resumed.batch(step) for step in (39, 0, 17)] == [straight[step] for step in (39, 0, 17)]
    assert torch.equal(torch.get_rng_state(), state)
    assert straight[0] != straight[13]
    assert straight[0] != Order(100, 8, seed=4).batch(0)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(0, 1), (1, 0)])
def test_an_order_of_nothing_is_an_error(num_rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="order needs rows and a batch size >= 1"):
        Order(num_rows, batch_size, 0)


def test_importing_the_data_modules_imports_no_hugging_face_package() -> None:
    code = (
        "import sys; import lisatune.data.tokens;"
        "print({'transformers', 'datasets', 'trl', 'pyarrow', 'tokenizers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
