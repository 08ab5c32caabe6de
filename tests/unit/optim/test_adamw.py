"""AdamW in float32 over any storage: equal to torch's where storage is wide, exact where it says so."""

import copy
import functools
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from lisatune import LISA, AdamW
from lisatune.runs.checkpoint import load_checkpoint, save_checkpoint

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


@pytest.mark.parametrize(
    ("rounding", "moments"),
    # Where chance rounds, each chunk has random numbers of its own.
    [(rounding, moments) for rounding, moments in KINDS if rounding != "stochastic" and moments != "bf16"],
)
@pytest.mark.parametrize("size", [1, 256, 257, 5000])
def test_chunks_do_not_change_the_update(rounding: Any, moments: Any, size: int) -> None:
    results = []
    for chunk_size in (256, 1 << 17):
        weight = nn.Parameter(torch.linspace(-1, 1, size).to(torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, rounding=rounding, moments=moments, chunk_size=chunk_size)
        steps_on(optimizer, weight, range(4))
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2), (6,)])
def test_factored_moments_follow_adafactor_written_out(shape: tuple[int, ...]) -> None:
    lr, beta2, eps, decay = 1e-2, 0.99, 1e-8, 0.1
    weight = nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
    optimizer = AdamW([weight], lr, (0.9, beta2), eps, decay, moments="factored", chunk_size=256)
    want = weight.detach().double().view(shape[0], -1)
    rows, columns = torch.zeros(want.shape[0]).double(), torch.zeros(want.shape[1]).double()
    whole = torch.zeros_like(want)
    for step in range(6):
        steps_on(optimizer, weight, range(step, step + 1))
        g = gradients(shape, step, torch.float32).double().view(want.shape)
        rows = beta2 * rows + (1 - beta2) * g.square().mean(1)
        columns = beta2 * columns + (1 - beta2) * g.square().mean(0)
        whole = beta2 * whole + (1 - beta2) * g.square()
        v = whole if len(shape) == 1 else torch.outer(rows, columns) / rows.mean()
        u = g / ((v / (1 - beta2 ** (step + 1))).sqrt() + eps)
        want = want * (1 - lr * decay) - lr * u / u.square().mean().sqrt().clamp(min=1)
    torch.testing.assert_close(weight.detach().view(want.shape).double(), want, rtol=1e-5, atol=1e-6)


def test_500_small_steps_follow_float32_where_nearest_stands_still() -> None:
    start = tiny.llama(blocks=1).to(torch.bfloat16)
    wide, wide_loss = train_500(copy.deepcopy(start).float(), "exact")
    results = {rounding: train_500(copy.deepcopy(start), rounding) for rounding in ROUNDINGS}
    # How far the weights are from the float32 run's, over how far these have come.
    error = {name: float((way - wide).norm() / wide.norm()) for name, (way, _) in results.items()}
    # How far they have come in its direction: 1 is right on average.
    slope = {name: float(way @ wide / (wide @ wide)) for name, (way, _) in results.items()}
    # Forward and backward in bf16 make other gradients, by 1 %; Adam's mean over steps evens that out.
    assert error["exact"] < 0.02
    assert abs(results["exact"][1] - wide_loss) < 0.002
    # One rounding of up to a spacing at each step: noise as large as 500 of them, and no bias.
    assert error["exact"] < error["stochastic"] < error["nearest"]
    assert abs(slope["stochastic"] - 1) < 0.02
    # lr is below half a spacing of all weights but those next to zero.
    assert slope["nearest"] < 0.2
    assert float((results["nearest"][0] == 0).float().mean()) > 0.75


def train_500(model: nn.Module, rounding: Any) -> tuple[Tensor, float]:
    """Return the way that all weights went, and the mean loss at its end."""
    before = tiny.weights(model)
    optimizer = AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, rounding=rounding)
    for step in range(500):
        tiny.backward(model, step % 20)
        optimizer.step()
        optimizer.zero_grad()
    ways = [float32_of(optimizer, p) - before[name].float() for name, p in model.named_parameters()]
    with torch.no_grad():
        batches = [tiny.tokens(step) for step in range(20)]
        model.float()
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
    return torch.cat([way.reshape(-1) for way in ways]), sum(losses) / len(losses)


def float32_of(optimizer: AdamW, p: Tensor) -> Tensor:
    """What a weight is together with its remainder."""
    exact = p.detach().float().clone()
    if "remainder" in optimizer.state[p]:
        exact.view(torch.int32).add_(optimizer.state[p]["remainder"])
    return exact


@pytest.mark.parametrize("state", ["drop", "reset", "second_moment", "cpu", "keep"])
def test_a_block_that_freezes_and_thaws_keeps_its_remainder(state: Any) -> None:
    model = tiny.llama().to(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-5)
    last: dict[str, Tensor] = {}
    seen: set[str] = set()

    def look(step: int) -> None:
        names = {p: name for name, p in model.named_parameters()}
        for p in lisa.trainable_parameters():
            if step % 2 == 0 and names[p] in last:
                seen.add(names[p])
                assert torch.equal(optimizer.state[p]["remainder"], last[names[p]])

    def remember(*_: Any) -> None:
        last.update(
            (name, optimizer.state[p]["remainder"].clone())
            for name, p in model.named_parameters()
            if p.requires_grad
        )

    optimizer.register_step_post_hook(remember)  # before LISA's, which freezes
    lisa = LISA(model, optimizer, active=2, period=2, state=state)
    tiny.fit(model, optimizer, 12, after=look)
    assert {name for name in last if "layers" in name} <= seen
    assert all(remainder.any() for remainder in last.values())


@functools.cache
def loss_after_15_steps(dtype: torch.dtype, rounding: Any = "exact", moments: Any = "fp32") -> float:
    model = tiny.llama(hidden=64, blocks=3).to(dtype)
    optimizer = AdamW(model.parameters(), lr=2e-3, rounding=rounding, moments=moments)
    for _ in range(15):
        tiny.backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    ids = tiny.tokens(0)
    return float(model(input_ids=ids, labels=ids).loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_every_kind_learns_as_well_as_wide_adamw(dtype: torch.dtype, rounding: Any, moments: Any) -> None:
    start = 4.86
    gain = start - loss_after_15_steps(dtype)
    assert gain > 0.5
    assert start - loss_after_15_steps(dtype, rounding, moments) > 0.8 * gain


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


STRIDED: dict[str, Any] = {
    "every second number": lambda values: torch.stack([values, values], dim=-1)[..., 0],
    "transposed": lambda values: values.t().contiguous().t(),
    "rows with gaps": lambda values: torch.cat([values, values], dim=1)[:, : values.shape[1]],
    "one dimension": lambda values: torch.stack([values.flatten()] * 2, dim=-1)[:, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounding", "moments"), KINDS)
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_weights_and_gradients_are_updated_as_contiguous_ones(
    layout: str, rounding: Any, moments: Any, dtype: torch.dtype
) -> None:
    stride = STRIDED[layout]
    values = torch.linspace(-1, 1, 70 * 60).view(70, 60).to(dtype)
    base = stride(values)
    weight, twin = nn.Parameter(base), nn.Parameter(base.contiguous())
    assert not weight.is_contiguous()
    assert twin.is_contiguous()
    ways = [AdamW([p], lr=0.1, rounding=rounding, moments=moments) for p in (weight, twin)]
    for step in range(3):
        twin.grad = gradients(tuple(twin.shape), step, dtype)
        weight.grad = stride(twin.grad) if step == 1 and layout != "one dimension" else twin.grad.clone()
        for optimizer in ways:
            optimizer.step()
    assert torch.equal(weight, twin)
    assert not torch.equal(weight, stride(values))


def test_numbers_between_those_of_a_strided_weight_stay() -> None:
    values = torch.ones(6, 4, 2)
    weight = nn.Parameter(values[..., 0])
    steps_on(AdamW([weight], lr=0.1), weight, range(2))
    assert torch.equal(values[..., 1], torch.ones(6, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_copied_optimizer_continues_on_its_own(copied: Any, in_backward: bool) -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3, dtype=torch.float32))
    groups = [{"params": [model[0].weight], "rows": True}, {"params": list(model[1].parameters())}]
    optimizer = AdamW(groups, lr=0.1, chunk_size=256)
    if in_backward:
        optimizer.update_in_backward()

    def step(model: nn.Module, optimizer: AdamW) -> None:
        model(torch.tensor([1, 1, 2])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    model[0].weight.requires_grad_(False)  # frozen when it is copied
    other, its_optimizer = copied((model, optimizer))
    assert its_optimizer.chunk_size == 256
    assert its_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    before = tiny.weights(model)
    for each in (other, model):
        each[0].weight.requires_grad_(True)
    step(other, its_optimizer)
    assert not tiny.moved(before, model)
    step(model, optimizer)
    assert tiny.moved(before, model) == set(before)
    tiny.assert_same_weights(other, model)
    assert len(its_optimizer.state[other[0].weight]["row_ids"]) == 3  # ids of a step, counted before merging


def test_a_loaded_state_has_the_keys_of_a_saved_one() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, loaded = AdamW([weight]), AdamW([weight])
    for _ in range(2):
        loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state_dict() == optimizer.state_dict()


@pytest.mark.parametrize("transposed", [False, True])
def test_states_of_torch_are_taken_with_steps_as_numbers_and_with_strides(transposed: bool) -> None:
    start = torch.linspace(-1, 1, 12).view(3, 4)
    start = start.t() if transposed else start
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    their_optimizer, optimizer = torch.optim.AdamW([theirs], lr=0.1), AdamW([ours], lr=0.1)
    steps_on(their_optimizer, theirs, range(2))
    saved = copy.deepcopy(their_optimizer.state_dict())
    saved["state"][0]["step"] = int(saved["state"][0]["step"])  # as torch < 1.12 saved it
    with torch.no_grad():
        ours.copy_(theirs)
    optimizer.load_state_dict(saved)
    for p, each in ((theirs, their_optimizer), (ours, optimizer)):
        steps_on(each, p, range(2, 4))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # the kernel rounds in another order


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_of_torch_that_would_change_the_update_are_refused(option: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"lisatune.AdamW has no {option}"):
        AdamW([{"params": [weight], option: True}])
    state = torch.optim.AdamW([weight], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"lisatune.AdamW has no {option}"):
        AdamW([weight]).load_state_dict(state)


def test_a_learning_rate_of_two_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr must be a number or a tensor of one element, got \[2\]"):
        AdamW([nn.Parameter(torch.ones(3))], lr=torch.tensor([1e-3, 1e-3]))


def test_frozen_weights_are_left_alone() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW(weights)
    steps_on(optimizer, weights[0], range(1))
    assert weights[1] not in optimizer.state
    assert torch.equal(weights[1], torch.ones(3))
