"""Recipes built in Python, which refuse what cyclopts refuses in a file; and the form of an override."""

from typing import Any

import pytest

from lisatune.recipe import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    is_override,
    join_overrides,
    split_override,
)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        (
            OptimizerConfig,
            {"rounding": "up"},
            "optimizer.rounding must be one of exact, stochastic, nearest, ",
        ),
        (
            OptimizerConfig,
            {"moments": "4bit"},
            "optimizer.moments must be one of fp32, bf16, 8bit, factored, ",
        ),
        (
            OptimizerConfig,
            {"schedule": "step"},
            "optimizer.schedule must be one of constant, cosine, linear, ",
        ),
        (OptimizerConfig, {"state_device": "disk"}, "optimizer.state_device must be one of cpu, got 'disk'"),
        (RunConfig, {"precision": "fp16"}, "run.precision must be one of fp32, bf16-mixed, bf16, got 'fp16'"),
        (RunConfig, {"sharding": "ddp"}, "run.sharding must be one of fsdp, replicate, got 'ddp'"),
        (
            RunConfig,
            {"activation_checkpointing": "all"},
            "activation_checkpointing must be one of frozen, got",
        ),
        (RunConfig, {"on_nonfinite": "ignore"}, "run.on_nonfinite must be one of stop, skip, got 'ignore'"),
        (RunConfig, {"on_save_error": None}, "run.on_save_error must be one of stop, continue, got None"),
        (
            DataConfig,
            {"train": "t", "kind": "csv"},
            "data.kind must be one of auto, alpaca, prompt-completion,",
        ),
    ],
)
def test_a_value_that_is_not_among_the_choices_is_refused(
    section: Any, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        section(**values)
    assert sentence in str(caught.value)


def test_each_choice_is_taken() -> None:
    assert OptimizerConfig(state_device="cpu", moments="8bit").state_device == "cpu"
    assert RunConfig(activation_checkpointing="frozen").activation_checkpointing == "frozen"
    assert RunConfig(activation_checkpointing=True).activation_checkpointing is True


def test_a_models_source_is_what_its_loaders_take() -> None:
    model = ModelConfig(name="m", revision="v1", attention="sdpa")
    assert model.location == {"name": "m", "revision": "v1", "trust_remote_code": False}
    assert model.source == model.location | {"attention": "sdpa"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--run.steps", "5"], ["run.steps=5"]),
        (["--run.steps=5", "run.seed=1"], ["run.steps=5", "run.seed=1"]),
        (["--optimizer.lr", "-1"], ["optimizer.lr=-1"]),
        (["--data.packing"], ["data.packing=true"]),
        (["--data.packing", "--resume"], ["data.packing=true", "--resume"]),
        (["--data.packing", "run.steps=5"], ["data.packing=true", "run.steps=5"]),
        (["--run.batch-size", "4"], ["run.batch_size=4"]),
        (["--run.steps", "", "run.seed=1"], ["run.steps=", "run.seed=1"]),
        (["--general", "text.jsonl", "", "-h"], ["--general", "text.jsonl", "", "-h"]),
        (
            ["train", "a.yaml", "--model.name", "x/y", "--debug"],
            ["train", "a.yaml", "model.name=x/y", "--debug"],
        ),
    ],
)
def test_overrides_may_be_written_as_options(given: list[str], meant: list[str]) -> None:
    assert join_overrides(given) == meant


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run.steps=5", ("run", "steps", "5")),
        ("--run.steps=5", ("run", "steps", "5")),
        ("run.batch-size=5", ("run", "batch_size", "5")),
        ("data.train=a=b\nc", ("data", "train", "a=b\nc")),
        ("run.output=", ("run", "output", "")),
        ("--data.packing", ("data", "packing", None)),
        ("steps=5", None),
        ("runs/a.b=c", None),
        ("a=b.yaml", None),
        ("", None),
    ],
)
def test_an_override_is_split_into_section_key_and_value(
    text: str, parts: tuple[str, str, str | None] | None
) -> None:
    assert split_override(text) == parts
    assert is_override(text) == (parts is not None and parts[2] is not None)
