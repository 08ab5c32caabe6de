"""The command line: help that helps, one sentence for bad input, and exit codes that tell what happened."""

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tiny_run
from lisatune import __version__
from lisatune.cli import app
from lisatune.cli.app import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets it


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    return tiny_run.write_recipe(tmp_path, model, tiny_run.write_rows(tmp_path / "rows.jsonl"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lisatune", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_help_shows_commands_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for part in (
        "train",
        "check",
        "layers",
        "generate",
        "--debug",
        "lisatune train recipe.yaml run.steps=200",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", ["init", "train", "check", "layers", "generate"])
def test_help_of_each_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n    lisatune {name} " in out
    assert (" batch_size," in out) == (name in ("train", "check"))
    assert max(map(len, out.splitlines())) <= 100
    assert out.count("\n") < 60


@pytest.mark.parametrize(
    ("asked", "key"),
    [("run", "--run.batch_size"), ("method", "--method.active"), ("lora", "--method.rank")],
)
def test_help_of_a_section_or_method_explains_its_keys(
    asked: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--help", asked]) == 0
    out = capsys.readouterr().out
    assert key in out
    assert "[default: " in out
    assert "--data.train" not in out
    assert main(["train", "--help", "rnu"]) == 2
    assert "unknown section or method 'rnu'. Did you mean 'run'?" in capsys.readouterr().err


def test_quiet_prints_nothing_and_trains(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "run.steps=1", "method.active=4", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (recipe.parent / "run" / "model").is_dir()


def test_a_shell_can_complete_commands_and_options() -> None:
    script = app.build_app().generate_completion(shell="bash")
    assert "init" in script
    assert "--overwrite" in script


def test_help_imports_neither_torch_nor_anything_that_trains() -> None:
    script = (
        "import sys; from lisatune.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'lisatune.train', 'lisatune.memory', 'transformers', 'datasets'}\n"
        "sys.stderr.write(str(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "Commands" in done.stdout
    assert done.stderr == "[]"


def test_without_the_packages_of_training_the_command_says_how_to_install_them() -> None:
    script = (
        "import sys\n"
        "for name in ('cyclopts', 'rich', 'yaml', 'transformers'): sys.modules[name] = None\n"
        "from lisatune.cli import main; sys.exit(main(['train', 'recipe.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("lisatune: error: ")
    assert done.stderr.endswith('the command needs packages: pip install "lisatune[train]"\n')
    assert done.stderr.count("\n") == 1


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_paths_of_a_command_may_begin_with_the_home_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))
    assert main(["check", "~/recipe.yaml"]) == 0
    assert main(["train", "~/recipe.yaml", "run.output=~/there", "run.steps=1", "method.active=4"]) == 0
    assert (recipe.parent / "there" / "model").is_dir()
    seen = spy_on_prompts(monkeypatch)
    assert main(["generate", "~/there", "--prompt", "~/x"]) == 0
    assert seen == [[[{"role": "user", "content": "~/x"}]]]
    assert main(["report", "~/there", "--output=~/page.html", "--without-weights"]) == 0
    assert (recipe.parent / "page.html").is_file()
    capsys.readouterr()


def spy_on_prompts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Collect the prompts that `generate` asks a model."""
    seen: list[object] = []

    def answer(model: object, tokenizer: object, prompts: list[object], **_: object) -> list[str]:
        seen.append(prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr("lisatune.evaluate.held_out.generate_answers", answer)
    return seen


def test_generate_asks_without_a_template_after_training_on_plain_prompts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(12))
    (recipe.parent / "rows.jsonl").write_text(rows)
    assert main(["train", str(recipe), "run.steps=1", "method.active=4"]) == 0
    seen = spy_on_prompts(monkeypatch)
    run = str(recipe.parent / "run")
    for flags in ([], ["--chat-template", "on"]):
        assert main(["generate", run, "--prompt", "1+1=", *flags]) == 0
    assert seen == [["1+1="], [[{"role": "user", "content": "1+1="}]]]
    capsys.readouterr()


def test_train_leaves_a_whole_run_folder_and_generate_answers_from_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", str(recipe), "--run.steps", "3", "optimizer.lr=0.002"]) == 0
    out = capsys.readouterr().out
    assert "╭─ run" in out
    assert "step 3/3" in out
    assert "╭─ result" in out
    run = recipe.parent / "run"
    names = {entry.name for entry in run.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "model"}
    assert json.loads((run / "summary.json").read_text())["steps"] == 3

    assert (
        main(["generate", str(run), "--prompt", "Count.", "--prompt", "Count!", "--max-new-tokens", "2"]) == 0
    )
    out = capsys.readouterr().out
    assert "> Count.\n" in out
    assert "> Count!\n" in out

    seen = spy_on_prompts(monkeypatch)
    for flags in ([], ["--chat-template", "off"]):
        assert main(["generate", str(run), "--prompt", "Count.", "--max-new-tokens", "1", *flags]) == 0
    assert seen == [[[{"role": "user", "content": "Count."}]], ["Count."]]
    capsys.readouterr()

    assert main(["train", str(recipe)]) == 2
    assert "holds a finished run; name another run.output" in capsys.readouterr().err
    for flag in ("--resume", "--resume=auto"):
        assert main(["train", str(recipe), flag, "run.steps=3", "optimizer.lr=0.002"]) == 0
        assert capsys.readouterr().out.startswith(f"the run in {run} is finished; for more steps give")


def test_check_lists_problems_and_says_so_by_its_exit_code(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe)]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", str(recipe), "method.active=9", "run.device=cuba"]) == 2
    assert "2 problems" in capsys.readouterr().out
    assert not (recipe.parent / "run").exists()


def test_a_terminal_without_utf_8_is_printed_to(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["check", str(recipe)]) == 0
    terminal.seek(0)
    assert "+- run --" in terminal.read()


def test_layers_shows_blocks_and_ends_without_weights(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(model)]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0 … model.layers.3" in out
    assert "model.embed_tokens.weight = lm_head.weight" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train"], 'Command "train" parameter RECIPE requires an argument.'),
        (["train", "RECIPE", "--resum"], "Unknown option: --resum. Did you mean --resume?"),
        (["train", "RECIPE", "steps=5"], "override 'steps=5' must look like section.key=value"),
        (
            ["train", "RECIPE", "--run.stepz", "5"],
            "command line: unknown key 'run.stepz'. Did you mean 'run.steps'?",
        ),
        (["train", "RECIPE", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["train", "RECIPE", "--resume"], "there is no run to resume in"),
        (["train", "RECIPE", "method.active=5"], "active must be between 0 and the model's 4 blocks, got 5"),
        (["cache", "now"], "lisatune cache does not take now; leave it out. See `lisatune cache --help`."),
        (["check", "RECIPE", "--show", "-1"], "--show must be >= 0, got -1"),
        (["train", "rows.jsonl"], "rows.jsonl is data; give a recipe, such as `lisatune init --data rows.js"),
        (["train", "RECIPE", "data.train=a.csv,b.csv"], "several sources are a list: [a.csv, b.csv]"),
        (["train", "RECIPE", "data.fields={text:body}"], "got nothing; put a space after the colon"),
        (["train", "RECIPE", "data.train=MODEL"], "it is the folder of a model; name one of data, or a file"),
        (["report", "MODEL"], "nothing to report: MODEL holds no run; name the folder of one"),
        (["train", "absent.yaml"], "recipe absent.yaml does not exist"),
        (["check", "absent.yaml"], "recipe absent.yaml does not exist"),
        (["layers", "./absent"], "there is no model folder ./absent"),
        (["generate", "./absent", "--prompt", "x"], "there is no model folder ./absent"),
        (
            ["generate", "./absent", "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens must be >= 1, got 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    recipe: Path, model: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(recipe.parent.iterdir())
    places = {"RECIPE": str(recipe), "MODEL": str(model)}
    assert main([re.sub("RECIPE|MODEL", lambda word: places[word[0]], each) for each in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lisatune: error: ")
    assert sentence.replace("MODEL", str(model)) in err
    assert err.count("\n") == 1
    assert sorted(recipe.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ImportError('no trl; pip install "lisatune[train]"'),
            2,
            'lisatune: error: no trl; pip install "lisatune[train]"\n',
        ),
        (OSError("cannot write runs/x: No space left on device"), 2, "No space left on device\n"),
        (PermissionError(13, "Permission denied", "/proc/1"), 2, "error: Permission denied: '/proc/1'\n"),
        (RuntimeError("first\nsecond"), 2, "lisatune: error: first (--debug shows more)\n"),
        (KeyError("x"), 1, "lisatune: KeyError: 'x' (a defect; --debug shows the traceback)\n"),
        (
            KeyboardInterrupt("stopped after step 3; use --resume"),
            130,
            "lisatune: stopped after step 3; use --resume\n",
        ),
        (KeyboardInterrupt(), 130, "lisatune: interrupted\n"),
    ],
)
def test_each_kind_of_end_has_its_exit_code(
    recipe: Path,
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lisatune.train.loop.train", fail)
    assert main(["train", str(recipe)]) == code
    err = capsys.readouterr().err
    assert err.endswith(said)
    assert "Traceback" not in err
    assert main(["train", str(recipe), "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_warnings_name_what_is_wrong_and_no_line_of_code() -> None:
    text = app._format_warning("2 blocks never train", UserWarning, "lisa.py", 5)
    assert text == "lisatune: warning: 2 blocks never train\n"
    assert "lib.py:5" in app._format_warning("old name", FutureWarning, "lib.py", 5)


def test_an_empty_argument_is_refused_and_nothing_after_it_is_dropped(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unset shell variable: every argument after it used to be ignored, run.output among them."""
    run = recipe.parent / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("of a finished run")
    new = recipe.parent / "new"
    assert main(["train", str(recipe), "--overwrite", "", f"run.output={new}"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "lisatune: error: the argument after '--overwrite' is empty; give it a value or leave it out\n"
    )
    assert (run / "recipe.yaml").read_text() == "of a finished run"
    assert not new.exists()
    assert main(["", "train"]) == 2
    assert "the argument after 'lisatune' is empty" in capsys.readouterr().err
    assert main(["train", str(recipe), "--run.output", ""]) == 2
    assert "the argument after '--run.output' is empty" in capsys.readouterr().err


def test_the_process_itself_ends_with_these_codes(tmp_path: Path) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    done = command("train", str(tmp_path / "absent.yaml"))
    assert done.returncode == 2
    assert done.stderr == f"lisatune: error: recipe {tmp_path}/absent.yaml does not exist\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    line = f"{sys.executable} -m lisatune train --help"
    done = subprocess.run(["bash", "-c", f"{line} | true"], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
