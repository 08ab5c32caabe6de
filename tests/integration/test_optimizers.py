"""`optimizer.name`: what LISA trains with each, resumes bit for bit, plans, and refuses."""

import shutil
from pathlib import Path

import pytest
import torch

import tiny
import tiny_run
from lisatune import LISA
from lisatune.memory import measure
from lisatune.memory.plan import make_batch, plan_memory
from lisatune.methods import OPTIMIZERS
from lisatune.methods.optimizers import build_from_groups, check_thaw
from lisatune.models.load import load_model
from lisatune.recipe import OptimizerConfig
from lisatune.train.assemble import assemble
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe

LISA_OPTIONS = ("method.name=lisa", "method.active=1", "method.period=2", "optimizer.schedule=constant")
RATES = {"sgd": 1.0, "lars": 1.0, "adafactor": 0.1, "lamb": 0.1, "lion": 1e-3, "sophia": 1e-3}
"""Learning rates at which six steps of a tiny model learn; 1e-2 for all others."""

CASES = {name: () for name in OPTIMIZERS if name != "adamw"} | {
    "lion, 8-bit": ("optimizer.moments=8bit",),
    "lamb, 8-bit": ("optimizer.moments=8bit",),
    "sgd, momentum": ("optimizer.options={momentum: 0.9, nesterov: true}", "optimizer.lr=0.3"),
    "torch.optim.NAdam": ("optimizer.options={betas: [0.9, 0.99]}",),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizers")
    model, rows = tiny_run.write_model(folder / "model"), tiny_run.write_rows(folder / "rows.jsonl")
    tiny_run.write_recipe(folder, model, rows)
    return folder


def overrides(case: str, *more: str) -> list[str]:
    name = case.partition(",")[0]
    rate = f"optimizer.lr={RATES.get(name, 1e-2)}"
    return [*LISA_OPTIONS, f"optimizer.name={name}", rate, *CASES[case], *more]


@pytest.mark.parametrize("case", CASES)
def test_lisa_learns_proves_its_periods_and_resumes_bit_for_bit(
    case: str, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    recipe = load_recipe(
        folder / "recipe.yaml", overrides(case, f"run.output={output}", "run.steps=6", "run.save_every=3")
    )
    summary = train(recipe)
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert summary["proof"].startswith("3 periods: drawn blocks moved")
    whole = load_model(str(output / "model"))
    shutil.rmtree(output / "model")
    (output / "summary.json").unlink()
    last = max((output / "checkpoints").iterdir())
    assert last.name.endswith("6"), last
    shutil.rmtree(last)
    torch.manual_seed(12345)  # what ran before must not matter
    train(recipe, resume=True)
    tiny.assert_same_weights(load_model(str(output / "model")), whole)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_takes(case: str, folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", overrides(case, "run.steps=6"))
    plan = plan_memory(recipe, length=32)
    assert plan.kind == "traced"
    built = assemble(recipe).built
    assert plan.active_blocks is not None
    built.schedule.hold(plan.active_blocks)
    with measure(built.model, built.step.optimizer) as tracker:
        for _ in range(2):
            built.step.backward([make_batch(recipe, built.model, 32)])
            built.step.clip()
            built.step.update()
            memory = tracker.end_step()
    assert memory.at_peak["optimizer state"] == pytest.approx(plan.at_peak["optimizer state"], rel=0.03)
    assert memory.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.03)


@pytest.mark.parametrize("case", CASES)
def test_a_block_that_thaws_late_makes_the_first_step_of_a_new_optimizer(case: str) -> None:
    """A wrong first step shows nowhere else: weights move, the proof passes, resume is exact."""
    model = tiny.llama()
    name = case.partition(",")[0]
    options = {"betas": (0.9, 0.99)} if name == "torch.optim.NAdam" else {}
    moments = "8bit" if "8-bit" in case else "fp32"
    config = OptimizerConfig(name=name, lr=1e-3, options=options, moments=moments)  # type: ignore[arg-type]
    optimizer = build_from_groups([{"params": [*model.named_parameters()]}], config)
    with LISA(model, optimizer, active=1, period=2, verify="off", lr_scaling="none") as lisa:
        tiny.fit(model, optimizer, 6)
        (block,) = lisa.active_blocks
        tiny.backward(model, 6)
        before = {p: p.detach().clone() for p in model.model.layers[block].parameters()}
        optimizer.step()
        twins = [torch.nn.Parameter(weight.clone()) for weight in before.values()]
        for twin, p in zip(twins, before, strict=True):
            twin.grad = p.grad
        build_from_groups([{"params": [*zip("abcdefghijkl", twins, strict=False)]}], config).step()
        for twin, p in zip(twins, before, strict=True):
            assert torch.allclose(p, twin, atol=1e-7)


class CountsPerGroup(torch.optim.Optimizer):
    """Adam's second moment with the step counted per param group, as many packages do."""

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, {"lr": lr, "step": 0})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                    moment.lerp_(p.grad.square(), 0.001)
                    correction = 1 - 0.999 ** group["step"]
                    p.addcdiv_(p.grad, (moment / correction).sqrt() + 1e-8, value=-group["lr"])


def test_a_class_that_counts_steps_per_group_is_refused_before_weights_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "CountsPerGroup", CountsPerGroup, raising=False)
    config = OptimizerConfig(name="torch.optim.CountsPerGroup")
    with pytest.raises(ValueError, match=r"CountsPerGroup keeps 'step' per param group.* thaws late is 25.1"):
        check_thaw(config, "drop")
    with pytest.warns(UserWarning, match="CountsPerGroup keeps 'step' per param group"):
        check_thaw(config, "keep")
    recipe = load_recipe(folder / "recipe.yaml", ["optimizer.name=torch.optim.CountsPerGroup"])
    monkeypatch.setattr("lisatune.models.load.load_model", None)
    with pytest.raises(ValueError, match="per param group"):
        assemble(recipe)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["optimizer.name=sgdd"], r"unknown optimizer 'sgdd'. Did you mean 'sgd'\?.* class such as"),
        (["optimizer.name=nowhere.Lion"], "needs the module nowhere, which cannot be imported"),
        (["optimizer.name=torch.optim.Nope"], "torch.optim has no torch.optim.Optimizer of the name Nope"),
        (["optimizer.name=torch.optim.Nadam"], r"of the name Nadam; did you mean NAdam\?"),
        (["optimizer.name=torch.nn.Linear"], "torch.nn has no torch.optim.Optimizer of the name Linear"),
        (["optimizer.name=torch.optim.LBFGS"], "cannot make a step from gradients.*closure"),
        (["optimizer.name=torch.optim.Muon"], "cannot be built: Muon only supports 2D"),
        (["optimizer.name=sgd", "optimizer.options=3"], "optimizer.options must be keys and values.*got '3'"),
        (["optimizer.name=sgd", "optimizer.options={momentum 3"], r"keys are written \{key: value\}"),
        (["optimizer.name=sgd", "optimizer.options={lr: 3}"], "optimizer.options may not have lr"),
        (["optimizer.name=muon", "optimizer.options={betas: [0.9, 0.99]}"], "options may not have betas"),
        (["optimizer.name=lamb", "optimizer.options={eps: 1e-4}"], "options may not have eps"),
        (["optimizer.options={momentum: 0.9}"], "does nothing with optimizer.name adamw"),
        (
            ["optimizer.name=lion", "optimizer.options={speed: 2}"],
            "cannot be built with optimizer.options .'speed': 2.: .*'speed'",
        ),
        (["optimizer.name=lion", "optimizer.betas=[0.9, 0.98]"], "lion does not read optimizer.betas"),
        (["optimizer.name=sophia", "optimizer.options={rho: -1}"], "rho of SophiaG is out of range, got -1"),
        (["optimizer.name=muon", "optimizer.moments=8bit"], "muon does not read optimizer.moments"),
        (
            ["optimizer.name=lion", "optimizer.moments=bf16"],
            "moments bf16 belongs to adamw; use fp32 or 8bit",
        ),
        (["optimizer.name=sgd", "optimizer.rounding=stochastic"], "rounding stochastic belongs to adamw"),
        (["optimizer.name=sgd", "optimizer.state_device=cpu"], "state_device 'cpu' belongs to adamw"),
        (["optimizer.name=sgd", "run.precision=bf16"], "would round its updates of bfloat16 weights"),
        (["optimizer.name=lion", "method.ends=8bit"], "method.ends 8bit belongs to adamw"),
        (
            ["optimizer.name=muon", "method.ends=frozen", "model.new_tokens=[<new>]"],
            "model.new_tokens with frozen ends.* train with adamw alone, and optimizer.name is muon",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(folder: Path, asked: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, ImportError), match=sentence):
        assemble(load_recipe(folder / "recipe.yaml", asked))
