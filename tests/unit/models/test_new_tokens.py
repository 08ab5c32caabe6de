import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny_run
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.memory.tracker import measure
from lisatune.models.load import load_model, load_tokenizer, meta_model
from lisatune.models.sharded import load_for_ranks
from lisatune.train.assemble import assemble
from lisatune.train.check import check
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe

NEW = ("<call>", "<result>")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = tiny_run.write_model(tmp_path / "tiny")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"Add {n}.", "answer": f"<call>{n}<result>"}) + "\n" for n in range(12)
        )
    )
    return tiny_run.write_recipe(tmp_path, model, rows)


def overrides(*more: str) -> list[str]:
    return [f"model.new_tokens={json.dumps(list(NEW))}", *more]


def test_new_rows_are_the_mean_of_the_others_and_shapes_agree(recipe: Path) -> None:
    folder = str(recipe.parent / "tiny")
    before, model = load_model(folder), load_model(folder, new_tokens=NEW)
    tokenizer = load_tokenizer(folder, new_tokens=NEW)
    old = before.get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    for row in tokenizer.convert_tokens_to_ids(list(NEW)):
        torch.testing.assert_close(new[row], old.mean(dim=0))
    assert model.get_output_embeddings().weight is new
    assert tokenizer.decode(tokenizer("a<call>b")["input_ids"]) == "a<call>b"
    shapes = meta_model(folder, new_tokens=NEW)
    assert {name: p.shape for name, p in shapes.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_read_the_rows_that_are_stored_and_make_the_new_ones(recipe: Path, tied: bool) -> None:
    folder = recipe.parent / "tiny"
    if not tied:
        untie(folder)
    model, fill = load_for_ranks(str(folder), new_tokens=NEW)
    assert fill is not None, "it would load all weights on every rank"
    model.to_empty(device="cpu").tie_weights()
    fill()
    wanted = load_model(str(folder), new_tokens=NEW).state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:the run began with 4 steps")
def test_new_tokens_are_trained_saved_and_resumed(recipe: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe, overrides("run.save_every=3")))
    written = load_model(str(tmp_path / "run/model"))
    tokenizer = load_tokenizer(str(tmp_path / "run/model"))
    rows = tokenizer.convert_tokens_to_ids(list(NEW))
    assert tokenizer.convert_ids_to_tokens(rows) == list(NEW)
    started = load_model(str(tmp_path / "tiny"), new_tokens=NEW)
    moved = written.get_input_embeddings().weight[rows] - started.get_input_embeddings().weight[rows]
    assert (moved != 0).any(dim=1).all()
    with pytest.raises(ValueError, match=r"model\.new_tokens"):
        train(load_recipe(recipe, ["run.steps=6", "run.save_every=3"]), resume=True)
    train(load_recipe(recipe, overrides("run.steps=6", "run.save_every=3")), resume=True)
    assert load_model(str(tmp_path / "run/model")).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:2 of 4 blocks will never train")
def test_where_ends_are_frozen_only_the_new_rows_train_and_resume_is_bit_equal(
    recipe: Path, tmp_path: Path, tied: bool
) -> None:
    if not tied:
        untie(tmp_path / "tiny")
    frozen = overrides("method.ends=frozen", "method.active=1", "method.period=2", "run.save_every=3")
    train(load_recipe(recipe, frozen))
    written = load_model(str(tmp_path / "run/model"))
    started = load_model(str(tmp_path / "tiny"), new_tokens=NEW)
    tokenizer = load_tokenizer(str(tmp_path / "run/model"))
    rows = sorted(tokenizer.convert_tokens_to_ids(list(NEW)))
    for name, p in written.named_parameters():
        before = started.get_parameter(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert (p != before).any(dim=1).nonzero().flatten().tolist() == rows, name
        elif "layers" not in name:
            assert torch.equal(p, before), name
    whole = json.loads((tmp_path / "run/summary.json").read_text())
    assert whole["proof"].startswith("2 periods: drawn blocks moved"), whole["proof"]
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    train(load_recipe(recipe, frozen), resume=True)
    resumed = load_model(str(tmp_path / "run/model"))
    for name, p in resumed.named_parameters():
        assert torch.equal(p, written.get_parameter(name)), name


def untie(folder: Path) -> None:
    """Give the model a head of its own."""
    model = load_model(str(folder))
    model.config.tie_word_embeddings = False
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    other.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:2 of 4 blocks will never train")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_plan_counts_the_new_rows_alone_where_ends_are_frozen(recipe: Path, accumulation: int) -> None:
    settings = [f"method.{each}" for each in ("ends=frozen", "active=1", "verify=off")]
    settings.append(f"run.accumulation={accumulation}")
    asked = load_recipe(recipe, overrides(*settings))
    plan = plan_memory(asked, length=32)
    assert plan.kind == "traced"
    assert plan.trainable == plan_memory(load_recipe(recipe, settings), length=32).trainable + len(NEW) * 16
    outline = check(asked).outline
    assert outline is not None
    assert outline.trainable == plan.trainable
    built = assemble(asked).built
    assert plan.active_blocks is not None
    built.schedule.hold(plan.active_blocks)
    with measure(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            built.step.backward([make_batch(asked, built.model, 32)] * accumulation)
            built.step.clip()
            built.step.update()
            memory = tracker.end_step()
    assert memory.at_peak["optimizer state"] == pytest.approx(plan.at_peak["optimizer state"], rel=0.03)
    assert memory.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.03)


def test_the_plan_counts_the_new_rows(recipe: Path) -> None:
    many = [f"model.new_tokens={json.dumps([f'<{n}>' for n in range(200)])}"]
    more = plan_memory(load_recipe(recipe, many)).trainable - plan_memory(load_recipe(recipe)).trainable
    assert more == 200 * 16


@pytest.mark.filterwarnings("ignore:.*left out. keys of method lisa")
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ('model.new_tokens=["a"]', "the tokenizer has 'a' already, as number"),
        ('model.new_tokens=["<x>","<x>"]', "names '<x>' twice; leave one out"),
        ('model.new_tokens=[" "]', "a token must be text, got ' '"),
        ("method.name=lora", "which method lora does not train as it is set"),
        ("method.frozen_weights=int8", "cannot work with method.frozen_weights yet"),
    ],
)
def test_what_cannot_work_is_refused(recipe: Path, override: str, problem: str) -> None:
    given = [override] if override.startswith("model") else overrides(override)
    try:
        problems = check(load_recipe(recipe, given)).problems
    except ValueError as error:
        problems = [str(error)]
    assert any(problem in each for each in problems), problems
