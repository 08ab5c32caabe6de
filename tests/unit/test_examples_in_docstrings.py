"""The examples in docstrings of the packages that need torch alone run, and print what they show."""

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lisatune
import tiny

PACKAGE = Path(lisatune.__file__).parent
FILES = [
    file
    for package in ("nn", "optim", "losses", "lisa")
    for file in sorted((PACKAGE / package).glob("*.py"))
    if ">>>" in file.read_text(encoding="utf-8")
]


class ShownOutput(doctest.OutputChecker):
    """Compares an output only if the example shows one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def find_examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(".".join(["lisatune", file.parent.name, file.stem])) for file in FILES]
    return [found for module in modules for found in finder.find(module) if found.examples]


def names_in_examples(folder: Path) -> dict[str, Any]:
    """What examples use without defining it."""
    model: nn.Module = tiny.llama()
    ids = tiny.tokens(0)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    scored = tiny.llama().config
    scored.num_labels = 1
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    return {
        "torch": torch,
        "model": model,
        "reward_model": transformers.LlamaForSequenceClassification(scored),
        "batch": batch,
        "loader": [batch, batch],
        "matrices": matrices,
        "others": [p for name, p in model.named_parameters() if "proj" not in name],
        "rows": [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(0).tolist()],
        "arguments": transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[]),
        **{name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "GPT2Config", "Trainer")},
        **{name: getattr(lisatune, name) for name in ("LISA", "find_layers")},
    }


def test_there_are_examples() -> None:
    found = {test.name.removeprefix("lisatune.") for test in find_examples()}
    assert {"lisa.lisa.LISA", "lisa.samplers.Sampler", "nn.layers.find_layers"} <= found


@pytest.mark.parametrize("example", find_examples(), ids=lambda test: test.name)
def test_the_example_runs(
    example: doctest.DocTest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.globs = {**example.globs, **names_in_examples(tmp_path)}
    failed = doctest.DocTestRunner(checker=ShownOutput()).run(example).failed
    assert not failed, capsys.readouterr().out
