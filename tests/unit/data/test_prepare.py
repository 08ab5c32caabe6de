"""A run's data: what is held out of it, and what of that is evaluated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.streaming import StreamError
from lisatune.methods import Full
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig
from tiny_text import CHATML, byte_tokenizer


def prepared(folder: Path, **data: float | str | None) -> RunData:
    """Prepare two long texts, which are 25 rows each."""
    for name in "ab":
        (folder / f"{name}.txt").write_text("".join(f"{name}{i:02}, " for i in range(100)))
    config = DataConfig(train=str(folder), max_length=20, **data)  # type: ignore[arg-type]
    return prepare_with(config)


def prepare_with(config: DataConfig, **run: Any) -> RunData:
    recipe = Recipe(model=ModelConfig(name="tiny"), data=config, method=Full(), run=RunConfig(**run))
    return prepare_data(recipe, byte_tokenizer(None))


def test_few_long_texts_are_evaluated_on_pieces_from_all_over_them(tmp_path: Path) -> None:
    whole = prepared(tmp_path, validation_share=0.5, validation_limit=None)
    bounded = prepared(tmp_path, validation_share=0.5, validation_limit=5)
    assert len(whole.validation.rows) == 25
    every = [row["input_ids"].tolist() for row in whole.validation.rows]
    assert [every.index(row["input_ids"].tolist()) for row in bounded.validation.rows] == [0, 5, 10, 15, 20]
    assert bounded.train.sha256 == whole.train.sha256


@pytest.mark.parametrize("validation", [None, "itself"])
def test_nothing_is_held_out_unless_a_share_or_a_file_is_given(
    tmp_path: Path, validation: str | None
) -> None:
    source = str(tmp_path) if validation else None
    data = prepared(tmp_path, validation=source, validation_share=0)
    assert len(data.train.rows) == 50
    assert len(data.validation.rows) == (50 if validation else 0)


def test_a_conversation_that_the_assistant_begins_is_asked_with_the_question_that_follows(
    tmp_path: Path,
) -> None:
    turns = [("assistant", "Hello"), ("user", "Who are {}?"), ("assistant", "Ada"), ("user", "Bye")]
    file = tmp_path / "chats.jsonl"
    rows = [[{"role": role, "content": text.format(n)} for role, text in turns] for n in range(2)]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (question,) = prepare_with(DataConfig(train=str(file))).questions
    assert question.text in ("Who are 0?", "Who are 1?")
    assert [each["role"] for each in question.prompt] == ["assistant", "user"]
    assert question.answer == "Ada"


def write_texts(file: Path, *texts: str) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


@pytest.mark.parametrize(
    ("long", "sentence"),
    [
        ("drop", r"all 1 records of what is held out of .*\.jsonl are longer than max_length=9 tokens"),
        ("cut", r"max_length=9: the shortest prompt of what is held out of .*\.jsonl has 40 tokens"),
    ],
)
def test_a_message_about_held_out_records_says_that_it_is_about_these(
    tmp_path: Path, long: Literal["drop", "cut"], sentence: str
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c" * 40, "completion": "d"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), max_length=9, long=long)
    with pytest.raises(ValueError, match=sentence):
        prepare_with(config, seed=0)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"), [(1.1, 1, 110), (0.07, 1, 7), (1.1, 4, 28), (0.001, 1, 1)]
)
def test_epochs_make_the_steps_that_they_need(
    tmp_path: Path, epochs: float, accumulation: int, steps: int
) -> None:
    train = write_texts(tmp_path / "train.jsonl", *map(str, range(100)))
    config = DataConfig(train=train, validation_share=0)
    run = {"epochs": epochs, "batch_size": 1, "accumulation": accumulation}
    assert prepare_with(config, **run).steps == steps


def test_duplicates_are_counted_and_left_out_if_asked(tmp_path: Path) -> None:
    train = write_texts(tmp_path / "train.jsonl", "one", "two", "one", "three", "two", "one")
    config = DataConfig(train=train, validation_share=0)
    kept, once = (prepare_with(replace(config, deduplicate=asked)) for asked in (False, True))
    assert (kept.duplicates, len(kept.train.rows)) == (once.duplicates, 2 * len(once.train.rows)) == (3, 6)
    decode = byte_tokenizer(None).decode
    assert [decode(row["input_ids"]) for row in once.train.rows] == ["one<eos>", "two<eos>", "three<eos>"]


def test_training_records_that_are_held_out_too_are_counted_and_named(tmp_path: Path) -> None:
    train = write_texts(tmp_path / "train.jsonl", "one", "two", "three", "four", "five")
    held_out = write_texts(tmp_path / "held.jsonl", "five", "zero", "two", "one", "three")
    with pytest.warns(UserWarning, match="held-out data") as caught:
        prepare_with(DataConfig(train=train, validation=held_out))
    (warning,) = caught
    assert str(warning.message) == (
        f"4 training records are in the held-out data {held_out} too, so held-out loss is partly loss on "
        f"training data: {train}, line 1, {train}, line 2, {train}, line 3, …; take them out"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_needs_no_answer_where_only_other_roles_are_learned(
    tmp_path: Path, streaming: bool
) -> None:
    asked = [[{"role": "user", "content": text}] for text in ("one", "two", "three", "four")]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in asked))
    config = DataConfig(train=str(file), validation_share=0.25, loss_on=("user",))
    if streaming:
        config = replace(config, streaming=True, validation_limit=1, window=3)
    recipe = Recipe(
        model=ModelConfig(name="tiny"),
        data=config,
        method=Full(),
        run=RunConfig(steps=1 if streaming else None),
    )
    tokenizer = byte_tokenizer(CHATML)
    data = prepare_data(recipe, tokenizer)
    if data.stream is not None:
        data.stream.close()
    assert (len(data.train.rows), len(data.validation.rows), data.questions) == (3, 1, ())
    rows = [*data.train.rows, *data.validation.rows]
    learned = {tokenizer.decode(row["labels"][row["labels"] != -100]) for row in rows}
    assert learned == {"one<eos>", "two<eos>", "three<eos>", "four<eos>"}
    with pytest.raises((ValueError, StreamError), match="no assistant turn to learn from"):
        prepare_data(replace(recipe, data=replace(config, loss_on=("user", "assistant"))), tokenizer)
