"""The model card: true figures, the base's licence, and nothing that is nobody else's business."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lisatune.runs.card import Base, describe_base, make_card, shown_name, write_card

RECIPE: dict[str, Any] = {
    "model": {"name": "some/base", "revision": "abc123"},
    "data": {"train": "tatsu-lab/alpaca", "validation": "/home/me/secret/val.jsonl"},
    "method": {"name": "lisa", "active": 2, "seed": 3},
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "run": {"output": "/home/me/secret/runs/mine", "seed": 7, "steps": 4},
}
SUMMARY = {"steps": 4, "tokens": 4000, "held_out_loss_before": 3.21098, "held_out_loss_after": 2.5}
VERSIONS = {"lisatune": "0.9", "torch": "2.13.0", "numpy": "2"}
APACHE = {"license": "apache-2.0"}


def read(text: str) -> Any:
    """Read a card as the hub's library does."""
    return ModelCard(text).data


def test_front_matter_is_what_the_hub_reads() -> None:
    card = read(make_card(Base("some/base", "some/base", APACHE, "abc123"), RECIPE, SUMMARY, VERSIONS))
    assert (card.base_model, card.license, card.library_name) == ("some/base", "apache-2.0", "transformers")
    assert (card.pipeline_tag, card.tags, card.datasets) == (
        "text-generation",
        ["lisatune", "lisa"],
        ["tatsu-lab/alpaca"],
    )


def test_the_text_has_data_method_seeds_losses_versions_and_the_recipe() -> None:
    text = make_card(Base("some/base", "some/base", {}, "abc123"), RECIPE, SUMMARY, VERSIONS)
    for part in (
        "`tatsu-lab/alpaca`",
        "`val.jsonl`",
        "`method.seed` 3, `run.seed` 7",
        "4 steps, 4,000 tokens",
        "3.2110 before, 2.5000 after",
        "lisatune 0.9, torch 2.13.0",
        "`some/base` at `abc123`",
        "| licence of the base | not known |",
        "```yaml\nmodel:\n  name: some/base\n",
        "active: 2",
    ):
        assert part in text
    assert read(text).license is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"validation_limit": 500}, "| 5 % of the training data, but at most 500 rows |"),
        ({"validation_limit": None}, "| 5 % of the training data |"),
        (
            {"validation_limit": 500, "streaming": True},
            "| the first 500 records of the training data |",
        ),
    ],
)
def test_the_share_that_is_held_out_comes_with_its_limit(data: dict[str, Any], says: str) -> None:
    recipe = RECIPE | {"data": {"train": "tatsu-lab/alpaca", "validation_share": 0.05} | data}
    assert says in make_card(Base("some/base", "some/base", {}), recipe, SUMMARY, VERSIONS)


def test_the_loss_of_pairs_is_that_of_a_pair() -> None:
    text = make_card(
        Base("some/base", "some/base", {}), RECIPE | {"loss": {"name": "dpo"}}, SUMMARY, VERSIONS
    )
    assert "held-out loss per pair of answers" in text


@pytest.mark.parametrize(
    ("kind", "opens"),
    [
        ("model", 'AutoModelForSequenceClassification.from_pretrained("PATH OR HUB ID")'),
        (
            "adapters",
            'AutoPeftModelForSequenceClassification.from_pretrained("PATH OR HUB ID", num_labels=1)',
        ),
    ],
)
def test_the_card_of_a_reward_model_says_how_to_get_scores(kind: str, opens: str) -> None:
    recipe = RECIPE | {"loss": {"name": "reward"}}
    text = make_card(Base("some/base", "some/base", {}), recipe, SUMMARY, VERSIONS, kind=kind)
    assert read(text).pipeline_tag == "text-classification"
    assert f"model = {opens}\n" in text
    assert "CausalLM" not in text


def test_no_local_path_and_no_key_is_in_the_card() -> None:
    recipe = RECIPE | {
        "model": {"name": "/home/me/secret/base"},
        "data": {"train": [{"path": "./secret/a.jsonl", "weight": 1}, {"path": "C:\\secret\\b.jsonl"}]},
        "optimizer": {
            "name": "adamw",
            "options": {"x": "token=hf_abcdefghijklmnop", "y": "secret/rows.jsonl"},
        },
    }
    text = make_card(Base(shown_name(recipe["model"]["name"]), None, {}), recipe, SUMMARY, VERSIONS)
    assert "secret" not in text
    assert "/home" not in text
    assert "abcdefghijklmnop" not in text
    assert "`a.jsonl`, `b.jsonl`" in text
    card = read(text)
    assert (card.base_model, card.datasets) == (None, None)


def test_names_cannot_break_out_of_the_page() -> None:
    evil = "x` | <script>\n---\n```\n# Hello"
    recipe = RECIPE | {"data": {"train": evil}}
    text = make_card(Base("some/base", "some/base", {}), recipe, SUMMARY, VERSIONS)
    before, fence, inside = text.rpartition("````yaml\n")
    assert fence
    assert "<script>" not in before
    assert inside.count("````") == 1
    assert read(text).tags == ["lisatune", "lisa"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("a/b/c", "c"),
        ("~/base/", "base"),
        ("..", "folder"),
        ("python-docs:validation", "python-docs:validation"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("https://me:password1@host.example/rows.jsonl", "rows.jsonl"),
    ],
)
def test_names_without_folders(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def test_the_model_of_a_run_is_named_by_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "recipe.yaml").touch()
    assert shown_name(str(tmp_path / "mine" / "model")) == "mine"


def test_the_licence_is_that_of_the_bases_own_card(tmp_path: Path) -> None:
    front = "---\nlicense: other\nlicense_name: llama\nlicense_link: https://x.example\ntags: [a]\n---\n# Hi"
    (tmp_path / "README.md").write_text(front)
    base = describe_base(str(tmp_path))
    assert base.license == {"license": "other", "license_name": "llama", "license_link": "https://x.example"}
    assert (base.name, base.hub_id) == (tmp_path.name, None)
    for damaged in ("", "---\nlicense: [\n---\n", "---\n- 1\n---\n", "no front matter"):
        (tmp_path / "README.md").write_text(damaged)
        assert describe_base(str(tmp_path)).license == {}


def test_a_folder_in_the_hubs_cache_is_named_by_its_hub_id_and_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--some--base" / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    found = describe_base(str(folder))
    assert (found.name, found.hub_id, found.commit) == ("some/base", "some/base", "abc123")


@pytest.mark.smollm2
def test_the_licence_of_the_bundled_model_is_that_in_its_file() -> None:
    base = describe_base("smollm2-135m")
    assert (base.hub_id, base.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", APACHE)


def test_adapters_say_what_they_belong_to(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    base = tmp_path / "base"
    base.mkdir()
    write_card(tmp_path, RECIPE | {"model": {"name": str(base), "revision": None}}, SUMMARY)
    text = (tmp_path / "README.md").read_text()
    assert read(text).library_name == "peft"
    assert "PeftModel.from_pretrained" in text
