"""Hostile input: pickles, links and paths that lead out of a folder, programs in templates, secrets."""

import ast
import json
import os
import pickle
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from faults import kills, runs
from forks import ended
from lisatune.cli import app
from lisatune.runs.manifest import set_aside

PACKAGE = Path(__file__).parents[2] / "src" / "lisatune"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(model, tmp_path / "tiny")
    return tiny_run.write_recipe(tmp_path, folder, tiny_run.write_rows(tmp_path / "rows.jsonl"))


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it


@pytest.fixture
def refused(recipe: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Train; it must be refused in one sentence, with no run folder and no trace of planted code."""

    def call(*overrides: str) -> str:
        capfd.readouterr()
        assert app.main(["train", str(recipe), *overrides]) == 2
        error = capfd.readouterr().err
        assert error.startswith("lisatune: error: ")
        assert error.count("\n") == 1
        assert not (recipe.parent / "run").exists()
        assert not (recipe.parent / "trace").exists()
        return error

    return call


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def plant(file: Path) -> Path:
    """Write a pickle that leaves a trace when it is opened."""
    file.write_bytes(pickle.dumps(Malicious(file.parents[1] / "trace")))
    return file


# ---- pickles


def test_the_package_has_no_way_to_open_a_pickle() -> None:
    """No module that unpickles is imported, and no function that can unpickle is called."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "_pickle"}
    loaders = {
        ("torch", "load"),
        ("torch", "save"),
        ("np", "load"),
        ("numpy", "load"),
        ("yaml", "unsafe_load"),
    }
    bare = {"eval", "exec", "compile", "__import__"}
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            place = f"{file.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [
                    f"{place} imports {a.name}" for a in node.names if a.name.split(".")[0] in forbidden
                ]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in forbidden:
                found.append(f"{place} imports {node.module}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found += [f"{place} calls {node.attr}"] if f"{node.value.id}.{node.attr}" in loaders else []
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in bare:
                found.append(f"{place} calls {node.func.id}")
    assert found == []


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "pytorch_model.bin", "rng_state.pth"])
def test_a_planted_pickle_is_refused_by_name_or_never_opened(
    name: str, recipe: Path, refused: Callable[..., str]
) -> None:
    planted = plant(recipe.parent / "tiny" / name)
    weights = recipe.parent / "tiny" / "model.safetensors"
    weights.rename(recipe.parent / "away")
    assert name in refused()
    (recipe.parent / "away").rename(weights)
    assert app.main(["train", str(recipe)]) == 0  # a pickle beside safetensors is ignored
    assert not (recipe.parent / "trace").exists()
    pickle.loads(planted.read_bytes())  # noqa: S301  (proves that the trap works)
    assert (recipe.parent / "trace").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../pytorch_model.bin", "/x/model.safetensors", 5])
def test_an_index_that_leads_to_a_pickle_or_out_of_its_folder_is_refused(
    name: Any, recipe: Path, refused: Callable[..., str]
) -> None:
    plant(recipe.parent / "tiny" / "pytorch_model.bin")
    (recipe.parent / "tiny" / "model.safetensors").rename(recipe.parent / "tiny" / "part.safetensors")
    index = recipe.parent / "tiny" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    assert f"{index} names {name!r}; only .safetensors files beside it are ever opened" in refused()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.bin", "rows.arrow"])
def test_data_that_could_be_a_pickle_is_refused(name: str, recipe: Path, refused: Callable[..., str]) -> None:
    rows = plant(recipe.parent / "tiny" / name)
    assert f"cannot read {rows}: unknown file type {rows.suffix}" in refused(f"data.train={rows}")


# ---- paths


def test_a_checkpoint_can_neither_lead_out_of_its_folder_nor_be_a_link(tmp_path: Path) -> None:
    recipe, run = runs.prepare(tmp_path, "lisa"), tmp_path / "run"
    assert ended(runs.attempt(recipe, run, killer=kills.before_step(4))) == -signal.SIGKILL
    newest, before = (run / "checkpoints" / f"step-00000{step}" for step in (4, 3))
    manifest = json.loads((newest / "manifest.json").read_text())
    outside = shutil.copytree(newest, tmp_path / "outside")
    elsewhere = ("../../../outside/state.json", "/etc/passwd")
    manifest["files"] |= dict.fromkeys(elsewhere, manifest["files"]["state.json"])
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "weights.safetensors").unlink()
    (newest / "weights.safetensors").symlink_to(outside / "weights.safetensors")
    shutil.rmtree(before)
    before.symlink_to(outside)  # an intact checkpoint in another place
    kept = {path: path.read_bytes() for path in outside.iterdir()}
    assert ended(runs.attempt(recipe, run, "--resume")) == 2  # only these two were kept
    log = (tmp_path / "run.log").read_text().splitlines()[-1]
    assert log.endswith(
        f"there is no complete checkpoint in {run}; name another run.output to start a new run"
    )
    set_aside(newest)
    assert ended(runs.attempt(recipe, run, "--overwrite")) == 0
    assert {path: path.read_bytes() for path in outside.iterdir()} == kept


# ---- programs


TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ' ~ trace) }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch TRACE') }}",
    "file": "{% include '/etc/passwd' %}",
    "long loop": "{% for i in range(10**9) %}x{% endfor %}",
    "zero": "{{ 1 // 0 }}",
    "changes": "{{ messages.append(messages[0]) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_reaches_nothing_outside_its_sandbox(
    kind: str, recipe: Path, refused: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    template = TEMPLATES[kind].replace("TRACE", str(recipe.parent / "trace"))
    (recipe.parent / "tiny" / "chat_template.jinja").write_text(template)
    assert "the chat template refuses this conversation: " in refused()
    assert app.main(["generate", str(recipe.parent / "tiny"), "--prompt", "x"]) == 2
    assert "the chat template refuses this conversation: " in capfd.readouterr().err


def own_code(folder: Path) -> None:
    """Give a model a config of its own, in Python that leaves a trace."""
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(folder.parent / 'trace')!r}).touch()\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))


def test_code_of_a_model_runs_only_when_trusted_and_is_announced_before(
    recipe: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    says = "model.trust_remote_code is on: Python code that comes with "
    assert app.main(["check", str(recipe), "model.trust_remote_code=true"]) == 0
    assert says in " ".join(capfd.readouterr().out.split())
    with pytest.warns(UserWarning, match=says):
        assert app.main(["train", str(recipe), "model.trust_remote_code=true"]) == 0
    shutil.rmtree(recipe.parent / "run")
    own_code(recipe.parent / "tiny")
    monkeypatch.setattr(sys, "stdin", None)  # transformers would ask a person
    assert "comes with its own Python code; set trust_remote_code to run it" in refused()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app.main(["train", str(recipe), "model.trust_remote_code=true"])
    assert (recipe.parent / "trace").exists()  # the trap works
    assert says in str(caught[0].message)


# ---- secrets

SECRETS = {
    "HF_TOKEN": "hf_" + "Zq1" * 9,
    "OPENAI_API_KEY": "sk-" + "Zq2" * 9,
    "AWS_SECRET_ACCESS_KEY": "Zq3" * 13,
    "WANDB_API_KEY": "Zq4" * 13,
    "DB_PASSWORD": "Zq5-pass",
    "GITHUB_TOKEN": "ghp_" + "Zq6" * 12,
}


def test_no_secret_reaches_the_run_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    named = [f"--{name.lower().replace('_', '-')}={value}" for name, value in SECRETS.items()]
    bare = [value for value in SECRETS.values() if value.startswith(("hf_", "sk-", "ghp_"))]
    others = ["https://me:Zq7pass@host/x", "AKIA" + "ZQ8A" * 4, "Authorization: Bearer Zq9" + "a" * 20]
    monkeypatch.setattr(sys, "argv", ["lisatune", "train", "r.yaml", *named, *bare, *others])
    assert app.main(["train", str(recipe), "run.save_every=2", "run.report_to=[tensorboard]"]) == 0
    written = b"".join(path.read_bytes() for path in (recipe.parent / "run").rglob("*") if path.is_file())
    assert b"r.yaml" in written
    secrets = [*SECRETS.values(), "Zq7pass", "ZQ8AZQ8A", "Zq9aaaaaa"]
    assert [value for value in secrets if value.encode() in written] == []
    assert os.environ["HF_TOKEN"] == SECRETS["HF_TOKEN"]
