"""The shape of the package: who may import whom, how long files are, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lisatune"

LEVELS = {
    0: {
        "block_lr",
        "codecs",
        "compare_results",
        "disk",
        "environment",
        "exits",
        "layers",
        "manifest",
        "plain_yaml",
        "ranks",
        "recipe",
        "runs",
        "samplers",
        "shards",
        "tensor_files",
        "virtual_tokens",
    },
    1: {
        "adamw",
        "adamw_rows",
        "adamw_state",
        "adamw_triton",
        "blocks",
        "chunked_loss",
        "costly_draws",
        "cpu_attention",
        "cross_entropy",
        "ends",
        "factored",
        "fake",
        "frozen_state",
        "galore",
        "host_chunks",
        "in_backward",
        "lisa",
        "loss",
        "memory",
        "movement",
        "named_state",
        "nf4",
        "optim",
        "proof",
        "sharding",
        "step_memory",
        "storage",
    },
    2: {"methods"},
    3: {
        "chat",
        "checkpoint",
        "data",
        "evaluate",
        "gguf_models",
        "models",
        "pretrained",
        "python_docs",
        "rank_weights",
        "records",
        "shapes",
        "sources",
        "step",
        "trackers",
    },
    4: {
        "assemble",
        "check",
        "compare",
        "estimate",
        "fit",
        "layer_table",
        "memory_check",
        "out_of_memory",
        "outline",
        "plan",
        "plan_apart",
        "plan_table",
        "prepare",
        "progress",
        "recipe_file",
        "report",
        "resume",
        "room",
        "run_ranks",
        "stopping",
        "train",
    },
    5: {"cli", "compare_command", "report_command"},
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}
CORE = [
    "lisatune",
    *(f"lisatune.{name}" for name in ("layers", "samplers", "adamw", "optim", "proof", "lisa")),
]
TOP = {"__init__", "__main__"}
"""These only re-export or call, and may import anything."""

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    """Name of a file's module below the package: its file name, or that of the folder it is in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str) -> set[str]:
    """Modules of lisatune that a source imports anywhere, by the first name below the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports from the package's name: from lisatune.layers import …"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {each[1] for each in parts if each[0] == "lisatune" and len(each) > 1}
    return found


def test_imported_modules_are_found() -> None:
    source = (
        "import lisatune.lisa\nfrom lisatune import layers\ndef f():\n    from lisatune.data import pack, x\n"
    )
    assert imported_modules(source) == {"lisa", "layers", "data"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_never_point_upwards(file: Path) -> None:
    module = module_of(file)
    if module in TOP:
        return
    assert module in LEVEL, f"{file.name} has no level yet: add {module!r} to LEVELS in {__file__}"
    imported = imported_modules(file.read_text(encoding="utf-8"))
    unknown = {name for name in imported if name not in LEVEL and not name.startswith("__")}
    assert not unknown, (
        f"{file.name} imports {sorted(unknown)}: import names from the module that defines them"
    )
    above = {name for name in imported if LEVEL.get(name, 0) > LEVEL[module]}
    assert not above, f"{file.name} is on level {LEVEL[module]} and imports {sorted(above)} from above"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_of_more_than_300_lines_say_why(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    lines = len(source.splitlines())
    assert lines <= 300 or "Longer than 300 lines:" in docstring, (
        f"{lines} lines: split by idea or say why not"
    )


def test_core_imports_torch_alone() -> None:
    heavy = {
        "transformers",
        "datasets",
        "trl",
        "accelerate",
        "peft",
        "cyclopts",
        "rich",
        "jinja2",
        "matplotlib",
    }
    script = (
        f"import sys, importlib\n"
        f"for name in {CORE!r}: importlib.import_module(name)\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
