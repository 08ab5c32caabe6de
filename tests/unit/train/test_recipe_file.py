"""Reading recipes: what is written is what is meant, and what is wrong is said in one sentence."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisatune.files import yaml
from lisatune.memory import plan_memory
from lisatune.memory.fit import parse_memory_size
from lisatune.methods import METHODS, Full, Lisa
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.train.recipe_file import load_recipe

BASE = "model: {name: some-model}\ndata: {train: rows.jsonl}\n"
KNOWN = f"Known: {', '.join(METHODS)}"
RECIPES = sorted((Path(__file__).parents[3] / "recipes").rglob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_short_recipe_gets_every_default_and_a_run_folder_named_after_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE))
    assert recipe == Recipe(
        model=ModelConfig(name="some-model"),
        data=DataConfig(train="rows.jsonl"),
        method=Lisa(),
        run=RunConfig(output="runs/mine"),
    )


def test_overrides_beat_the_file_in_both_spellings(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "run: {steps: 7, batch_size: 2}\noptimizer: {lr: 1e-4}\n")
    recipe = load_recipe(
        path, ["run.steps=9", "--optimizer.betas=[0.8, 0.9]", "run.report_to=[wandb, mlflow]"]
    )
    assert (recipe.run.steps, recipe.run.batch_size) == (9, 2)
    assert recipe.optimizer == OptimizerConfig(lr=1e-4, betas=(0.8, 0.9))
    assert recipe.run.report_to == ("wandb", "mlflow")
    assert load_recipe(path, ["run.steps=null"]).run.steps is None


def test_the_method_is_picked_by_its_name_from_file_or_override(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "method: {name: full}\n")
    assert load_recipe(path).method == Full()
    assert load_recipe(path, ["method.name=lisa", "method.active=3"]).method == Lisa(active=3)


def test_another_method_on_the_command_line_starts_from_its_own_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "method: {active: 4, verify: 'off'}\n")
    left_out = (
        r"mine\.yaml: method\.active, method\.verify left out: keys of method lisa\. "
        "Method ends starts from its own defaults"
    )
    with pytest.warns(UserWarning, match=left_out):
        assert load_recipe(path, ["method.name=ends"]).method == METHODS["ends"]()
    with pytest.warns(UserWarning, match="left out"):
        assert load_recipe(path, ["method.name=lora", "method.rank=8"]).method == METHODS["lora"](rank=8)
    assert load_recipe(path, ["method.name=lisa"]).method == Lisa(active=4, verify="off")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'"])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_recipe(write(tmp_path, BASE + f"optimizer: {{lr: {text}}}\n")).optimizer.lr == 1e-4


def test_off_is_a_word_and_null_is_nothing(tmp_path: Path) -> None:
    text = (
        BASE
        + "method: {verify: off, period: auto}\noptimizer: {max_grad_norm: null}\nrun:\n  # all default\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.method.verify, recipe.method.period) == ("off", "auto")
    assert recipe.optimizer.max_grad_norm is None
    assert recipe.run == RunConfig(output="runs/mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe {} is empty; it needs at least model.name and data.train"),
        ("# nothing\n", "recipe {} is empty; it needs at least model.name and data.train"),
        ("- a\n", "recipe {} must be sections of keys, got a list"),
        ("a: [b\nc: d\n", "recipe {}: line 2: not valid YAML: expected ',' or ']', but got ':'"),
        (
            "model: {name: a}\nmodel: {name: b}\n",
            "recipe {}: line 2: not valid YAML: key 'model' is given twice",
        ),
        ("data: {train: t}\n", "{}: model.name is missing; add it"),
        ("model: {name: a}\n", "{}: data.train is missing; add it"),
        (BASE + "lisa: 5\n", "{}: unknown section 'lisa'. Known: model, data, method, loss, optimizer, run"),
        (
            BASE + "rum: {}\n",
            "{}: unknown section 'rum'. Did you mean 'run'? Known: model, data, method, loss, optimizer, run",
        ),
        (BASE + "method: 5\n", "{}: section method must hold lines of `key: value`, got 5"),
        (BASE + "run: {stepz: 5}\n", "{}: unknown key 'run.stepz'. Did you mean 'run.steps'?"),
        (BASE + "run: {packing: true}\n", "{}: unknown key 'run.packing'. Did you mean 'data.packing'?"),
        (
            BASE + "method: {name: full, active: 2}\n",
            "{}: unknown key 'method.active' of method full. Known: name",
        ),
        (
            BASE + "method: {name: lsia}\n",
            "{}: unknown method 'lsia'. Did you mean 'lisa'? " + KNOWN,
        ),
        (BASE + "method: {name: [x]}\n", "{}: unknown method \"['x']\". " + KNOWN),
        (BASE + "run: {steps: four}\n", "{}: run.steps must be a whole number or null, got 'four'"),
        (BASE + "run: {steps: 1.5}\n", "{}: run.steps must be a whole number or null, got 1.5"),
        (BASE + "run: {steps: true}\n", "{}: run.steps must be a whole number or null, got True"),
        (BASE + "run: {steps: {a: 1}}\n", "{}: run.steps must be a whole number or null, got {{'a': 1}}"),
        (BASE + "run: {steps: 0x10}\n", "{}: run.steps must be a whole number or null, got '0x10'"),
        (BASE + "run: {log_every: null}\n", "{}: run.log_every must be a whole number, got null"),
        (BASE + "run: {output: ''}\n", "{}: run.output must be text or null, got nothing"),
        (BASE + "data: {limit: 5}\n", "recipe {}: line 3: not valid YAML: key 'data' is given twice"),
        (BASE + "optimizer: {lr: fast}\n", "{}: optimizer.lr must be a number, got 'fast'"),
        (
            BASE + "method: {name: ia3}\noptimizer: {ends_lr: 1e-4}\n",
            "{}: optimizer.ends_lr=0.0001 does nothing with method ia3, which trains no embedding, head or "
            "final norm; set it to null",
        ),
        (
            BASE + "method: {ends: frozen}\noptimizer: {ends_lr: 1e-4}\n",
            "{}: optimizer.ends_lr=0.0001 does nothing with method lisa, which trains no embedding, head or "
            "final norm with method.ends=frozen; set it to null",
        ),
        (
            BASE + "method: {name: badam}\noptimizer: {ends_lr: 1e-4}\n",
            "{}: optimizer.ends_lr=0.0001 does nothing with method badam, which trains no embedding, head or "
            "final norm with method.ends=frozen; set it to null",
        ),
        (
            BASE + "method: {master: disk}\n",
            "{}: method.master disk does nothing with method.frozen_weights exact; leave it out, or use "
            "int8, mixed or nf4",
        ),
        (
            BASE + "method: {frozen_weights: int8, frozen_scales: fp32}\n",
            "{}: method.frozen_scales fp32 does nothing with method.frozen_weights int8; leave it out, or "
            "use mixed or nf4",
        ),
        (BASE + "optimizer: {lr: -1}\n", "{}: optimizer.lr must be a positive number, got -1.0"),
        (
            BASE + "optimizer: {betas: [0.9]}\n",
            "{}: optimizer.betas must be a list of 2 (each a number), got [0.9]",
        ),
        (
            BASE + "optimizer: {betas: []}\n",
            "{}: optimizer.betas must be a list of 2 (each a number), got []",
        ),
        (
            BASE + "method: {sampler: weighted, probabilities: [null]}\n",
            "{}: method.probabilities must be a list (each a number) or null, got [None]",
        ),
        (
            BASE + "optimizer: {betas: 0.9}\n",
            "{}: optimizer.betas must be a list of 2 (each a number), got 0.9",
        ),
        (BASE + "method: {period: 2.5}\n", "{}: method.period must be a whole number or auto, got 2.5"),
        (
            BASE + "run: {activation_checkpointing: 1}\n",
            "{}: run.activation_checkpointing must be true or false or frozen, got 1",
        ),
        (
            BASE + "method: {sampler: unifrm}\n",
            "{}: method.sampler must be one of permutation, uniform, window, ascending, descending, "
            "gradient, misa, spectrum, file, weight-norm, outlier, weighted, independent, got 'unifrm'. "
            "Did you mean 'uniform'?",
        ),
        (
            "model: {name: a, revision: 1.10}\ndata: {train: t}\n",
            "{}: model.revision must be text or null, got 1.1; put it in quotes",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(path)
    assert str(caught.value) == message.format(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=5", "override 'steps=5' must look like section.key=value, such as run.steps=100"),
        ("run.stepz=5", "command line: unknown key 'run.stepz'. Did you mean 'run.steps'?"),
        ("run.steps=x", "command line: run.steps must be a whole number or null, got 'x'"),
        ("run.steps=", "command line: run.steps must be a whole number or null, got nothing"),
        ("optimizer.lr=-1", "command line: optimizer.lr must be a positive number, got -1.0"),
        (
            "data.loss_on=[user, asistant]",
            "command line: data.loss_on: unknown role 'asistant'. Did you mean 'assistant'? Known: system, "
            "user, assistant, tool",
        ),
        ("data.loss_on=[tool, tool]", "command line: data.loss_on names tool twice; leave one out"),
        (
            "data.loss_on=[]",
            "command line: data.loss_on names no role, so nothing would train; name one, such as [assistant]",
        ),
        (
            "data.loss_on=answer",
            "command line: data.loss_on must be one of auto, answers, last, all or a list (each one of "
            "system, user, assistant, tool), got 'answer'. Did you mean 'answers'?",
        ),
        ("optimizer.betas=[0.9", "override 'optimizer.betas=[0.9': a list is written [a, b]"),
        (
            "method.name=lsia",
            "command line: unknown method 'lsia'. Did you mean 'lisa'? " + KNOWN,
        ),
    ],
)
def test_a_wrong_override_is_refused_and_said_to_come_from_the_command_line(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(write(tmp_path, BASE), [override])
    assert str(caught.value) == message


def test_loss_may_be_on_roles_and_is_read_again_from_its_own_record(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE), ["data.loss_on=[tool, assistant]"])
    assert recipe.data.loss_on == ("tool", "assistant")
    stored = recipe.as_dict()
    assert stored["data"]["loss_on"] == ["tool", "assistant"]
    assert load_recipe(write(tmp_path, yaml.dump(stored))) == recipe


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe .*absent\.yaml does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load_recipe(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: {name: \xe9}")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_recipe(path)


@settings(max_examples=25, deadline=None)
@given(
    # A name that begins with ~ is a path in the user's home, and one like C:/ is refused as a Windows path.
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
        lambda name: not re.match(r"~|[A-Za-z]:[\\/]", name)
    ),
    revision=st.none() | st.from_regex(r"[0-9a-f]{3,8}|[0-9]e[0-9]|off|null|~", fullmatch=True),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    steps=st.none() | st.integers(1, 10**6),
    probabilities=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
)
def test_a_recipe_written_as_yaml_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    revision: str | None,
    lr: float,
    steps: int | None,
    probabilities: tuple[float, ...],
) -> None:
    recipe = Recipe(
        model=ModelConfig(name=name, revision=revision),
        data=DataConfig(train="#odd: file, really"),
        method=Lisa(sampler="weighted", probabilities=probabilities, verify="off"),
        optimizer=OptimizerConfig(lr=lr, max_grad_norm=None),
        run=RunConfig(output="runs/x y", steps=steps, report_to=("tensorboard",)),
    )
    path = write(tmp_path_factory.mktemp("round"), yaml.dump(recipe.as_dict()))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).run.output == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("name", "shape", "card"),
    [
        ("tinyllama", "tinyllama-1.1b", "8GB"),
        ("mistral-7b", "mistral-7b", "32GB"),
        ("llama-2-7b", "llama-2-7b", "24GB"),
    ],
)
def test_recipes_of_the_paper_fit_the_cards_that_they_name(name: str, shape: str, card: str) -> None:
    (path,) = [path for path in RECIPES if path.stem == f"{name}-alpaca-gpt4"]
    recipe = load_recipe(path, [f"model.name={shape}", "run.device=cuda"])
    needed = plan_memory(recipe, blocks=(0, 1)).needed_bytes
    assert f"card of {card.removesuffix('GB')} GB" in path.read_text(encoding="utf-8")
    assert 0.6 * parse_memory_size(card) < needed < parse_memory_size(card)


def test_recipes_are_shipped() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            r"C:\data\rows",
            r"data.train: there is no file or folder C:\data\rows; on this machine paths begin",
        ),
        ("C:/data/rows", "data.train: there is no file or folder C:/data/rows; on this machine paths begin"),
        (
            r'"C:\new\rows.jsonl"',
            r"data.train has a control character in it, 'C:\new\rows.jsonl'; put the path",
        ),
        (r'"C:\data\rows"', "found unknown escape character 'd'; put a Windows path in single quotes"),
    ],
)
def test_a_windows_path_that_is_absent_is_no_hub_id(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_recipe(write(tmp_path, f"model: {{name: m}}\ndata:\n  train: {train}\n"))


def test_every_path_of_a_recipe_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {name: ~/m}\ndata: {train: ~/t.jsonl, validation: ~/v.jsonl}\nrun: {output: ~/x}\n"
    )
    recipe = load_recipe(file)
    paths = (recipe.model.name, recipe.data.train, recipe.data.validation, recipe.run.output)
    assert paths == tuple(str(tmp_path / name) for name in ("m", "t.jsonl", "v.jsonl", "x"))
    assert load_recipe(file, ["run.output=~/y"]).run.output == str(tmp_path / "y")
    with pytest.raises(ValueError, match=r"there is no home folder for ~no-such-user/x; write the path out"):
        load_recipe(file, ["run.output=~no-such-user/x"])
