"""GaLore's updates against the paper's algorithm and the authors' package."""

import copy
import importlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisatune.methods import GaLore
from lisatune.optim.galore import GaLoreAdamW, basis_of
from lisatune.recipe import OptimizerConfig

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12)}
RANK, GAP, STEPS = 4, 3, 8


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def optimizer_of(p: nn.Parameter, **options: Any) -> GaLoreAdamW:
    group = {"params": [p], "rank": RANK, "gap": GAP, "scale": 0.5}
    return GaLoreAdamW([group], **{"lr": 1e-2, "weight_decay": 0.0, **options})


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range = range(STEPS)) -> list[Tensor]:
    weights = []
    for step in steps:
        p.grad = gradient(p.shape, step).to(p.dtype)
        optimizer.step()
        weights.append(p.detach().clone())
    return weights


def reference(weight: Tensor, *, decay: float) -> list[Tensor]:
    """Algorithm 1 written down plainly, in float64."""
    w, weights = weight.double().clone(), []
    m = v = torch.zeros(())
    for step in range(STEPS):
        g = gradient(tuple(w.shape), step).double()
        if step % GAP == 0:
            # In float32, as GaLore's: moments go through a change of basis, so the vectors' signs matter.
            u, _, vh = (part.double() for part in torch.linalg.svd(g.float(), full_matrices=False))
        tall = w.shape[0] >= w.shape[1]
        r = g @ vh[:RANK].T if tall else u[:, :RANK].T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        w = w * (1 - 1e-2 * decay) - 1e-2 * 0.5 * (n @ vh[:RANK] if tall else u[:, :RANK] @ n)
        weights.append(w)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_strided_weights_are_projected_as_contiguous_ones(shape: tuple[int, int], dtype: torch.dtype) -> None:
    start = torch.stack([gradient(shape, 100)] * 2, dim=-1).to(dtype)[..., 0]
    strided, twin = nn.Parameter(start), nn.Parameter(start.contiguous())
    assert not strided.is_contiguous()
    for one, other in zip(*(train(optimizer_of(p), p) for p in (strided, twin)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_step_is_algorithm_1(shape: tuple[int, int], decay: float) -> None:
    p = nn.Parameter(torch.ones(shape))
    weights = train(optimizer_of(p, weight_decay=decay), p)
    for ours, theirs in zip(weights, reference(torch.ones(shape), decay=decay), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_step_is_that_of_the_authors_package(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its __init__ imports bitsandbytes for the 8-bit form, which is not compared here.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "galore_torch", _package_without_init("galore_torch"))
    theirs_module = importlib.import_module("galore_torch.adamw")
    monkeypatch.delitem(sys.modules, "galore_torch.adamw")
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    options = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "proj_type": "std"}
    theirs = theirs_module.AdamW([{"params": [q], **options}], lr=1e-2, eps=1e-8, no_deprecation_warning=True)
    for mine, other in zip(train(optimizer_of(p), p), train(theirs, q), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def _package_without_init(name: str) -> types.ModuleType:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())
    return module


def test_moments_have_the_rank_and_the_basis_the_smaller_side() -> None:
    for shape, moment in (((24, 10), (24, RANK)), ((10, 24), (RANK, 24))):
        p = nn.Parameter(torch.ones(shape))
        optimizer = optimizer_of(p)
        train(optimizer, p, range(1))
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items()}
        assert shapes == {"step": (), "exp_avg": moment, "exp_avg_sq": moment, "basis": (10, RANK)}


def test_the_basis_changes_every_gap_steps_only() -> None:
    p = nn.Parameter(torch.ones(24, 10))
    optimizer, bases = optimizer_of(p), []
    for step in range(7):
        train(optimizer, p, range(step, step + 1))
        bases.append(optimizer.state[p]["basis"].clone())
    changes = [step for step in range(1, 7) if not torch.equal(bases[step], bases[step - 1])]
    assert changes == [3, 6]


@pytest.mark.parametrize("rounding", ["exact", "stochastic"])
def test_bf16_weights_move_as_float32_ones_do(rounding: str) -> None:
    p, q = nn.Parameter(torch.ones(24, 10, dtype=torch.bfloat16)), nn.Parameter(torch.ones(24, 10))
    optimizer = optimizer_of(p, rounding=rounding, lr=1e-3)
    for step in range(STEPS):
        p.grad = gradient((24, 10), step).bfloat16()
        optimizer.step()
    wide = optimizer_of(q, lr=1e-3)
    for step in range(STEPS):
        q.grad = gradient((24, 10), step).bfloat16().float()
        wide.step()
    moved = (q.detach() - 1).abs().mean()
    assert moved > 5e-4  # below the spacing of bf16 at 1: nearest rounding would lose it
    if rounding == "exact":
        assert torch.equal(p.detach(), q.detach().bfloat16())
    else:
        assert abs(float((p.detach().float() - q.detach()).mean())) < 5e-4


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit", "factored"])
@pytest.mark.parametrize("state_device", [None, "cpu"])
def test_a_saved_state_goes_on_bit_for_bit(moments: str, state_device: str | None) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"moments": moments, "state_device": state_device}
    p = nn.Parameter(torch.ones(24, 10, dtype=torch.bfloat16))
    optimizer = optimizer_of(p, **options)
    train(optimizer, p, range(4))
    q = nn.Parameter(p.detach().clone())
    other = optimizer_of(q, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[q]["basis"].dtype == torch.float32
    ours, theirs = (train(o, w, range(4, 8)) for o, w in ((optimizer, p), (other, q)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[-1], ours[0])


def test_a_gradient_that_is_not_finite_reaches_the_weights_as_nan() -> None:
    assert basis_of(torch.full((4, 3), torch.inf), 2).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "method.rank must be >= 1, got 0"),
        ({"gap": 0}, "method.gap must be >= 1, got 0"),
        ({"scale": -1.0}, "method.scale must be a positive number, got -1.0"),
        ({"scale": float("nan")}, "method.scale must be a positive number, got nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLore(**options)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 4), {"rank": 0, "gap": 1}, "rank of a group whose gradients are projected must be >= 1, got 0"),
        ((8, 4), {"rank": 2, "gap": 0}, "gap of a group whose gradients are projected must be >= 1, got 0"),
        (
            (8, 4),
            {"rank": 4, "gap": 1},
            r"rank 4 of matrices with both sides larger, got a parameter of \[8, 4\]",
        ),
        ((8,), {"rank": 2, "gap": 1}, r"both sides larger, got a parameter of \[8\]"),
    ],
)
def test_a_group_that_cannot_be_projected_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(shape))], "scale": 1.0} | options])


def test_only_large_enough_matrices_of_blocks_are_projected() -> None:
    import tiny
    from lisatune import find_layers

    model = tiny.llama()  # hidden 32, key and value 16
    optimizer = GaLore(rank=16).build_optimizer(model, find_layers(model), OptimizerConfig())
    projected = {name for g in optimizer.param_groups if "rank" in g for name in g["param_names"]}
    kinds = {name.split(".")[-2] for name in projected}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(projected) == 6 * len(kinds)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})
