"""The code of the tutorials runs as it stands, page by page, with a tiny model in place of the named one."""

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.distributed.run import parse_args

from forks import ended
from lisatune.cli import app
from lisatune.compare import measure, processes
from lisatune.compare.results import read_results
from rank_launcher import start
from tiny_run import write_model, write_rows

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = sorted(path.stem for path in (DOCS / "tutorials").glob("*.md") if path.stem != "index")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)

pytestmark = [
    # SFTConfig sets checkpointing by default, under the name that transformers is giving up.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    # Lightning's advice, and what it calls in torch.
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder in which the hub ids of the tutorials are folders, and go there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(processes, "call", call_in_process)
    write_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    write_rows(tmp_path / "rows.jsonl", 24)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    for name, row in {
        "tatsu-lab/alpaca": {"text": "one two"},
        "trl-lib/Capybara": {"messages": chat},
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 84)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def call_in_process(command: list[str], log: Path, poll: Callable[[], None], lock: int) -> None:
    """Run a comparison's child in this process: starting one takes longer than its work."""
    poll()
    main = {"lisatune": app.main, "lisatune.compare.measure": measure.main}[command[0]]
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = main(command[1:])
    log.write_text(output.getvalue())
    processes.check_exit(code, output.getvalue())


def run_page(name: str, names: dict[str, Any]) -> list[str]:
    """Do what a page says, from top to bottom; return the commands that were run."""
    commands = []
    for language, file, text in BLOCK.findall(
        (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    ):
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{name}.md", "exec"), names)  # noqa: S102 - our own page
        elif language == "sh":
            for command in text.splitlines():
                run_command(shlex.split(command, comments=True))
                commands.append(command)
        else:
            assert language == "text", f"{name}.md: nothing runs a block of {language}"
    assert commands or names.keys() & {"lisa", "tuning"}
    return commands


def run_command(words: list[str]) -> None:
    if words[0] == "torchrun":
        asked = parse_args(words[1:])
        assert asked.module
        assert (asked.training_script, asked.nproc_per_node) == ("lisatune", "2")
        # Ranks are forked from this process, and do not start one more for the plan. What a launcher starts
        # and a plan of ranks are in tests/integration, test_ranks.py and test_rank_plan.py.
        arguments = [*asked.training_script_args, "run.check_memory=false"]
        pids = start(2, lambda: app.main(arguments), Path())
        assert [ended(pid, 120) for pid in pids] == [0, 0], Path("rank-0.log").read_text()
    else:
        assert words[0] == "lisatune"
        assert app.main(words[1:]) == 0, words


@pytest.mark.parametrize("name", ["plain-loop", "hf-trainer", "trl", "lightning"])
def test_loops_train_every_layer_and_save_a_model(name: str, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "tutorial"}
    run_page(name, names)
    assert (place / "tuned" / "model.safetensors").is_file()
    if name != "plain-loop":
        lisa = names["tuning"].lisa if name == "lightning" else names["lisa"]
        assert lisa.periods_proven >= 1
        assert lisa.steps_done > 10
    else:  # the page ends with a second optimizer, whose ends have a rate of their own
        rates = {group["lr"] for group in names["optimizer"].param_groups}
        assert sorted(rates) == pytest.approx([5e-6, 1e-5])


def test_own_data_becomes_a_model_that_answers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run_page("own-data", {})) == 3
    assert (place / "runs" / "recipe" / "model" / "model.safetensors").is_file()
    assert "error" not in capsys.readouterr().err


def test_plan_says_what_fits_and_how_many_blocks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("choose-active-blocks", {})
    shown = capsys.readouterr().out
    assert "device needs" in shown
    assert "for 4 of 4 blocks" in shown


def test_comparison_has_a_result_for_every_arm(place: Path) -> None:
    run_page("compare-with-lora", {})
    results = read_results(place / "runs" / "recipe-compare" / "results.json")
    assert [arm["name"] for arm in results["arms"]] == ["lora", "lisa"]
    assert results["complete"]
    assert {run["status"] for run in results["runs"]} == {"done"}


def test_killed_run_ends_as_an_undisturbed_one(place: Path) -> None:
    run_page("resume", {})  # the page itself compares the two
    files = [place / "runs" / name / "model" / "model.safetensors" for name in ("recipe", "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_ranks_train_what_one_rank_trains_on_as_many_sequences(place: Path) -> None:
    run_page("two-ranks", {})
    run_command(["lisatune", "train", "recipe.yaml", "run.batch_size=2", "run.output=runs/one"])
    two, one = (
        load_file(place / "runs" / name / "model" / "model.safetensors") for name in ("recipe", "one")
    )
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)  # sums over ranks come in another order


def test_every_tutorial_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in TUTORIALS if f'"{name}"' not in source] == []
