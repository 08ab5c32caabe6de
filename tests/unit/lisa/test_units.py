"""LISA over modules of blocks in place of whole blocks: `unit="module"`."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from lisatune import LISA, AdamW, ProofError, compile_blocks, find_layers, param_groups
from lisatune.nn.units import UnitMap

STEPS, PERIOD = 11, 2


def attach(model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, LISA]:
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=options.get("ends", "train")), lr=1e-2)
    chosen = {"unit": "module", "period": PERIOD, "verify": "full", "layers": layers, **options}
    return optimizer, LISA(model, optimizer, **chosen)


def names_of(lisa: LISA, model: nn.Module) -> set[str]:
    """Names of the parameters of the active units."""
    units = lisa.layers.block_parameters(model)
    return {name for unit in lisa.active_blocks for name in units[unit]}


@pytest.mark.parametrize("state", ["drop", "reset", "cpu", "keep"])
def test_drawn_units_move_and_nothing_else_does(state: str) -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, state=state, ends="frozen")
    budget = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    for period in range(5):
        before, drawn = tiny.weights(model), names_of(lisa, model)
        assert 0 < sum(before[name].numel() for name in drawn) <= budget
        tiny.fit(model, optimizer, range(period * PERIOD, (period + 1) * PERIOD))
        assert tiny.moved(before, model) == drawn
    assert lisa.periods_proven == 5
    if state != "keep":
        assert set(optimizer.state) <= set(lisa.trainable_parameters()) | ({*()} if state != "cpu" else set())


def test_each_unit_trains_once_before_one_trains_twice() -> None:
    optimizer, lisa = attach(model := tiny.llama(), active=1)
    while max(lisa.visits) < 2:
        tiny.fit(model, optimizer, 1)
    assert min(lisa.visits) >= 1


def test_all_units_together_are_full_fine_tuning_bit_for_bit() -> None:
    model, other = tiny.llama(), tiny.llama()
    optimizer, _ = attach(model, active=6)
    tiny.fit(model, optimizer, 5)
    tiny.fit(other, AdamW(param_groups(other, find_layers(other)), lr=1e-2), 5)
    tiny.assert_same_weights(model, other)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        *(({}, step) for step in (1, 2, 5)),
        ({"frozen_weights": "int8"}, 5),
        ({"correction": "lora"}, 2),
        ({"correction": "lora"}, 5),
        ({"correction": "sign"}, 5),
    ],
    ids=str,
)
def test_resume_is_bit_equal(options: dict[str, str], step: int) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, LISA]:
        model = tiny.llama(seed=seed)
        return model, *attach(model, ends="frozen", warmup=1, **options)

    straight, optimizer, lisa = make(0)
    tiny.fit(straight, optimizer, step)
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    tiny.fit(straight, optimizer, range(step, STEPS))
    resumed, again, other = make(1)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    tiny.fit(resumed, again, range(step, STEPS))
    tiny.assert_same_weights(resumed, straight)
    mine, theirs = resumed.state_dict(), straight.state_dict()  # with adapters merged
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert other.visits == lisa.visits
    assert other.active_blocks == lisa.active_blocks


def test_a_state_of_blocks_is_refused_for_units_and_the_other_way_round() -> None:
    of_units, _ = attach(tiny.llama())
    of_blocks, _ = attach(tiny.llama(), unit="block")
    with pytest.raises(ValueError, match=r"unit: saved block, now module"):
        of_units.load_state_dict(of_blocks.state_dict())
    with pytest.raises(ValueError, match=r"unit: saved module, now block"):
        of_blocks.load_state_dict(of_units.state_dict())


def test_a_state_from_before_units_existed_is_one_of_blocks() -> None:
    of_blocks, lisa = attach(tiny.llama(), unit="block")
    saved = of_blocks.state_dict()
    del saved["lisa"]["settings"]["unit"]
    of_blocks.load_state_dict(saved)
    assert lisa.steps_done == 0


def test_backward_stops_at_the_lowest_active_unit() -> None:
    model = tiny.llama()
    chances = [0.0] * 42
    chances[3 * 7 + 4] = 1.0  # gate of block 3
    _, lisa = attach(model, sampler=chances, active=1, ends="frozen")
    has_graph: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, out, name=name: has_graph.__setitem__(name, out.requires_grad)
            )
    tiny.backward(model, 0)
    assert lisa.layers.blocks[lisa.active_blocks[0]] == "model.layers.3.mlp.gate_proj"
    below = [name for name, graph in has_graph.items() if not graph]
    assert {*below} >= {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    assert "model.layers.3.self_attn.o_proj" in below
    assert "model.layers.3.mlp.up_proj" in below
    assert has_graph["model.layers.3.mlp.gate_proj"]


def test_units_are_named_in_the_log_the_summary_and_the_proof() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model)
    assert isinstance(lisa.layers, UnitMap)
    line, of_block = lisa.describe(), lisa.layers.of_block
    assert line["active_units"] == lisa.active_blocks
    assert line["active_blocks"] == tuple(sorted({of_block[unit] for unit in lisa.active_blocks}))
    summary = lisa.summarize()
    assert summary["units"] == list(lisa.layers.blocks)
    assert len(summary["visits"]) == 42
    tiny.fit(model, optimizer, 1)
    frozen = next(i for i in range(42) if i not in lisa.active_blocks)
    name = lisa.layers.blocks[frozen]
    with torch.no_grad():
        model.get_submodule(name).weight.add_(1)
    with pytest.raises(ProofError, match=f"frozen weights moved in {name};"):
        tiny.fit(model, optimizer, 1)


def test_the_learning_rate_of_a_unit_follows_from_its_chance() -> None:
    _, lisa = attach(tiny.llama(), active=1)
    (chance,) = set(lisa.sampler.inclusion())
    assert {lisa.lr_factor(i) for i in range(42)} == {chance**-0.5}


def test_the_plan_gets_the_largest_draws_that_keep_the_budget() -> None:
    _, lisa = attach(tiny.llama())
    sizes = [sum(p.numel() for p in unit) for unit in lisa._blocks]
    budget = sum(sizes) * 2 // 6
    assert all(sum(sizes[i] for i in draw) <= budget for draw in lisa.possible_draws(300))


def test_compiled_blocks_are_refused() -> None:
    model = tiny.llama()
    with compile_blocks(model, backend="eager"), pytest.raises(ValueError, match="each draw would compile"):
        attach(model)


def test_a_unit_that_never_fits_is_refused() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, size), nn.Linear(size, 2)) for size in (2, 2, 99)))
    layers = find_layers(model, blocks="")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="smaller than the largest unit"):
        LISA(model, optimizer, unit="module", active=1, layers=layers)


class Uneven(nn.Module):
    """Blocks of 20 to 420 parameters between two ends, as in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        widths = (2, 8, 40, 40, 8, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4)) for width in widths
        )
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def train_uneven(steps: range, state: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, unit="sized", active=3, period=2, layers=find_layers(model), **options)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    draws = []
    for step in steps:
        draws.append(lisa.active_blocks)
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer, lisa, draws


@pytest.mark.parametrize("sampler", ["permutation", "uniform"])
def test_blocks_of_different_size_are_drawn_under_a_budget_of_parameters(sampler: str) -> None:
    _, _, lisa, draws = train_uneven(range(40), sampler=sampler)
    lisa.check()
    sizes = [sum(p.numel() for p in block) for block in lisa._blocks]
    budget = sum(sizes) * 3 // 6
    assert max(sizes) > 10 * min(sizes)
    assert all(sum(sizes[i] for i in draw) <= budget for draw in draws)
    assert len({len(draw) for draw in draws}) > 1
    assert min(lisa.visits) > 0
    assert lisa.summarize().keys() >= {"visits", "proof"}
    assert lisa._name(2) == "block 2"


def test_sized_blocks_resume_exactly() -> None:
    straight, _, _, draws = train_uneven(range(9))
    model, optimizer, _, _ = train_uneven(range(5))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    resumed, _, _, rest = train_uneven(range(5, 9), state)
    assert rest == draws[5:]
    tiny.assert_same_weights(resumed, straight)


def test_a_block_larger_than_the_budget_is_refused() -> None:
    model = Uneven()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"smaller than the largest unit.*use active >= 3"):
        LISA(model, optimizer, unit="sized", active=2, layers=find_layers(model))
