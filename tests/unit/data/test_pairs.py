import json
from pathlib import Path
from typing import Any

import pytest

from lisatune.data import store
from lisatune.data.prepare import RunData, prepare_data
from lisatune.data.records import Records
from lisatune.data.splitting import split_records
from lisatune.methods import Full
from lisatune.recipe import DataConfig, LossConfig, ModelConfig, Recipe
from pair_runs import read_pairs, tokenize_pairs
from tiny_text import CHATML, byte_tokenizer

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Hey"), ("assistant", "No"))
)
THREE = {"prompt": [USER], "completion": [GOOD], "rejected": [BAD]}


def write(path: Path, *rows: Any) -> str:
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / "pairs.jsonl")


def read(path: Path, *rows: Any, **options: Any) -> Records:
    return read_pairs(write(path, *rows), **options)


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {"prompt": "Hi", "chosen": "Hey", "rejected": "No"},
            {"prompt": "Hi", "completion": "Hey", "rejected": "No"},
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, THREE),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, THREE),
        ({"prompt": [USER], "chosen": "Hey", "rejected": "No"}, THREE),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, THREE),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, THREE),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, THREE),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            {"prompt": [USER, GOOD, USER], "completion": [GOOD], "rejected": [BAD]},
        ),
        (
            {"system": "Be kind.", "prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
            THREE | {"prompt": [{"role": "system", "content": "Be kind."}, USER]},
        ),
    ],
)
def test_all_forms_of_a_pair_are_read(tmp_path: Path, row: dict[str, Any], same: dict[str, Any]) -> None:
    assert read(tmp_path, row).rows == [same]


def test_fields_of_other_names_are_mapped_by_hand(tmp_path: Path) -> None:
    row = {"question": "Hi", "answers": {"good": "Hey", "bad": "No"}}
    names = {"prompt": "question", "chosen": "answers.good", "rejected": "answers.bad"}
    assert read(tmp_path, row, fields=names) == read(
        tmp_path, {"prompt": "Hi", "chosen": "Hey", "rejected": "No"}
    )
    with pytest.raises(ValueError, match=r"data.fields: unknown field 'chose'. Did you mean 'chosen'\?"):
        read(tmp_path, row, fields={"chose": "answers.good"})


def test_whole_texts_need_no_prompt_if_answers_need_not_be_told_apart(tmp_path: Path) -> None:
    rows = read(tmp_path, {"chosen": "Hey", "rejected": "No"}, needs_prompt=False).rows
    assert rows == [{"prompt": "", "completion": "Hey", "rejected": "No"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Hi", "rejected": "No"}, "'chosen' is missing or empty.*prompt, rejected"),
        ({"prompt": "Hi", "chosen": "Hey"}, "'rejected' is missing or empty"),
        ({"prompt": "Hi", "chosen": "Hey", "rejected": "Hey"}, "are equal, so there is no preference"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are equal"),
        ({"chosen": "Hey", "rejected": "No"}, "'prompt' is missing or empty"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no common prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "Ho"}, BAD]}, "no common prompt"),
        ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "last message of 'chosen'"),
        ({"prompt": "Else", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is not part"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "No"}, "'chosen' must be text, got the number 3"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": ["x"]}, "'tools' holds tools"),
        (["Hi"], "must be an object"),
    ],
)
def test_a_bad_pair_is_refused_with_its_place_or_skipped(tmp_path: Path, row: Any, says: str) -> None:
    good = {"prompt": "Hi", "chosen": "Hey", "rejected": "No"}
    with pytest.raises(ValueError, match=rf"pairs.jsonl.*2.*{says}.*data.on_bad_row=skip"):
        read(tmp_path, good, row)
    read_rest = read(tmp_path, good, row, on_bad_row="skip")
    assert (len(read_rest.rows), read_rest.skipped) == (1, 1)


def test_fields_that_nothing_reads_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing reads the field score"):
        read(tmp_path, {"prompt": "Hi", "chosen": "Hey", "rejected": "No", "score": 3})


def test_text_beside_images_is_taken_alone_if_it_is_asked_for(tmp_path: Path) -> None:
    seen = USER | {"content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    row = {"prompt": [seen], "chosen": [GOOD], "rejected": [BAD], "images": ["a.png"]}
    records = read(tmp_path, row, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, text_only=True)
    assert (records.rows[0], records.num_media) == (THREE, 1)
    with pytest.raises(
        ValueError, match=r"'images' holds images, .* set data.text_only to train on the text"
    ):
        read(tmp_path, row)


def test_pairs_of_one_prompt_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i % 4}", "chosen": str(i), "rejected": "no"} for i in range(12)]
    train, held_out = split_records(read(tmp_path, *rows), 0.25, 0)
    assert (len(train.rows), len(held_out.rows)) == (9, 3)
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in held_out.rows}


def test_each_pair_makes_two_rows_with_labels_on_the_answers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    plain = {"prompt": "Hi", "chosen": "Hey", "rejected": "No"}
    for row in (plain, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}):
        examples = tokenize_pairs(read(tmp_path, row).rows, tokenizer, max_length=64)
        answers = [[label for label in row["labels"] if label != -100] for row in examples.rows]
        assert tokenizer.batch_decode(answers) == ["Hey<eos>", "No<eos>"]


def test_answers_are_cut_and_pairs_that_are_equal_then_left_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    rows = [
        {"prompt": "12345678", "chosen": "abc", "rejected": "xyz"},
        {"prompt": "12345678", "chosen": "abcd", "rejected": "abce"},
        {"prompt": "1", "chosen": "a", "rejected": "x"},
    ]
    records = read(tmp_path, *rows)
    cut = tokenize_pairs(records.rows, tokenizer, max_length=11)
    assert [len(row["input_ids"]) for row in cut.rows] == [11, 11, 3, 3]
    assert (cut.num_cut, cut.num_without_loss, cut.num_lost_tokens) == (1, 1, 2 + 26)
    dropped = tokenize_pairs(records.rows, tokenizer, max_length=11, long="drop")
    assert (len(dropped.rows), dropped.num_dropped, dropped.num_cut) == (2, 2, 0)


def test_a_prompt_that_fills_max_length_is_an_error_unless_long_records_are_dropped(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    long = {"prompt": "12345678", "chosen": "abc", "rejected": "xyz"}
    short = {"prompt": "1", "chosen": "a", "rejected": "x"}
    with pytest.raises(ValueError, match=r"record 2: the prompt has 8 tokens.*max_length=8.*data.long: drop"):
        tokenize_pairs(read(tmp_path, short, long).rows, tokenizer, max_length=8)
    kept = tokenize_pairs(read(tmp_path, short, long).rows, tokenizer, max_length=8, long="drop")
    assert (len(kept.rows), kept.num_dropped) == (2, 1)
    with pytest.raises(ValueError, match=r"no pair is left after data.max_length=8: 1 are longer"):
        tokenize_pairs(read(tmp_path, long).rows, tokenizer, max_length=8, long="drop")


def prepare(path: Path, *rows: Any, **data: Any) -> RunData:
    config = DataConfig(train=write(path, *rows), **({"validation_share": 0, "max_length": 64} | data))
    loss = LossConfig(name="dpo")
    recipe = Recipe(model=ModelConfig(name="tiny"), data=config, method=Full(), loss=loss)
    return prepare_data(recipe, byte_tokenizer(None))


def answers(data: RunData) -> list[str]:
    return [data.tokenizer.decode(row["input_ids"]) for row in data.train.rows]


def test_equal_pairs_are_counted_and_left_out_if_asked(tmp_path: Path) -> None:
    pair = {"prompt": "Hi ", "chosen": "Hey", "rejected": "No"}
    rows = [pair, pair | {"rejected": "Ho"}, pair, pair | {"chosen": "Hello"}]
    counted = prepare(tmp_path, *rows)
    assert (counted.duplicates, len(counted.train.rows)) == (1, 8)
    once = prepare(tmp_path, *rows, deduplicate=True)
    assert once.duplicates == 1
    assert answers(once) == answers(counted)[:4] + answers(counted)[6:]


def test_pairs_that_are_held_out_too_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} ", "chosen": "Hey", "rejected": "No"} for number in range(4)]
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in (rows[2], rows[1] | {"chosen": "Hello"})))
    with pytest.warns(
        UserWarning, match=r"^1 training record is in the held-out data .*pairs.jsonl, line 3; "
    ):
        data = prepare(tmp_path, *rows, validation=str(held_out))
    assert (len(data.train.rows), len(data.validation.rows)) == (8, 4)


def test_pairs_are_tokenised_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{number} ", "chosen": "Hey", "rejected": "No"} for number in range(40)]
    first = prepare(tmp_path, *rows, validation_share=0.25)
    monkeypatch.setattr(store, "encode", None)
    again = prepare(tmp_path, *rows, validation_share=0.25)
    assert again.hashes == first.hashes
    assert (len(again.train.rows), len(again.validation.rows)) == (60, 20)
    shorter = prepare(tmp_path, *rows[:40], max_length=5)
    assert shorter.train.num_cut == 40
