"""AdamW in float32 over any storage: equal to torch's where storage is wide, exact where it says so."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from lisatune import LISA, AdamW
from lisatune.checkpoint import load_checkpoint, save_checkpoint

ROUNDINGS = ("exact", "stochastic", "nearest")
MOMENTS = ("fp32", "bf16", "8bit", "factored")
KINDS = list(itertools.product(ROUNDINGS, MOMENTS))


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    if "8bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


def gradients(shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    """Random gradients of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(shape, generator=generator) * 10.0 ** (step % 5 - 4)).to(dtype)


def steps_on(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: range) -> None:
    for step in steps:
        parameter.grad = gradients(tuple(parameter.shape), step, parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)])
def test_wide_weights_are_updated_as_by_torch_bit_for_bit(dtype: torch.dtype, lr: float | Tensor) -> None:
    model = tiny.llama().to(dtype)
    other = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": lr, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    tiny.fit(model, AdamW(model.parameters(), **options), 5)
    tiny.fit(other, torch.optim.AdamW(other.parameters(), fused=True, **options), 5)
    tiny.assert_same_weights(model, other)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_exact_bf16_weights_are_a_float32_master_rounded(size: int) -> None:
    start = torch.randn(size).to(torch.bfloat16)
    weight, master = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer = AdamW([weight], lr=1e-5, weight_decay=0.1, chunk_size=256)
    reference = torch.optim.AdamW([master], lr=1e-5, weight_decay=0.1, fused=True)
    for step in range(50):
        weight.grad = gradients((size,), step, torch.bfloat16)
        master.grad = weight.grad.float()
        optimizer.step()
        reference.step()
        joined = weight.detach().float()
        joined.view(torch.int32).add_(optimizer.state[weight]["remainder"])
        assert torch.equal(joined, master.detach())
        # Nearest; a tie may go the other way than `to` lets it.
        half_spacing = (joined - weight.detach().float()).abs()
        assert (half_spacing <= (joined - joined.to(torch.bfloat16).float()).abs()).all()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[weight][name], reference.state[master][name])


@pytest.mark.parametrize(("rounding", "moments"), KINDS)
@pytest.mark.parametrize("size", [1, 256, 257, 5000])
def test_chunks_do_not_change_the_update(rounding: Any, moments: Any, size: int) -> None:
    if rounding == "stochastic" or moments == "bf16":
        pytest.skip("each chunk has random numbers of its own")
    results = []
    for chunk_size in (256, 1 << 17):
        weight = nn.Parameter(torch.linspace(-1, 1, size).to(torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, rounding=rounding, moments=moments, chunk_size=chunk_size)
        steps_on(optimizer, weight, range(4))
        results.append(weight.detach())
    assert torch.equal(*results)


def test_500_small_steps_follow_float32_where_nearest_stands_still() -> None:
    models = {name: tiny.llama() for name in ("fp32", *ROUNDINGS)}
    start = tiny.weights(models["fp32"])
    for name, model in models.items():
        rounded = {key: value.to(torch.bfloat16) for key, value in start.items()}
        model.load_state_dict({key: value.float() for key, value in rounded.items()}, strict=False)
        if name != "fp32":
            model.to(torch.bfloat16)
    start = tiny.weights(models["fp32"])
    distance, still, meant = {}, {}, {}
    for name, model in models.items():
        rounding: Any = "exact" if name == "fp32" else name
        optimizer = AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, rounding=rounding)
        for step in range(500):
            # Everybody's gradients are those of the float32 run, so that rounding alone tells them apart.
            for (key, p), g in zip(model.named_parameters(), recorded_gradients(step), strict=True):
                assert key
                p.grad = g.to(p.dtype)
            optimizer.step()
        means = [
            codec_value(p, optimizer.state[p].get("remainder")) - start[key]
            for key, p in model.named_parameters()
        ]
        meant[name] = torch.cat([each.reshape(-1) for each in means])
        moved = torch.cat([(p.detach().float() - start[k]).reshape(-1) for k, p in model.named_parameters()])
        still[name] = float((moved == 0).float().mean())
    for name in ROUNDINGS:
        error = (meant[name] - meant["fp32"]).norm() / meant["fp32"].norm()
        distance[name] = float(error)
    # exact: gradients rounded to bf16 (0.2 % each) are all that differs. stochastic: unbiased noise.
    assert distance["exact"] < 0.01
    assert distance["nearest"] > 0.5
    assert distance["exact"] < distance["stochastic"] < distance["nearest"]
    assert still["nearest"] > 0.5
    slope = float((meant["stochastic"] * meant["fp32"]).sum() / meant["fp32"].square().sum())
    assert abs(slope - 1) < 0.02


def recorded_gradients(step: int) -> list[Tensor]:
    """Gradients of the tiny model at its start, a new batch every step."""
    model = _recorder()
    model.zero_grad()
    tiny.backward(model, step % 20)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


_model: list[nn.Module] = []


def _recorder() -> nn.Module:
    if not _model:
        _model.append(tiny.llama())
    return _model[0]


def codec_value(p: Tensor, remainder: Tensor | None) -> Tensor:
    exact = p.detach().float()
    if remainder is not None:
        exact.view(torch.int32).add_(remainder)
    return exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_every_kind_learns_as_well_as_wide_adamw(dtype: torch.dtype, rounding: Any, moments: Any) -> None:
    def loss_after(**options: Any) -> float:
        model = tiny.llama(hidden=64).to(dtype)
        optimizer = AdamW(model.parameters(), lr=2e-3, **options)
        for _ in range(15):
            tiny.backward(model, 0)
            optimizer.step()
            optimizer.zero_grad()
        ids = tiny.tokens(0)
        return float(model(input_ids=ids, labels=ids).loss.detach())

    assert loss_after(rounding=rounding, moments=moments) < loss_after() + 0.6 < 4.0


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_state_has_the_bytes_it_claims(rounding: Any, moments: Any) -> None:
    weight = nn.Parameter(torch.ones(512, 256, dtype=torch.bfloat16))
    optimizer = AdamW([weight], rounding=rounding, moments=moments)
    steps_on(optimizer, weight, range(1))
    held = sum(value.nbytes for key, value in optimizer.state[weight].items() if key != "step")
    n = weight.numel()
    wanted = {"fp32": 8 * n, "bf16": 4 * n, "8bit": 2 * n + 2 * 4 * n // 256, "factored": 4 * (512 + 256)}
    assert held == wanted[moments] + (2 * n if rounding == "exact" else 0)


@pytest.mark.parametrize("state_device", [None, "cpu"])
@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_resume_is_bit_equal(rounding: Any, moments: Any, state_device: Any) -> None:
    options = {"lr": 1e-3, "rounding": rounding, "moments": moments, "state_device": state_device}
    weight = nn.Parameter(torch.randn(70, 70).to(torch.bfloat16))
    optimizer = AdamW([weight], **options)
    steps_on(optimizer, weight, range(3))
    file = io.BytesIO()
    torch.save([weight.data, optimizer.state_dict()], file)
    steps_on(optimizer, weight, range(3, 6))
    data, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = nn.Parameter(data)
    its_optimizer = AdamW([resumed], **options)
    its_optimizer.load_state_dict(state)
    steps_on(its_optimizer, resumed, range(3, 6))
    assert torch.equal(resumed, weight)
    for key, value in optimizer.state[weight].items():
        assert torch.equal(its_optimizer.state[resumed][key], value), key
        assert its_optimizer.state[resumed][key].dtype == value.dtype


@pytest.mark.parametrize("moments", MOMENTS)
def test_checkpoint_inside_a_period_of_lisa_is_bit_exact(tmp_path: Any, moments: Any) -> None:
    def start() -> tuple[nn.Module, AdamW]:
        model = tiny.llama(hidden=64).to(torch.bfloat16)
        optimizer = AdamW(model.parameters(), lr=1e-3, moments=moments)
        LISA(model, optimizer, active=2, period=4, state="cpu")
        return model, optimizer

    model, optimizer = start()
    tiny.fit(model, optimizer, 6)
    folder = save_checkpoint(tmp_path, step=6, model=model, optimizer=optimizer)
    tiny.fit(model, optimizer, range(6, 14))
    resumed, its_optimizer = start()
    load_checkpoint(folder, model=resumed, optimizer=its_optimizer)
    tiny.fit(resumed, its_optimizer, range(6, 14))
    tiny.assert_same_weights(resumed, model)


def test_stochastic_rounding_leaves_the_global_generator_alone() -> None:
    weight = nn.Parameter(torch.randn(100).to(torch.bfloat16))
    before = torch.get_rng_state()
    steps_on(AdamW([weight], rounding="stochastic", moments="bf16"), weight, range(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_a_step_can_be_traced_without_memory(rounding: Any, moments: Any) -> None:
    with FakeTensorMode():
        trace_a_step("cpu", rounding, moments)
    trace_a_step("meta", rounding, moments)


def trace_a_step(device: str, rounding: Any, moments: Any) -> None:
    weight = nn.Parameter(torch.empty(300, 1000, dtype=torch.bfloat16, device=device))
    bias = nn.Parameter(torch.empty(3, device=device))
    optimizer = AdamW([weight, bias], rounding=rounding, moments=moments)
    for p in (weight, bias):
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert optimizer.state[weight]["step"].shape == ()


def test_strided_weights_and_gradients_are_updated() -> None:
    results = []
    for is_strided in (True, False):
        values = torch.arange(12.0).view(3, 4).to(torch.bfloat16)
        weight = nn.Parameter(values.t() if is_strided else values.t().contiguous())
        weight.grad = torch.ones(4, 3, dtype=torch.bfloat16).cumsum(0).to(torch.bfloat16)
        AdamW([weight], lr=0.1).step()
        results.append(weight.detach().contiguous())
    assert torch.equal(*results)
    assert not torch.equal(results[0], values.t())


def test_frozen_weights_are_left_alone() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW(weights)
    steps_on(optimizer, weights[0], range(1))
    assert weights[1] not in optimizer.state
    assert torch.equal(weights[1], torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of exact, stochastic, nearest, got 'up'"),
        ({"moments": "fp8"}, "moments must be one of fp32, bf16, 8bit, factored, got 'fp8'"),
        ({"state_device": "cuda"}, "state_device must be one of None, cpu, got 'cuda'"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"chunk_size": 100}, "chunk_size must be a positive multiple of 256, got 100"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(3))], **options)


def test_half_precision_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"got torch\.float16; load the model in one of these"):
        steps_on(AdamW([weight]), weight, range(1))
