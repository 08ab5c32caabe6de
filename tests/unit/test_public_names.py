"""The names that `lisatune` and its packages promise: they stay where they are, and each says what it is."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import lisatune

PUBLIC = {
    "lisatune": (
        *(
            "AdamW",
            "Correction",
            "DiskMasters",
            "EndsPolicy",
            "Independent",
            "LISA",
            "LayerMap",
            "ProofError",
            "Sampler",
            "build_adamw",
        ),
        *("compile_blocks", "find_layers", "param_groups", "scale_block_lr", "use_chunked_loss"),
    ),
    "lisatune.distributed": (),
    "lisatune.nn": ("BlockForward", "LayerMap", "compile_blocks", "find_layers", "use_cpu_attention"),
    "lisatune.optim": ("AdamW", "GaLoreAdamW"),
    "lisatune.losses": ("CausalLMLoss", "DPOLoss", "Loss", "RewardLoss", "use_chunked_loss"),
    "lisatune.lisa": (
        *("Cyclic", "EndsPolicy", "Independent", "LISA", "Permutation", "ProofError", "Sampler", "Uniform"),
        *("Weighted", "Window", "build_adamw", "param_groups", "scale_block_lr"),
        *("BlockSchedule", "BlockStatistics", "Correction"),
    ),
    "lisatune.recipe": (
        *(
            "DataConfig",
            "LossConfig",
            "ModelConfig",
            "OptimizerConfig",
            "Recipe",
            "RunConfig",
            "SourceConfig",
        ),
    ),
    "lisatune.files": (),
    "lisatune.data": ("read_records", "tokenize"),
    "lisatune.models": ("SHAPES", "load_model", "load_tokenizer", "save_model"),
    "lisatune.runs": ("RunFolder", "load_checkpoint", "save_checkpoint"),
    "lisatune.methods": (
        *(
            "AutoFreeze",
            "BAdam",
            "Bottleneck",
            "Dora",
            "EndsOnly",
            "FreezeOut",
            "Full",
            "GaLore",
            "Greedy",
            "Ia3",
            "Lisa",
            "Lora",
        ),
        *("METHODS", "MeZO", "Method"),
        *("OPTIMIZERS", "Prefix", "Prompt", "QLora", "SmartFRZ", "TrainingStep"),
    ),
    "lisatune.evaluate": ("PRESETS", "evaluate_tasks", "generate_answers", "held_out_loss"),
    "lisatune.memory": ("find_fit", "measure", "plan_memory"),
    "lisatune.train": ("load_recipe", "train"),
    "lisatune.study": ("study_norms", "study_outliers"),
    "lisatune.compare": ("read_results",),
    "lisatune.export": ("apply_delta", "extract_lora", "write_delta"),
    "lisatune.report": (),
    "lisatune.cli": ("main",),
}
"""A name leaves or moves only with a line in CHANGELOG.md. Names that are not here may change at any time."""


def names_of(module: Any) -> list[str]:
    """Public names of a package, its submodules aside."""
    if module is lisatune:
        return sorted(lisatune.__all__)  # imported on first use
    named = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return sorted(
        name
        for name, value in named.items()
        if not (inspect.ismodule(value) and value.__name__.startswith("lisatune"))
    )


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_its_public_names_and_no_others(package: str) -> None:
    assert names_of(importlib.import_module(package)) == sorted(PUBLIC[package])


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in PUBLIC.items() for name in names]
)
def test_each_public_name_has_a_docstring(package: str, name: str) -> None:
    value = getattr(importlib.import_module(package), name)
    if isinstance(value, dict):
        return  # a dict has no docstring of its own
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), "this is the one that dataclass makes"


def test_every_package_is_in_the_table() -> None:
    found = {f"lisatune.{each.name}" for each in pkgutil.iter_modules(lisatune.__path__) if each.ispkg}
    assert found == set(PUBLIC) - {"lisatune"}


def test_the_public_names_of_lisatune_need_no_more_than_their_names() -> None:
    with pytest.raises(AttributeError, match="module 'lisatune' has no attribute 'Lisa'"):
        _ = lisatune.Lisa  # type: ignore[attr-defined]
    assert set(PUBLIC["lisatune"]) <= set(dir(lisatune))
    star: dict[str, Any] = {}
    exec("from lisatune import *", star)  # noqa: S102 - our own names
    assert set(PUBLIC["lisatune"]) <= star.keys()


FILES = [
    file
    for package, names in (("evaluate", ("*",)), ("export", ("delta", "lora", "source")))
    for name in names
    for file in sorted((Path(lisatune.__file__).parent / package).glob(f"{name}.py"))
]
"""What both the command and Python call."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_messages_name_no_option_that_a_caller_in_python_did_not_write(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    plain = [re.sub(r"`[^`]*`", "", text) for text in texts if isinstance(text, str)]  # but whole commands
    assert [text for text in plain if re.search(r"(^|\s|\()--[a-z]", text)] == []
