"""Bad input through the command line: one sentence, exit code 2, and nothing written or lost."""

import errno
import fcntl
import importlib
import io
import json
import math
import os
import pickle
import select
import shutil
import signal
import sys
import termios
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lisatune.train.loop
import tiny_run
from forks import ended, forked
from lisatune.cli.app import main
from lisatune.files.tensors import write_stream
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.runs.manifest import newest_checkpoint
from lisatune.train.stopping import interruptible

GOOD = json.dumps({"instruction": "Count.", "output": "1 2"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"))


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command line; it must refuse in one sentence and leave every file as it was."""

    def call(*arguments: str | Path, says: tuple[str, ...]) -> str:
        before = content(tmp_path)
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = one_sentence(capfd, *says)
        assert content(tmp_path) == before
        return error

    return call


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with its bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_sentence(capture: pytest.CaptureFixture[str], *parts: str, start: str = "lisatune: error: ") -> str:
    error = capture.readouterr().err
    assert error.startswith(start)
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert [part for part in parts if part not in error] == [], error
    return error


def trained(recipe: Path, output: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Run a recipe undisturbed and return the weights it ends with."""
    folder = recipe.parent / output
    assert main(["train", str(recipe), f"run.output={folder}", *overrides]) == 0
    return load_file(folder / "model" / "model.safetensors")


def assert_equal(weights: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == other.keys()
    assert [name for name in weights if not torch.equal(weights[name], other[name])] == []


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- keys and values

VALUES: list[tuple[list[str], tuple[str, ...]]] = [
    (["run.stepz=3"], ("unknown key 'run.stepz'", "Did you mean 'run.steps'?")),
    (["rum.steps=3"], ("unknown section 'rum'", "Did you mean 'run'?")),
    (["method.name=lsia"], ("unknown method 'lsia'", "Did you mean 'lisa'?")),
    (["method.state=dorp"], ("method.state must be one of", "got 'dorp'", "Did you mean 'drop'?")),
    (["run.steps=many"], ("run.steps must be a whole number", "got 'many'")),
    (["run.steps=0"], ("run.steps must be >= 1, got 0",)),
    (["run.seed=-1"], ("run.seed must be >= 0 and below 2**63, got -1",)),
    (["run.seed=9223372036854775808"], ("run.seed must be >= 0 and below 2**63, got 922",)),
    (["optimizer.lr=nan"], ("optimizer.lr must be a positive number, got nan",)),
    (["optimizer.lr=inf"], ("optimizer.lr must be a positive number, got inf",)),
    (["optimizer.ends_lr=0"], ("optimizer.ends_lr must be a positive number or null, got 0.0",)),
    (["model.attention=lisa_cpu"], ("unknown model.attention 'lisa_cpu'", "Did you mean 'lisatune_cpu'?")),
    (["optimizer.eps=nan"], ("optimizer.eps must be a positive number, got nan",)),
    (["optimizer.eps=inf"], ("optimizer.eps must be a positive number, got inf",)),
    (["optimizer.weight_decay=nan"], ("optimizer.weight_decay must be a number >= 0, got nan",)),
    (["optimizer.weight_decay=inf"], ("optimizer.weight_decay must be a number >= 0, got inf",)),
    (["optimizer.max_grad_norm=nan"], ("optimizer.max_grad_norm must be > 0 or null, got nan",)),
    (["optimizer.betas=[nan,0.9]"], ("optimizer.betas must be in [0, 1)", "nan")),
    (["data.validation_share=nan"], ("data.validation_share must be >= 0 and below 1, got nan",)),
    (["method.active=5"], ("active must be between 0 and the model's 4 blocks, got 5",)),
    (["method.active=-1"], ("active must be between 0 and the model's 4 blocks, got -1",)),
    (["method.period=0"], ("period must be a number of optimizer steps >= 1", "got 0")),
    (["method.warmup=2"], ("warmup must be >= 0 and below period=2, got 2",)),
    (["method.sampler=weighted"], ("weighted needs method.probabilities",)),
    (["method.probabilities=[1,1,1,1]"], ("does nothing with method.sampler permutation",)),
    (["run.report_to=[tensorbord]"], ("unknown tracker 'tensorbord'", "known: tensorboard, wandb")),
    (["run.device=cuba"], ("unknown run.device 'cuba'", "use auto or one of cpu, cuda")),
    (["run.device=meta"], ("unknown run.device 'meta'",)),
    (["run.device=cpu:x"], ("run.device 'cpu:x' cannot be used here", "use auto")),
    (["model.attention=flash"], ("flash", "sdpa")),
    (
        ["data.validation_share=0", "run.eval_every=2"],
        ("run.eval_every=2 needs held-out data, and data.validation_share is 0",),
    ),
    (["data.max_length=20"], ("all answers are cut off by max_length=20", "has 30 tokens", "set max_length")),
    (["data.train=./absent.jsonl"], ("there is no file or folder ./absent.jsonl",)),
    (["data.validation=./absent.jsonl"], ("there is no file or folder ./absent.jsonl",)),
    (["model.name=./absent"], ("there is no model folder ./absent",)),
]


@pytest.mark.parametrize(("overrides", "says"), VALUES, ids=lambda value: value[0])
def test_unknown_keys_and_impossible_values(
    recipe: Path, refused: Callable[..., str], overrides: list[str], says: tuple[str, ...]
) -> None:
    refused("train", recipe, *overrides, says=says)


@pytest.mark.parametrize(
    ("sampler", "probabilities", "says"),
    [
        ("weighted", "[0.5, 0.5]", "got 2 probabilities for 4 blocks; give one per block"),
        ("weighted", "[0.5, 0.5, -0.1, 0.1]", "the probability of block 2 must be 0 or more, got -0.1"),
        ("weighted", "[.nan, 1, 1, 1]", "the probability of block 0 must be 0 or more, got nan"),
        ("weighted", "[1, .inf, 1, 1]", "the probability of block 1 must be 0 or more, got inf"),
        (
            "weighted",
            "[1, 0, 0, 0]",
            "cannot draw active=2 blocks from 1 with probability > 0; lower `active`",
        ),
        ("weighted", "[a, 1, 1, 1]", "method.probabilities must be a list (each a number) or null"),
        ("independent", "[0.5]", "got 1 probabilities for 4 blocks; give one per block"),
        ("independent", "[0.5, 0.5, 1.5, 0]", "the probability of block 2 must be between 0 and 1, got 1.5"),
        ("independent", "[.nan, 1, 1, 1]", "the probability of block 0 must be between 0 and 1, got nan"),
    ],
)
def test_probabilities_that_cannot_be(
    recipe: Path, refused: Callable[..., str], sampler: str, probabilities: str, says: str
) -> None:
    options = (f"method.sampler={sampler}", f"method.probabilities={probabilities}")
    refused("train", recipe, *options, says=(says,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, ("does not exist",)),
        (b"", ("is empty; it needs at least model.name and data.train",)),
        (b"model: {name: \xff}", ("is not UTF-8 text (byte 14)",)),
        (b"model: {name: m}\nmethod:\n\tactive: 2\n", ("line 3", "not valid YAML", "'\\t'")),
        (b"run: {steps: 1}\nrun: {steps: 2}\n", ("line 2", "key 'run' is given twice")),
        (b"metod: {active: 2}\n", ("unknown section 'metod'", "Did you mean 'method'?")),
        (b"model: {name: m}\n", ("data", "is missing; add it")),
        (b"- model\n", ("must be sections of keys, got a list",)),
    ],
)
def test_recipe_files_that_cannot_be_read(
    tmp_path: Path, refused: Callable[..., str], text: bytes | None, says: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text)
    refused("train", path, says=(str(path), *says))


def test_trackers_that_are_not_installed(
    recipe: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisatune.train.trackers.find_spec", lambda name: None)
    refused(
        "train", recipe, "run.report_to=[mlflow]", says=("run.report_to: mlflow needs `pip install mlflow`",)
    )


# ---- records

BAD_ROWS = [
    (b"{oops", "not JSON ("),
    (b'{"instruction": "\xff", "output": "b"}', "not UTF-8 (byte 0xff); save it as UTF-8"),
    (b'{"instruction": "a"}', "the field 'output' is missing; the fields are: instruction"),
    (b'{"instruction": "a", "output": null}', "'output' must be text, got null"),
    (b'{"instruction": 5, "output": "b"}', "'instruction' must be text, got the number 5"),
    (b'{"instruction": "a", "output": ["b"]}', "'output' must be text, got a list"),
    (b"[1]", "a record must be an object with named fields, got a list"),
    (b"null", "a record must be an object with named fields, got null"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[row.decode(errors="replace") for row, _ in BAD_ROWS])
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(
    recipe: Path, refused: Callable[..., str], row: bytes, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe.parent / "rows.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], row, *lines[3:], row, b""]))
    refused("train", recipe, says=(f"{path}, line 4: {says}", "fix it, or set data.on_bad_row=skip"))
    assert main(["train", str(recipe), "data.on_bad_row=skip", "method.period=1"]) == 0
    assert "; 2 skipped: not usable" in capfd.readouterr().out
    assert main(["check", str(recipe), "data.on_bad_row=skip", f"run.output={recipe.parent / 'new'}"]) == 0
    assert "; 2 skipped: not usable" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty: it has no records"),
        ("\n \n", "is empty: it has no records"),
        (GOOD, "has 1 different prompt, and holding it out leaves nothing to train on; give validation"),
        ("{oops\n" * 3, "has no usable record among 3; the first: "),
    ],
)
def test_data_of_which_nothing_is_left(
    recipe: Path, refused: Callable[..., str], text: str, says: str
) -> None:
    path = recipe.parent / "rows.jsonl"
    path.write_text(text)
    refused(
        "train", recipe, "data.on_bad_row=skip", says=(str(path), says) if "share" not in says else (says,)
    )


# ---- models


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plant_nan(folder: Path, name: str, row: int = 0) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name][row, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json; give a folder that"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no weights (*.safetensors)"),
    "no tokenizer": (
        lambda m: [path.unlink() for path in m.glob("token*")],
        "it has no tokenizer files; copy those of its base model",
    ),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), "is not a valid JSON file"),
    "config is empty": (lambda m: (m / "config.json").write_text("{}"), "Should have a `model_type` key"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "must be a mapping, not list"),
    "unknown type": (lambda m: change_config(m, model_type="lama"), "has model type `lama` but"),
    "wrong type of value": (
        lambda m: change_config(m, hidden_size="x"),
        "Field 'hidden_size' expected int, got str (value: 'x')",
    ),
    "sizes do not match": (
        lambda m: change_config(m, num_attention_heads=3),
        "The hidden size (16) is not a multiple of the number of attention heads (3)",
    ),
    "unknown activation": (lambda m: change_config(m, hidden_act="gleu"), "KeyError: 'gleu'"),
    "missing blocks": (
        lambda m: change_config(m, num_hidden_layers=5),
        "lacks weights, which would be random",
    ),
    "other shapes": (lambda m: change_config(m, intermediate_size=8), "has weights in another shape"),
    "cut weights": (
        lambda m: (m / "model.safetensors").write_bytes(b"\0" * 9),
        "Error while deserializing header",
    ),
    "weights with NaN": (
        lambda m: plant_nan(m, "model.layers.1.mlp.up_proj.weight"),
        "weights hold NaN or infinity, in model.layers.1.mlp.up_proj.weight; fetch or export the model again",
    ),
    "Git LFS pointer": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "model.safetensors is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    ),
    "broken template": (
        lambda m: (m / "chat_template.jinja").write_text("{% for"),
        "record 1: the chat template refuses this conversation",
    ),
    "too short": (
        lambda m: change_config(m, max_position_embeddings=40),
        "tokens and the model reads at most 40; set data.max_length=40",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders_that_cannot_be_used(
    case: str, recipe: Path, model: Path, refused: Callable[..., str]
) -> None:
    spoil, says = MODELS[case]
    folder = shutil.copytree(model, recipe.parent / "spoilt")
    spoil(folder)
    refused("train", recipe, f"model.name={folder}", says=(says,))


def test_a_tokenizer_of_another_model_is_refused(
    recipe: Path, model: Path, refused: Callable[..., str]
) -> None:
    folder = shutil.copytree(model, recipe.parent / "spoilt")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, vocab_size=100, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    says = ("the tokenizer makes token 258, and the model has 100 (from 0); give the model the tokenizer",)
    refused("train", recipe, f"model.name={folder}", says=says)
    assert main(["check", str(recipe), f"model.name={folder}"]) == 2


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(
    name: str, recipe: Path, model: Path, refused: Callable[..., str]
) -> None:
    folder = shutil.copytree(model, recipe.parent / "spoilt")
    (folder / "model.safetensors").unlink()
    trace = recipe.parent / "the-pickle-ran"
    (folder / name).write_bytes(pickle.dumps(Malicious(trace)))
    for command in ("train", "check"):
        assert main([command, str(recipe), f"model.name={folder}"]) == 2
    assert not trace.exists()
    says = (f"model folder {folder} has pickled weights only ({name})", "save it as safetensors first")
    refused("train", recipe, f"model.name={folder}", says=says)
    refused("layers", folder, says=says)
    refused("generate", folder, "--prompt", "x", says=says)
    pickle.loads((folder / name).read_bytes())  # noqa: S301  (proves that the trap works)
    assert trace.exists()


# ---- the run folder


def test_an_output_folder_that_exists_is_left_alone(recipe: Path, refused: Callable[..., str]) -> None:
    run = recipe.parent / "run"
    trained(recipe, "run")
    refused(
        "train", recipe, says=(f"run folder {run} holds a finished run", "name another run.output to start")
    )
    refused("train", recipe, "--resume", "--overwrite", says=("exclude each other; use one of them",))
    (run / "environment.json").unlink()
    refused("train", recipe, "--overwrite", says=(f"{run} does not look like a run folder", "name another"))


def test_an_output_that_cannot_be_written(
    recipe: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = recipe.parent / "rows.jsonl"
    refused("train", recipe, f"run.output={rows}", says=(f"run.output {rows} is a file; name a folder",))
    refused(
        "train", recipe, f"run.output={rows}/a/b", says=(f"lies in {rows}, which is a file; name another",)
    )
    refused(
        "train", recipe, "run.output=/proc/lisatune", says=("cannot write", "/proc/lisatune", "name another")
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("train", recipe, says=(f"cannot write to {recipe.parent}; name another run.output",))


def test_a_disk_full_while_a_checkpoint_is_saved_costs_that_checkpoint_alone(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    straight = trained(recipe, "straight")
    run, saved = recipe.parent / "run", {}

    def fill_up(path: Path, *rest: Any) -> None:
        if (run / "checkpoints" / "step-000002").exists() and path.name == "optimizer.safetensors":
            saved.update(content(run / "checkpoints" / "step-000002"))
            path.write_bytes(b"half of it")
            no_space()
        write_stream(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("lisatune.files.parts.write_stream", fill_up)
        capfd.readouterr()
        assert main(["train", str(recipe), "run.save_every=2"]) == 2
    one_sentence(capfd, f"could not write {run}/checkpoints/step-000004", "No space left", "free some space")
    assert saved
    assert content(run / "checkpoints" / "step-000002") == saved
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert_equal(trained(recipe, "run", "--resume"), straight)


def test_a_disk_full_while_metrics_are_logged_keeps_the_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    straight = trained(recipe, "straight")
    run, open_file = recipe.parent / "run", Path.open

    def fill_up(path: Path, *mode: Any, **options: Any) -> Any:
        if path.name == "metrics.jsonl" and newest_checkpoint(run / "checkpoints"):
            no_space()
        return open_file(path, *mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fill_up)
        capfd.readouterr()
        assert main(["train", str(recipe), "run.save_every=2"]) == 2
    one_sentence(
        capfd, f"cannot write {run}/metrics.jsonl: No space left on device; free space or name another"
    )
    assert_equal(trained(recipe, "run", "--resume"), straight)


def test_a_disk_full_at_the_start_leaves_no_half_written_file(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe)]) == 0  # its tokens are in the cache already
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert main(["train", str(recipe)]) == 2
    one_sentence(capfd, "recipe.yaml: No space left on device; free space or name another output")
    assert [path.name for path in (recipe.parent / "run").iterdir()] == [".lock"]
    trained(recipe, "run")


# ---- resume


def test_resume_refuses_what_is_not_the_same_run(recipe: Path, refused: Callable[..., str]) -> None:
    run = recipe.parent / "run"
    refused("train", recipe, "--resume", says=(f"no run to resume in {run}; start it without --resume, or",))
    trained(recipe, "run")
    says: tuple[str, ...] = (f"the run in {run} has no checkpoint to continue from, and it is finished",)
    refused("train", recipe, "--resume", "run.steps=9", says=(*says, f"set model.name={run / 'model'}"))
    shutil.rmtree(run)
    trained(recipe, "run", "run.save_every=2")
    says = ("the recipe differs from", "method.active: 2 → 1; optimizer.lr: 0.001 → 0.1; undo that, or name")
    refused("train", recipe, "--resume", "optimizer.lr=0.1", "method.active=1", says=says)
    says = ("the run has done 4 steps and the recipe asks for 3; give more run.steps",)
    refused("train", recipe, "--resume", "run.steps=3", says=says)


# ---- numbers that are not finite, memory that runs out


def test_a_loss_that_is_nan_stops_before_it_reaches_the_weights(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        nan_at(patch, 1)
        assert main(["train", str(recipe), f"run.output={recipe.parent / 'first'}"]) == 2
    one_sentence(capfd, "step 1: loss nan", "no checkpoint was saved yet", "lower optimizer.lr")
    nan_at(monkeypatch, 4)
    assert main(["train", str(recipe), "run.save_every=1"]) == 2
    last = recipe.parent / "run" / "checkpoints" / "step-000003"
    one_sentence(
        capfd, "step 4: loss nan", f"the last good checkpoint is {last}", "set run.on_nonfinite: skip"
    )
    monkeypatch.undo()
    capfd.readouterr()
    resumed = trained(recipe, "run", "run.save_every=1", "--resume")
    assert_equal(resumed, trained(recipe, "straight"))


def test_steps_that_are_nan_are_skipped_and_counted(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, 2)
    weights = trained(recipe, "run", "run.on_nonfinite=skip")
    assert "1 step: loss or gradients not finite" in capfd.readouterr().out
    assert json.loads((recipe.parent / "run" / "summary.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("method", ["method: {active: 2, period: 2}\n", "method: {name: full}\n"])
def test_a_run_whose_steps_were_all_skipped_says_so(
    method: str,
    recipe: Path,
    model: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nan_at(monkeypatch, 1, 2, 3, 4)
    recipe = tiny_run.write_recipe(recipe.parent, model, recipe.parent / "rows.jsonl", method)
    assert main(["train", str(recipe), "run.on_nonfinite=skip"]) == 2
    one_sentence(
        capfd, "nothing was trained: all 4 steps were left out", "look for NaN in the model's weights"
    )
    assert not (recipe.parent / "run" / "model").exists()


def nan_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Multiply the loss of some steps by NaN."""
    call = CausalLMLoss.__call__
    make_step = lisatune.train.loop._step

    def step(parts: Any, done: Any, *rest: Any) -> Any:
        factor = math.nan if done.step + 1 in steps else 1

        def spoilt(self: Any, batch: Any) -> Any:
            loss, num_tokens = call(self, batch)
            return loss * factor, num_tokens

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CausalLMLoss, "__call__", spoilt)
            return make_step(parts, done, *rest)

    monkeypatch.setattr(lisatune.train.loop, "_step", step)


# ---- Ctrl-C

NOTICE = "\nlisatune: stopping after this step; Ctrl-C again stops at once\n"
"""What the first one is answered with, before the sentence that says how to go on."""


def test_ctrl_c_saves_and_the_resumed_run_ends_bit_equal(recipe: Path) -> None:
    steps, log = "run.steps=100", recipe.parent / "log"
    straight = trained(recipe, "straight", steps)
    log.touch()
    pid = forked(lambda: main(["train", str(recipe), steps]), log)
    while "\nstep " not in log.read_text():
        assert ended(pid, 0.01) is None, log.read_text()
    os.kill(pid, signal.SIGINT)
    assert ended(pid, 60) == 130
    notice, outcome = (line for line in log.read_text().splitlines() if line.startswith("lisatune: "))
    assert notice == NOTICE.strip()
    assert outcome.startswith("lisatune: stopped after step ")
    assert " of 100, which is saved; resume from " in outcome
    assert outcome.endswith(" with the same command and --resume")
    checkpoint = newest_checkpoint(recipe.parent / "run" / "checkpoints")
    assert checkpoint is not None
    assert f"after step {int(checkpoint.name.removeprefix('step-'))} of" in outcome
    assert_equal(trained(recipe, "run", steps, "--resume"), straight)


def test_ctrl_c_saves_also_if_it_has_ended_what_reads_the_output(recipe: Path) -> None:
    """As in `lisatune train recipe.yaml 2>&1 | tee log`."""
    reads, writes = os.pipe()

    def act() -> int:
        os.close(reads)
        sys.stdout = sys.stderr = os.fdopen(writes, "w", buffering=1)
        os.dup2(writes, 1)
        return main(["train", str(recipe), "run.steps=1000"])

    pid = forked(act, recipe.parent / "log")
    os.close(writes)
    said = b""
    while b"\nstep " not in said:
        new = os.read(reads, 1000)
        assert new, said.decode()
        said += new
    os.close(reads)
    os.kill(pid, signal.SIGINT)
    assert ended(pid, 60) == 130
    assert newest_checkpoint(recipe.parent / "run" / "checkpoints") is not None


def test_ctrl_c_inside_a_write_to_stderr_stops_as_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raw(io.FileIO):
        def write(self, line: Any) -> int:
            if b"a warning" in bytes(line):
                signal.raise_signal(signal.SIGINT)
            return super().write(line)

    with io.TextIOWrapper(io.BufferedWriter(Raw(tmp_path / "log", "w")), line_buffering=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with interruptible() as asked:
            stream.write("a warning\n")
            assert asked() is KeyboardInterrupt
    assert NOTICE in (tmp_path / "log").read_text()


def test_a_closed_terminal_ends_the_run_with_a_checkpoint(recipe: Path) -> None:
    ours, theirs = os.openpty()
    metrics = recipe.parent / "run" / "metrics.jsonl"

    def act() -> int:
        os.close(ours)
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        for file in (1, 2):
            os.dup2(theirs, file)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        return main(["train", str(recipe), "run.steps=1000"])

    pid = forked(act, recipe.parent / "log")
    os.close(theirs)
    said = b""
    while not (metrics.exists() and b'"step": 3,' in metrics.read_bytes()):
        said += os.read(ours, 10_000) if select.select([ours], [], [], 0.05)[0] else b""
        assert ended(pid, 0) is None, said.decode()
    os.close(ours)
    assert ended(pid, 60) == 143
    assert newest_checkpoint(recipe.parent / "run" / "checkpoints") is not None


def test_a_terminal_that_closes_over_nohup_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("function", "call", "says"),
    [
        ("loop.assemble", 1, "interrupted\n"),
        (
            "evaluation.held_out",
            1,
            "nothing was trained yet, so start again with the same command\n",
        ),
        ("evaluation.answer_samples", 2, "stopped after training; the model is in "),
    ],
)
def test_ctrl_c_outside_the_loop_says_how_to_go_on(
    function: str,
    call: int,
    says: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file, _, name = function.partition(".")
    module = importlib.import_module(f"lisatune.train.{file}")
    calls, act = 0, getattr(module, name)

    def press(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return act(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, press)
        assert main(["train", str(recipe)]) == 130
    one_sentence(capfd, says, start="lisatune: ")
    trained(recipe, "run", *(["--overwrite"] if (recipe.parent / "run" / "model").exists() else []))


def test_a_second_ctrl_c_stops_at_once_and_names_the_last_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_step = lisatune.train.loop._step

    def press_twice(parts: Any, done: Any, *rest: Any) -> Any:
        if done.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return make_step(parts, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(lisatune.train.loop, "_step", press_twice)
        assert main(["train", str(recipe), "run.save_every=1"]) == 130
    last = recipe.parent / "run" / "checkpoints" / "step-000002"
    outcome = capfd.readouterr().err.removeprefix(NOTICE)
    assert outcome == f"lisatune: stopped at once; resume from {last} with the same command and --resume\n"
    assert_equal(trained(recipe, "run", "--resume"), trained(recipe, "straight"))


def test_a_second_ctrl_c_in_a_run_that_is_made_longer_does_not_name_its_former_model(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["run.save_every=2", "optimizer.schedule=constant"]
    trained(recipe, "run", *options)
    capfd.readouterr()
    make_step = lisatune.train.loop._step

    def press_twice(parts: Any, done: Any, *rest: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return make_step(parts, done, *rest)

    monkeypatch.setattr(lisatune.train.loop, "_step", press_twice)
    assert main(["train", str(recipe), *options, "run.steps=9", "--resume"]) == 130
    assert "stopped at once; resume from " in capfd.readouterr().err
