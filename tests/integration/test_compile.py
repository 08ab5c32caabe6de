"""`run.compile` of methods without draws: everything is compiled before the first step."""

from pathlib import Path

import pytest

import tiny_run
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.train.assemble import assemble
from lisatune.train.recipe_file import load_recipe


class Plain(BlockForward):
    """Graphs that need no compiler of C++."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options | {"backend": "aot_eager"})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_step_compiles_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisatune.methods.build.BlockForward", Plain)
    monkeypatch.setattr("lisatune.train.assemble.check_compiler", lambda: None)
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
