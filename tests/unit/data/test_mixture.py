"""Several sources of training data: what each gives, in which order, and what is held out of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from lisatune.data.batches import Order, Share
from lisatune.data.mixture import SourceLosses, name_sources, plan_shares
from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.readers import read_data
from lisatune.methods import Full
from lisatune.recipe import DataConfig, LossConfig, ModelConfig, Recipe, RunConfig, SourceConfig
from lisatune.train.recipe_file import build_recipe
from tiny_text import byte_tokenizer

SHARES = st.lists(st.builds(Share, st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=4)


def test_a_single_source_keeps_the_order_that_it_had_before_mixtures_existed() -> None:
    recorded = [[1, 6, 2], [0, 5, 4], [3], [0, 2, 5], [6, 1, 4], [3]]
    for order in (Order(7, 3, 5), Order(7, 3, 5, shares=[Share(7, 7)])):
        assert [order.batch(index) for index in range(6)] == recorded


@settings(max_examples=60, deadline=None)
@given(SHARES, st.integers(1, 7), st.integers(0, 2**62))
def test_an_epoch_takes_the_share_of_each_source_and_no_row_again_before_all_others(
    shares: list[Share], batch_size: int, seed: int
) -> None:
    num_rows = sum(share.num_rows for share in shares)
    order = Order(num_rows, batch_size, seed, shares=shares)
    taken: Counter[int] = Counter()
    for epoch in range(3):
        before = epoch * order.batches_per_epoch
        batches = [order.batch(before + index) for index in range(order.batches_per_epoch)]
        taken.update(row for batch in batches for row in batch)
        first = 0
        for share in shares:
            own = [taken[row] for row in range(first, first + share.num_rows)]
            assert sum(own) == (epoch + 1) * share.per_epoch
            assert max(own) - min(own) <= 1
            first += share.num_rows


def test_a_batch_of_a_mixture_depends_on_seed_and_micro_step_alone() -> None:
    def make(seed: int = 3) -> Order:
        return Order(25, 4, seed, shares=[Share(20, 13), Share(5, 9)])

    straight = [make().batch(step) for step in range(20)]
    order = make()
    assert [order.batch(step) for step in range(20)] == straight
    assert [order.batch(step) for step in (19, 0, 7)] == [straight[step] for step in (19, 0, 7)]
    assert straight[0] != make(4).batch(0)
    assert any(len({row < 20 for row in batch}) == 2 for batch in straight), "sources are mixed"


def test_by_weight_every_source_is_read_and_the_one_that_lasts_longest_once() -> None:
    sources = [SourceConfig(path="a", weight=3), SourceConfig(path="b", weight=1)]
    assert plan_shares(sources, [30, 100]) == (Share(30, 300), Share(100, 100))
    assert plan_shares(sources, [300, 50]) == (Share(300, 300), Share(50, 100))


def test_by_epochs_every_source_gives_so_many_times_its_rows() -> None:
    sources = [SourceConfig(path="a", epochs=0.5), SourceConfig(path="b", epochs=2.0)]
    assert plan_shares(sources, [31, 100]) == (Share(31, 16), Share(100, 200))


def test_sources_are_named_by_as_much_of_their_paths_as_tells_them_apart() -> None:
    def names(*paths: str) -> tuple[str, ...]:
        return name_sources([SourceConfig(path=path) for path in paths])

    assert names("x/math.jsonl", "y/text.jsonl") == ("math.jsonl", "text.jsonl")
    assert names("x/rows.jsonl", "y/rows.jsonl") == ("x/rows.jsonl", "y/rows.jsonl")


def write_texts(file: Path, *texts: str) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def write_pairs(file: Path, count: int) -> str:
    rows = ({"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepare(*train: Any, seed: int = 0, **data: Any) -> RunData:
    run = RunConfig(seed=seed, samples=2)
    config = DataConfig(train=train, **({"max_length": 20} | data))
    return prepare_data(
        Recipe(model=ModelConfig(name="tiny"), data=config, method=Full(), run=run), TOKENIZER
    )


TOKENIZER = byte_tokenizer(None)


@pytest.mark.parametrize("packing", [False, True])
def test_every_row_is_of_one_source_and_says_of_which(tmp_path: Path, *, packing: bool) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", *("abc " * count for count in range(1, 20)))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30)
    train = ({"path": texts, "weight": 1}, {"path": pairs, "weight": 3})
    data = prepare(*train, packing=packing, validation_share=0.2, max_length=80)
    assert [source.name for source in data.sources] == ["texts.jsonl", "pairs.jsonl"]
    assert {row["source"].item() for step in range(4) for row in data.batch(step)} == {0, 1}
    held_out = [row for batch in data.by_length(data.validation, 3) for row in batch]
    for row in (*(row for step in range(9) for row in data.batch(step)), *held_out):
        assert ("abc" in TOKENIZER.decode(row["input_ids"])) == (row["source"].item() == 0)
    assert sum(source.num_held_out for source in data.sources) == len(held_out) == len(data.validation.rows)
    assert sum(source.row_share for source in data.sources) == pytest.approx(1)
    assert data.sources[1].row_share == pytest.approx(0.75, abs=0.01)
    assert sum(source.token_share for source in data.sources) == pytest.approx(1)
    assert data.records == (
        "text, without a template; loss on all tokens + prompt-completion, without a template; loss on the "
        "answers"
    )
    assert "abc" in data.questions[0].text
    assert "+ 1 =" in data.questions[1].text


def test_a_list_of_one_source_gives_the_rows_and_batches_of_that_source_alone(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "a.jsonl", *(f"text {index}" for index in range(30)))
    run = {"max_length": 20, "packing": True}
    listed = prepare(texts, **run)
    alone = prepare_data(
        Recipe(model=ModelConfig(name="tiny"), data=DataConfig(train=texts, **run), method=Full()), TOKENIZER
    )
    assert listed.hashes == alone.hashes
    assert [listed.order.batch(step) for step in range(9)] == [alone.order.batch(step) for step in range(9)]
    assert listed.steps == alone.steps


def test_other_weights_tokenise_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write_texts(tmp_path / f"{name}.jsonl", f"{name} 1", f"{name} 2") for name in "ab"]
    prepare(*files)
    monkeypatch.setattr("lisatune.data.store.encode", None)  # which would be called to tokenise
    data = prepare(*({"path": file, "weight": weight} for file, weight in zip(files, (1, 5), strict=True)))
    assert [source.row_share for source in data.sources] == [pytest.approx(1 / 6), pytest.approx(5 / 6)]


def test_a_prompt_that_one_source_holds_out_trains_in_no_other(tmp_path: Path) -> None:
    shared = [f"shared {index}" for index in range(12)]
    files = [
        write_texts(tmp_path / f"{name}.jsonl", *shared, *(f"{name} {index}" for index in range(size)))
        for name, size in (("a", 5), ("b", 60))
    ]
    data = prepare(*files, validation_share=0.2)
    train, held_out = (
        {TOKENIZER.decode(row["input_ids"]) for row in examples.rows}
        for examples in (data.train, data.validation)
    )
    assert held_out & {f"{text}<eos>" for text in shared}
    assert not train & held_out


def test_the_limit_of_held_out_records_is_divided_as_an_epoch_is(tmp_path: Path) -> None:
    files = [write_texts(tmp_path / f"{n}.jsonl", *(f"{n} {i}" for i in range(100))) for n in "ab"]
    weighted = [{"path": file, "weight": weight} for file, weight in zip(files, (9, 1), strict=True)]
    data = prepare(*weighted, validation_share=0.5, validation_limit=20)
    assert [source.num_held_out for source in data.sources] == [18, 2]


def test_duplicates_are_found_across_sources(tmp_path: Path) -> None:
    first = write_texts(tmp_path / "a.jsonl", "one", "two", "one")
    second = write_texts(tmp_path / "b.jsonl", "three", "two", "four")
    data = prepare(first, second, validation_share=0, deduplicate=True)
    assert (data.duplicates, len(data.train.rows)) == (2, 4)
    third = write_texts(tmp_path / "c.jsonl", "one", "two")
    with pytest.raises(ValueError, match=r"c\.jsonl has no record left to train on: .*; leave it out"):
        prepare(first, third, validation_share=0, deduplicate=True)


def test_a_source_says_for_itself_whether_images_are_left_out(tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    seen.write_text('{"prompt": "<image>See", "completion": "it", "image": "a.png"}\n' * 3)
    texts = write_texts(tmp_path / "texts.jsonl", "one", "two")
    how = {"validation_share": 0}
    own = prepare({"path": str(seen), "text_only": True}, texts, **how)
    assert TOKENIZER.decode(own.train.rows[0]["input_ids"]) == "Seeit<eos>"
    assert own.num_media == 3
    assert prepare(str(seen), texts, **how, text_only=True).hashes == own.hashes
    with pytest.raises(ValueError, match=r"seen\.jsonl, line 1: 'image' holds an image"):
        prepare({"path": str(seen), "text_only": False}, texts, **how, text_only=True)


def test_a_source_of_weight_0_is_not_read(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "a.jsonl", "one", "two", "three")
    data = prepare({"path": texts, "weight": 2}, {"path": str(tmp_path / "absent"), "weight": 0})
    assert [source.name for source in data.sources] == ["a.jsonl"]


def test_sources_have_own_kinds_fields_and_limits_and_take_the_rest_from_the_section(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "all of it"}\n' * 3)
    texts = write_texts(tmp_path / "texts.jsonl", "one", "two", "three")
    source = {"path": str(rows), "kind": "text", "fields": {"text": "body"}, "limit": 1}
    data = prepare(source, texts, limit=2, validation_share=0)
    assert [TOKENIZER.decode(row["input_ids"]) for row in data.train.rows] == [
        *("all of it<eos>", "one<eos>", "two<eos>")
    ]
    assert len(read_data(recipe_of(source, texts, limit=2, validation_share=0))[0]) == 2


def recipe_of(*train: Any, **data: Any) -> Recipe:
    config = DataConfig(train=train, **data)
    return Recipe(model=ModelConfig(name="tiny"), data=config, method=Full())


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (
            "[a, {path: b, weight: 1}]",
            "data.train: b has a weight and a has none; give every source a weight",
        ),
        ("[{path: a, weight: -1}]", "data.train a: weight must be a number >= 0, got -1"),
        ("[{path: a, weight: 0}]", "data.train: all weights are 0, so nothing would train"),
        ("[{path: a, weight: many}]", "data.train a: weight must be a number >= 0, got 'many'"),
        ("[{path: a, weight: true}]", "data.train a: weight must be a number >= 0, got True"),
        ("[{path: a, epochs: 0}]", "data.train a: epochs must be a number above 0, got 0"),
        ("[{path: a, epochs: 1, weight: 1}]", "weight=1 and epochs=1 both say how often it is read"),
        ("[{path: a, wieght: 1}]", "source 1 has an unknown key 'wieght'. Did you mean 'weight'?"),
        ("[{path: a, kind: txt}]", "data.train a: kind must be one of auto, "),
        ("[{path: a, limit: 0}]", "data.train a: limit must be a whole number >= 1, got 0"),
        ("[{path: a, text_only: 3}]", "data.train a: text_only must be true or false, got 3"),
        ("[{path: a, fields: [q]}]", "data.train a: fields must be keys and values"),
        ("[{weight: 1}]", "data.train: source 1 has no path; add it"),
        ("[a, ./a]", "data.train names ./a twice; name it once, with a larger weight or more epochs"),
        ("[]", "data.train must be a path, a hub id or a list of sources, got []"),
        ("[5]", "source 1 must be a path or keys and values such as {path: a.jsonl, weight: 1}, got 5"),
    ],
)
def test_a_wrong_mixture_is_refused_by_name(train: str, problem: str) -> None:
    sections = {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}}
    with pytest.raises(ValueError, match=r"^command line: ") as caught:
        build_recipe("recipe.yaml", sections, [f"data.train={train}"])
    assert problem in str(caught.value)


def test_a_mixture_is_given_on_the_command_line_and_read_again_from_its_own_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sections = {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl", "fields": {"text": "body"}}}
    given = "data.train=[~/a.jsonl, {path: b.jsonl, epochs: 0.5, kind: text}]"
    recipe = build_recipe("recipe.yaml", sections, [given])
    stored = recipe.as_dict()
    assert stored["data"]["train"] == [
        {"path": "/home/me/a.jsonl"},
        {"path": "b.jsonl", "epochs": 0.5, "kind": "text"},
    ]
    assert build_recipe("recipe.yaml", stored, []).data == recipe.data
    assert [source.fields for source in recipe.data.sources] == [{"text": "body"}] * 2


def test_a_source_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    good = write_texts(tmp_path / "good.jsonl", "one", "two")
    empty = write_texts(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: it has no records"):
        prepare(good, empty)


def test_pairs_of_answers_are_mixed(tmp_path: Path) -> None:
    files = []
    for name, size in (("a", 8), ("b", 20)):
        file = tmp_path / f"{name}.jsonl"
        rows = ({"prompt": f"{name}{i}", "chosen": "yes", "rejected": "no"} for i in range(size))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(file))

    def prepare_pairs(*train: Any, **data: Any) -> RunData:
        config = DataConfig(train=train, **data)
        recipe = Recipe(
            model=ModelConfig(name="tiny"), data=config, method=Full(), loss=LossConfig(name="dpo")
        )
        return prepare_data(recipe, TOKENIZER)

    weighted = [{"path": file, "weight": weight} for file, weight in zip(files, (3, 1), strict=True)]
    data = prepare_pairs(*weighted, validation_share=0.25, validation_limit=8)
    assert [source.name for source in data.sources] == ["a.jsonl", "b.jsonl"]
    assert data.sources[0].row_share == pytest.approx(0.75, abs=0.03)
    pairs = [source.num_rows for source in data.sources]
    held_out = [source.num_held_out for source in data.sources]
    assert len(data.train.rows) == 2 * sum(pairs)
    assert len(data.validation.rows) == 2 * sum(held_out)
    assert all(held_out)
    rows = [row for step in range(6) for row in data.batch(step)]
    texts = [TOKENIZER.decode(row["input_ids"]) for row in rows]
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        assert chosen.removesuffix("yes<eos>") == rejected.removesuffix("no<eos>") != chosen
    numbers = {text: row["number"].item() for text, row in zip(texts, rows, strict=True)}
    assert len(set(numbers.values())) == len(numbers)
    assert {text[0] for text in texts} == {"a", "b"}
    alone = prepare_pairs(files[1], validation_share=0.25)
    assert alone.hashes == prepare_pairs(files[1], validation_share=0.25, validation_limit=5).hashes
    with pytest.raises(
        ValueError, match=r"data\.kind=text cannot work with loss\.name=dpo: its records have"
    ):
        prepare_pairs({"path": files[0], "kind": "text"})


def test_losses_are_means_over_the_tokens_of_each_source() -> None:
    losses = SourceLosses(["a", "b", "c"])
    labels = tensor([[-100, 1, 2], [-100, -100, 3], [-100, 4, 5]])
    losses({"labels": labels, "source": tensor([0, 1, 0])}, tensor([3.0, 5.0, 1.0]))
    losses({"labels": labels[:1], "source": tensor([0])}, tensor([2.0]))
    losses({"labels": labels}, torch.ones(3))  # of no source
    assert losses.take() == {"a": 1.0, "b": 5.0}
    assert losses.take() == {}
