"""The shape of the package: one ordered list says who may import whom."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lisatune"
ORDER = (
    *("distributed", "nn", "optim", "losses", "lisa"),
    *("recipe", "console", "files", "data", "models", "runs", "methods", "evaluate"),
    *("memory", "train", "study", "compare", "export", "report", "cli"),
)
"""A file imports from its own package and from packages to the left of it, from nothing else."""
TORCH_ALONE = ORDER[:5]
HEAVY = {"transformers", "datasets", "trl", "accelerate", "peft", "bitsandbytes", "cyclopts", "rich"}
FILES = sorted(PACKAGE.rglob("*.py"))
INNER = [file for file in FILES if file.parent != PACKAGE or file.stem in ORDER]


def name_of(file: Path) -> str:
    """`lisatune.optim.adamw` for a file of the package."""
    return ".".join(["lisatune", *file.relative_to(PACKAGE).with_suffix("").parts])


def imports_of(source: str) -> set[str]:
    """Modules of lisatune that a source imports anywhere; of a package that hands on a name, the package."""
    found: set[str] = set()
    modules = {name_of(file) for file in FILES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("lisatune.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "write imports from the package's name: from lisatune.optim.adamw import …"
            )
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if str(node.module).startswith("lisatune"):
                found |= {name if name in modules else str(node.module) for name in names}
    return found


def test_imports_are_found() -> None:
    source = "import lisatune.console\ndef f():\n    from lisatune.data import tokens\n"
    source += "    from lisatune.lisa.ends import x\n"
    assert imports_of(source) == {"lisatune.console", "lisatune.data.tokens", "lisatune.lisa.ends"}


def test_the_list_names_what_there_is() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if not path.stem.startswith("__") and path.stem != "py"}
    assert names == set(ORDER)


@pytest.mark.parametrize("file", INNER, ids=name_of)
def test_imports_point_to_the_left(file: Path) -> None:
    own = ORDER.index(name_of(file).split(".")[1])
    for module in imports_of(file.read_text(encoding="utf-8")) - {"lisatune"}:
        assert ORDER.index(module.split(".")[1]) <= own, f"{name_of(file)} imports {module}"


def test_no_circles() -> None:
    """Faces of packages aside: an `__init__` imports what it hands on."""
    graph = {name_of(f): imports_of(f.read_text(encoding="utf-8")) for f in INNER if f.stem != "__init__"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_have_a_readable_size(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    lines, docstring = len(source.splitlines()), ast.get_docstring(ast.parse(source)) or ""
    assert lines <= 400 or "Longer than 400 lines:" in docstring, f"{lines} lines: split it, or say why not"


def test_short_files_have_more_than_one_importer() -> None:
    users: dict[str, set[str]] = {name_of(file): set() for file in INNER}
    for file in FILES:
        for module in imports_of(file.read_text(encoding="utf-8")):
            users.setdefault(module, set()).add(name_of(file))
    for file in INNER:
        short = len(file.read_text(encoding="utf-8").splitlines()) < 60
        if short and file.stem != "__init__" and file.parent.name != "methods":
            assert len(users[name_of(file)]) > 1, f"{name_of(file)}: merge it with its only user"


def test_core_imports_torch_alone() -> None:
    core = ["lisatune", *(name_of(file) for file in INNER if name_of(file).split(".")[1] in TORCH_ALONE)]
    core = [name for name in core if not name.endswith("adamw_triton")]  # needs triton, which CUDA brings
    script = (
        f"import sys, importlib\n"
        f"for name in {core!r}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
