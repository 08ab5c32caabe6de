"""Recipes built in Python: they refuse what cyclopts refuses in a file."""

from typing import Any

import pytest

from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, RunConfig


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
        (
            RunConfig,
            {"keep_best": True},
            "run.keep_best compares held-out losses, and run.eval_every is not set",
        ),
        (
            RunConfig,
            {"stop_after": 2},
            "run.stop_after compares held-out losses, and run.eval_every is not set",
        ),
        (RunConfig, {"stop_after": 0, "eval_every": 1}, "run.stop_after must be >= 1, got 0"),
        (RunConfig, {"sharding": "ddp"}, "run.sharding must be one of fsdp, replicate, hsdp, got 'ddp'"),
        (RunConfig, {"copies": 2}, "run.copies=2 does nothing with run.sharding=fsdp; set that to hsdp"),
        (RunConfig, {"copies": 0, "sharding": "hsdp"}, "run.copies must be >= 1, got 0"),
        (
            RunConfig,
            {"activation_checkpointing": "all"},
            "activation_checkpointing must be one of frozen, got",
        ),
        (RunConfig, {"on_nonfinite": "ignore"}, "run.on_nonfinite must be one of stop, skip, got 'ignore'"),
        (
            RunConfig,
            {"max_skipped_steps": 3},
            "run.max_skipped_steps=3 does nothing with run.on_nonfinite=stop; set that to skip",
        ),
        (RunConfig, {"on_save_error": None}, "run.on_save_error must be one of stop, continue, got None"),
        (
            DataConfig,
            {"train": "t", "kind": "csv"},
            "data.kind must be one of auto, messages, sharegpt, oasst,",
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
    model = ModelConfig(name="m", revision="v1", attention="sdpa", new_tokens=("<x>",))
    assert model.location == {"name": "m", "revision": "v1", "trust_remote_code": False}
    assert model.tokenizer == model.location | {"new_tokens": ("<x>",)}
    assert model.source == model.tokenizer | {"attention": "sdpa"}
