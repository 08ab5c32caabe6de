"""`lisatune export` on a whole run: every form, what is printed, and refusals in one sentence."""

import shutil
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import hub_server
import tiny_run
from lisatune.cli.app import main

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Use 'content=<...>' to upload raw:DeprecationWarning",  # huggingface_hub's own
)


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LISA."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_run.write_model(folder / "base")
    recipe = tiny_run.write_recipe(folder, model, tiny_run.write_rows(folder / "rows.jsonl"))
    assert main(["train", str(recipe), "run.steps=4", "optimizer.lr=0.01", "run.save_every=2"]) == 0
    return folder / "run"


def test_a_delta_of_a_run_and_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--delta"]) == 0
    out = capsys.readouterr().out
    delta = run / "export" / "delta"
    assert out.endswith(f"{delta}\n")
    assert " changed: " in out
    assert "`lisatune export PATH --apply --base BASE`" in (delta / "README.md").read_text()
    base = run.parent / "base"
    assert main(["export", str(delta), "--apply", "--base", str(base), "--output", str(tmp_path / "x")]) == 0
    one, other = (load_file(each / "model.safetensors") for each in (run / "model", tmp_path / "x"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    wrong = ("export", str(delta), "--apply", "--base", str(run), "--output", str(tmp_path / "y"))
    assert main([*wrong]) == 2
    assert "is not the base of this delta" in capsys.readouterr().err


def test_adapters_of_a_run_with_losses_by_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--lora", "8"]) == 0
    out = capsys.readouterr().out
    for part in ("share of the gain", "100.0 %", "8 *", "3 rows of the run's held-out data", "lora-8\n"):
        assert part in out
    card = (run / "export" / "lora-8" / "README.md").read_text()
    assert "the change of its weights in rank 8, which keeps " in card
    assert "library_name: peft" in card
    (run.parent / "rows.jsonl").rename(run.parent / "moved.jsonl")
    try:
        assert main(["export", str(run), "--lora", "2"]) == 0
    finally:
        (run.parent / "moved.jsonl").rename(run.parent / "rows.jsonl")
    assert "no held-out losses: " in capsys.readouterr().out
    assert main(["generate", str(run / "export" / "lora-8"), "--prompt", "x", "--max-new-tokens", "1"]) == 0


def test_a_run_goes_to_the_hub_after_one_question_or_none(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    answers = iter(["no", None, "y"])

    def answer(question: str) -> str:
        asked.append(question)
        if (text := next(answers)) is None:
            raise EOFError
        return text

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    command = ["export", str(run), "--push-to", "me/mine"]
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        for _ in range(2):
            assert main(command) == 2
            assert "nothing was uploaded, because the answer was not yes" in capsys.readouterr().err
        assert hub.repositories == {}
        assert main(command) == 0
        assert len(asked) == 3
        assert f"to the private repository {hub.url}/me/mine, a new one? [y/N]" in asked[0]
        assert hub_server.TOKEN not in "".join(capsys.readouterr())
        files = hub.repositories["me/mine"]["files"]
        assert files.keys() == {path.name for path in (run / "model").iterdir()}
        assert str(run.parent).encode() not in b"".join(files.values())
        assert main([*command[:2], "--delta", "--yes", "--push-to", "me/delta"]) == 0
        assert "delta.json" in hub.repositories["me/delta"]["files"]
        assert len(asked) == 3
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        assert "there is no terminal to ask on; give --yes" in refused(capsys, run, "--push-to", "me/mine")
        says = "names the base by its local path"
        assert main(["export", str(run), "--lora", "1"]) == 0
        assert says in refused(capsys, run, "--lora", "1", "--push-to", "me/lora", "--yes")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lisatune: error: ")
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of --delta, --apply, --lora, --gguf or --push-to, got nothing" in refused(capsys, run)
    assert "got --delta and --lora" in refused(capsys, run, "--delta", "--lora", "4")
    assert "exists; name a folder that does not" in refused(capsys, run, "--delta", "--output", tmp_path)
    unused = "--public and --yes do nothing without --push-to; leave them out"
    assert unused in refused(capsys, run, "--delta", "--public", "--yes")
    assert "--converter does nothing without --gguf" in refused(capsys, run, "--delta", "--converter", "x")
    assert "--base does nothing with --gguf" in refused(capsys, run, "--gguf", "bf16", "--base", "x")
    push = ("--push-to", "me/x", "--yes", "--output", tmp_path / "new")
    assert "--output does nothing where the model itself is uploaded" in refused(capsys, run, *push)
    assert "the rank must be >= 1, got 0" in refused(capsys, run, "--lora", "0")
    assert "--rows must be >= 1" in refused(capsys, run, "--lora", "4", "--rows", "0")
    assert "above the full rank of every changed weight, which is 16" in refused(capsys, run, "--lora", "17")
    assert "name the folder to write the model to" in refused(capsys, run, "--apply")
    assert "there is no model folder ./absent" in refused(capsys, "./absent", "--delta")
    checkpoint = next((run / "checkpoints").iterdir())
    assert "is a checkpoint, from which training resumes, not a model" in refused(
        capsys, checkpoint, "--delta"
    )
    unfinished = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model", "export"))
    says = f"the run in {unfinished} has no model yet; finish it with `train --resume`"
    assert says in refused(capsys, unfinished, "--delta")
    assert "does not say which model it began with" in refused(
        capsys, run / "model", "--delta", "--output", "x"
    )
    assert "there is no converter absent; make an environment for it: python3 -m venv" in refused(
        capsys, run, "--gguf", "bf16", "--converter", "absent"
    )
    (unfinished / "recipe.yaml").write_text("model: 3\n")
    (unfinished / "model").symlink_to(run / "model")
    assert "recipe.yaml is damaged" in refused(capsys, unfinished, "--delta")
