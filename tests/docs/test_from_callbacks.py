"""The plugins of docs/from-callbacks.md, with stand-ins for the classes of Axolotl and ms-swift."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import tiny

PAGE = Path(__file__).parents[2] / "docs" / "from-callbacks.md"
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(32 * 6).reshape(32, 6) % 128]

Make = Callable[[str], tuple[Trainer, Any]]


class OptimizerCallback:
    """What ms-swift's does, and with it `SwiftTrainer`."""

    def __init__(self, args: TrainingArguments, trainer: Trainer) -> None:
        self.args, self.trainer = args, trainer

    def create_optimizer(self) -> torch.optim.Optimizer:
        return Trainer.create_optimizer(self.trainer)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer) -> Any:
        return Trainer.create_scheduler(self.trainer, num_training_steps, optimizer)


class SwiftTrainer(Trainer):
    callback: Any

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        self.optimizer = optimizer = self.callback.create_optimizer()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return self.callback.create_scheduler(num_training_steps, optimizer or self.optimizer)


def run_block(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> dict[str, Any]:
    """Run the page's code that imports from a module, which has these names."""
    stand_in = ModuleType(module)
    vars(stand_in).update(names)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module.rpartition(".")[0], ModuleType(module.rpartition(".")[0]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if module in block]
    found: dict[str, Any] = {}
    exec(code.replace("period=20", "period=5"), found)  # noqa: S102
    return found


def arguments(folder: str) -> dict[str, Any]:
    args = TrainingArguments(
        folder, max_steps=11, save_steps=7, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    torch.manual_seed(0)
    return {"model": tiny.llama(), "args": args, "train_dataset": ROWS}


@pytest.fixture(params=["axolotl", "swift"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    if request.param == "axolotl":
        plugin_class = run_block(monkeypatch, "axolotl.integrations.base", BasePlugin=object)["LisaPlugin"]

        def axolotl(folder: str) -> tuple[Trainer, Any]:
            trainer, plugin = Trainer(**arguments(folder)), plugin_class()
            plugin.post_trainer_create({}, trainer)
            return trainer, plugin

        return axolotl
    optimizers: dict[str, Any] = {}
    run_block(monkeypatch, "swift.optimizers", OptimizerCallback=OptimizerCallback, optimizers_map=optimizers)

    def swift(folder: str) -> tuple[Trainer, Any]:
        trainer = SwiftTrainer(**arguments(folder))
        trainer.callback = optimizers["lisatune"](trainer.args, trainer)
        return trainer, trainer.callback

    return swift


def test_a_plugin_of_the_page_attaches_lisa_and_resumes_bit_for_bit(make: Make, tmp_path: Path) -> None:
    whole, plugin = make(str(tmp_path))
    whole.train()
    plugin.lisa.check()
    assert plugin.lisa.periods_proven == 2
    resumed, plugin = make(str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    plugin.lisa.check()
    assert plugin.lisa.steps_done == 11
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())
