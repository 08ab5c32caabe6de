"""`run.compile` from end to end; what the compiler of C++ makes of a block is in unit/nn/test_blocks.py."""

from pathlib import Path

import pytest

import tiny_run
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.train.assemble import assemble
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe


class Plain(BlockForward):
    """Graphs that need no compiler of C++."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options | {"backend": "eager"})


pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisatune.methods.build.BlockForward", Plain)
    monkeypatch.setattr("lisatune.train.assemble.check_compiler", lambda: None)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_step_of_a_method_without_draws_compiles_nothing(method: str, tmp_path: Path) -> None:
    model, rows = tiny_run.write_model(tmp_path / "model"), tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, model, rows, f"method: {{name: {method}}}\n")
    before = num_graphs()
    parts = assemble(load_recipe(recipe, ["run.compile=true"]))
    built = num_graphs()
    assert built > before
    assert parts.compile_seconds is not None
    assert all(p.grad is None for p in parts.built.model.parameters())
    batch = parts.collate(parts.data.train.rows[:2])
    parts.built.step.backward([batch])
    parts.built.step.update()
    assert num_graphs() == built


def test_compiled_blocks_train_the_same_weights_and_say_how_long_compiling_took(tmp_path: Path) -> None:
    model, rows = tiny_run.write_model(tmp_path / "model"), tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, model, rows)
    plain, compiled = (
        train(load_recipe(recipe, [f"run.output={tmp_path / name}", *more]))
        for name, more in (
            ("plain", []),
            ("compiled", ["run.compile=true", "run.activation_checkpointing=frozen"]),
        )
    )
    assert compiled["compile_seconds"] > 0
    assert "compile_seconds" not in plain
    assert compiled["held_out_loss_before"] == plain["held_out_loss_before"]
    assert compiled["held_out_loss_after"] == pytest.approx(plain["held_out_loss_after"], rel=1e-4)
