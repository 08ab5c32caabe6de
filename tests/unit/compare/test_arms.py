"""What a comparison is of: arms from text and files, learning rates, seeds, budget."""

import datetime
import json
import re
from pathlib import Path

import pytest
import yaml

import tiny_report
from lisatune.cli.app import main
from lisatune.compare import stages
from lisatune.compare.arms import Comparison, check_folder, claim_folder, fix_date, read_comparison
from lisatune.train.recipe_file import load_recipe

RECIPE = {
    "model": {"name": "smollm2-135m"},
    "data": {"train": "python-docs"},
    "method": {"name": "lisa", "active": 3},
    "optimizer": {"lr": 2e-5},
}


def write(folder: Path, **compare: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | ({"compare": compare} if compare else {}), sort_keys=False))
    return path


def test_text_gives_arms_with_keys_of_their_own(tmp_path: Path) -> None:
    text = "full,lora:rank=128+targets=[q_proj,v_proj],lisa:active=8+ends=every:5+8bit+optimizer.eps=1e-6"
    full, lora, lisa = read_comparison(write(tmp_path), methods=text).arms
    assert [arm.recipe.method.name for arm in (full, lora, lisa)] == ["full", "lora", "lisa"]
    assert lora.recipe.method.rank == 128
    assert lora.recipe.method.targets == ("q_proj", "v_proj")
    assert (lisa.recipe.method.active, lisa.recipe.method.ends) == (8, "every:5+8bit")
    assert (lisa.recipe.optimizer.eps, full.recipe.optimizer.eps) == (1e-6, 1e-8)


def test_only_arms_of_the_recipes_method_start_from_its_keys(tmp_path: Path) -> None:
    path = write(tmp_path)
    arms = read_comparison(path, ["method.period=7"], methods="lisa,lisa:active=1,lora").arms
    assert [(arm.recipe.method.active, arm.recipe.method.period) for arm in arms[:2]] == [(3, 7), (1, 7)]
    assert arms[2].recipe.method.rank == 16


def test_learning_rates_are_the_arms_else_the_commands_else_the_files_else_the_recipes(
    tmp_path: Path,
) -> None:
    text = "full,lora:lr=3e-4|1e-4"
    assert [a.lrs for a in read_comparison(write(tmp_path), methods=text).arms] == [(2e-5,), (1e-4, 3e-4)]
    path = write(tmp_path, lr=[1e-6])
    assert [a.lrs for a in read_comparison(path, methods=text).arms] == [(1e-6,), (1e-4, 3e-4)]
    assert read_comparison(path, methods="full", lr="3e-5,1e-5").arms[0].lrs == (1e-5, 3e-5)


def test_a_file_names_arms_and_options_and_the_command_wins(tmp_path: Path) -> None:
    arms = {"full": "full", "LISA γ=8": {"method": "lisa", "active": 8, "verify": "off", "lr": [1e-4]}}
    path = write(tmp_path, arms=arms, seeds=3, budget={"tokens": 1000}, general="text.jsonl")
    comparison = read_comparison(path, ["run.seed=5"])
    assert [arm.name for arm in comparison.arms] == ["full", "LISA γ=8"]
    assert comparison.arms[1].recipe.method.verify == "off"
    assert (comparison.seeds, comparison.budget, comparison.general) == (
        (5, 6, 7),
        {"tokens": 1000},
        "text.jsonl",
    )
    chosen = read_comparison(path, methods="LISA γ=8,lora", seeds=1, budget="steps=1_000")
    assert [arm.recipe.method.name for arm in chosen.arms] == ["lisa", "lora"]
    assert (chosen.seeds, chosen.budget) == ((0,), {"steps": 1000})


def test_an_arm_may_have_a_rate_of_its_own_for_the_ends(tmp_path: Path) -> None:
    methods = "lisa:optimizer.ends_lr=5e-5,full,lora:optimizer.ends_lr=null"
    arms = read_comparison(write(tmp_path), ["optimizer.ends_lr=1e-4"], methods=methods).arms
    assert [arm.recipe.optimizer.ends_lr for arm in arms] == [5e-5, 1e-4, None]


def test_a_comparison_that_continues_keeps_the_day_that_its_templates_see(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path), methods="full")
    days = [datetime.date.today().isoformat()]
    began = fix_date(comparison, tmp_path / "out").recipe.data.date
    assert began in [*days, datetime.date.today().isoformat()]
    folder = tmp_path / "out"
    folder.mkdir()
    for saved, expected in (({"date": "2020-03-04"}, "2020-03-04"), ({}, None)):  # None: an older version
        (folder / "compare.json").write_text(json.dumps({"asked": {"shared": {"data": saved}}}))
        assert fix_date(comparison, folder).recipe.data.date == expected
    own = read_comparison(write(tmp_path), ["data.date=2021-01-01"], methods="full")
    assert fix_date(own, folder).recipe.data.date == "2021-01-01"


def test_what_a_killed_command_left_behind_is_no_other_file(tmp_path: Path) -> None:
    comparison = read_comparison(write(tmp_path), methods="full")
    output = tmp_path / "out"
    (output / ".data.tmp-0a1b2c3d").mkdir(parents=True)
    (output / ".compare.json.tmp-0a1b2c3d").touch()
    (output / ".lock").touch()
    check_folder(output, comparison)
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds files that are not a comparison's"):
        check_folder(output, comparison)


def test_scores_of_other_questions_are_another_comparison(tmp_path: Path) -> None:
    def asking(questions: str | None) -> Comparison:
        return read_comparison(write(tmp_path), methods="full", evaluate="arc_easy", evaluate_data=questions)

    claim_folder(tmp_path, asking("mine"), {"sha256": {}})
    check_folder(tmp_path, asking("mine"))
    with pytest.raises(ValueError, match=r"compare\.evaluate_data: mine → other; undo"):
        check_folder(tmp_path, asking("other"))
    noted = json.loads((tmp_path / "compare.json").read_text())
    del noted["asked"]["shared"]["compare"]["evaluate_data"]  # as an older version wrote it
    (tmp_path / "compare.json").write_text(json.dumps(noted))
    check_folder(tmp_path, asking("other"))


def test_the_files_reference_counts_where_methods_leave_it_in(tmp_path: Path) -> None:
    path = write(tmp_path, arms={"big": "lora:rank=4", "small": "lora:rank=1"}, reference="big")
    assert read_comparison(path, methods="big,full").reference == "big"
    assert read_comparison(path, methods="small,full").reference is None
    with pytest.raises(ValueError, match="unknown reference 'bg'"):
        read_comparison(path, methods="small,full", reference="bg")


def test_folders_of_arms_tell_names_apart_that_differ_in_signs_alone(tmp_path: Path) -> None:
    arms = {"LISA γ": "lisa", "LISA K": "lisa", "LISA κ": "lisa"}
    folders = [arm.folder for arm in read_comparison(write(tmp_path, arms=arms)).arms]
    assert len(set(folders)) == 3
    assert all(folder.isascii() and "/" not in folder for folder in folders)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": "lsia"}, "arm 'lsia': unknown method 'lsia'. Did you mean 'lisa'?"),
        ({"methods": ""}, "unknown method ''"),
        ({}, "there is nothing to compare; give --methods"),
        ({"methods": "full,full"}, "--methods names an arm twice"),
        ({"methods": "full:rank=3"}, "unknown key 'method.rank' of method full"),
        ({"methods": "lora:rnk=3"}, "Did you mean 'method.rank'?"),
        ({"methods": "lora:rank=many"}, "method.rank must be a whole number, got 'many'"),
        ({"methods": "lora:rank=0"}, "method.rank must be >= 1, got 0"),
        ({"methods": "lora:rank"}, "'rank', which is not key=value"),
        ({"methods": "lora:rank=1+rank=2"}, "has a key twice"),
        ({"methods": "lora:data.limit=3"}, "cannot set data.limit"),
        ({"methods": "lora:run.steps=3"}, "cannot set run.steps"),
        ({"methods": "lora:optimizer.lr=3"}, "cannot set optimizer.lr"),
        ({"methods": "lora:optimizer.ends_lr=3"}, "optimizer.ends_lr=3 does nothing with method lora"),
        ({"methods": "full", "lr": ""}, "--lr is empty; give learning rates"),
        ({"methods": "full", "lr": "1e-5,fast"}, "--lr must be positive numbers, got 'fast'"),
        ({"methods": "full", "lr": "-1"}, "--lr must be positive numbers, got '-1'"),
        ({"methods": "full", "lr": "1e-4,0.0001"}, "has a learning rate twice"),
        ({"methods": "full:lr="}, "lr of arm 'full:lr=' is empty"),
        ({"methods": "full", "seeds": 0}, "--seeds must be a whole number >= 1, got 0"),
        ({"methods": "full", "budget": "100"}, "budget '100' has no unit; write tokens=100 or steps=100"),
        ({"methods": "full", "budget": "tokens=0"}, "budget tokens must be a whole number >= 1, got 0"),
        ({"methods": "full", "budget": "hours=2"}, "budget must be tokens=N or steps=N"),
        ({"methods": "full", "reference": "fll"}, "unknown reference 'fll'. Did you mean 'full'?"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(
    tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_comparison(write(tmp_path), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("compare", "sentence"),
    [
        ({"method": ["full"]}, "unknown key of compare 'method'"),
        ({"arms": ["full"]}, "compare.arms must be `name: arm` lines"),
        ({"arms": {"a": {"rank": 3}}}, "arm 'a' must be text such as lora:rank=128"),
        ({"arms": {"a": "full"}, "lr": []}, "compare.lr is empty"),
        ({"arms": {"a": "full"}, "lr": [True]}, "compare.lr must be positive numbers, got True"),
        ({"arms": {"a": "full"}, "seeds": "3"}, "compare.seeds must be a whole number >= 1, got '3'"),
        ({"arms": {"a": "full"}, "seeds": 0}, "compare.seeds must be a whole number >= 1, got 0"),
        ({"arms": {"a": "full"}, "budget": {"tokens": 1, "steps": 1}}, "budget must be tokens=N or steps=N"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    tmp_path: Path, compare: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_comparison(write(tmp_path, **compare))


def test_the_command_ends_in_a_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(write(tmp_path)), "--methods", "lora,lsia", "--lr", "1e-5"]) == 2
    assert capsys.readouterr().err.startswith("lisatune: error: arm 'lsia': unknown method 'lsia'. Did you")
    assert main(["compare", str(tmp_path)]) == 2
    assert "there are no results in" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.yaml"), "--methods", "full"]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err


def test_train_sends_a_file_with_a_comparison_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it to `lisatune compare`"):
        load_recipe(write(tmp_path, seeds=3))


def test_a_comparison_in_which_every_arm_failed_is_no_defect_of_lisatune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tiny_report.results()
    for arm in results["arms"]:
        arm["test_loss"] = None
    monkeypatch.setattr(stages, "compare", lambda *_, **__: results)
    out = ["--output", str(tmp_path / "out")]
    assert main(["compare", str(write(tmp_path)), "--methods", "full,lora", *out]) == 2


def test_runs_that_could_end_at_other_steps_are_refused(tmp_path: Path) -> None:
    keys = ["run.eval_every=1", "run.stop_after=2"]
    comparison = read_comparison(write(tmp_path), keys, methods="full")
    with pytest.raises(ValueError, match=r"run\.stop_after=2 could end .* set it to null"):
        stages.compare(comparison, tmp_path / "out")
    assert not (tmp_path / "out").exists()
