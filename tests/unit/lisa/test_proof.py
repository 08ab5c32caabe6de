import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from lisatune import LISA, ProofError, find_layers, param_groups
from lisatune.lisa import proof
from lisatune.lisa.proof import CHUNK, Proof, fingerprint, has_reason_to_move
from lisatune.lisa.windows import WINDOW, read_window

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)
SHAPES = ((1,), (3,), (), (4, 5), (2, 3, 7), (WINDOW + 1,), (33, 65))


def some_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Draw a tensor whose bits are all random, NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    integer = proof.INTEGERS[dtype.itemsize]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    return torch.randint(low, high, shape, dtype=integer, generator=generator).view(dtype)


def flip(tensor: Tensor, element: int, bit: int) -> Tensor:
    """Copy a tensor with one bit of one element changed."""
    integer = proof.INTEGERS[tensor.element_size()]
    size = 8 * tensor.element_size()
    mask = -(1 << bit) if bit == size - 1 else 1 << bit
    changed = tensor.clone().reshape(-1).view(integer)
    changed[element] ^= mask
    return changed.view(tensor.dtype).reshape(tensor.shape)


@given(st.data())
def test_any_single_bit_is_seen(data: st.DataObject) -> None:
    tensors = [
        some_bits(data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES)), seed)
        for seed in range(data.draw(st.integers(1, 3)))
    ]
    which = data.draw(st.integers(0, len(tensors) - 1))
    element = data.draw(st.integers(0, tensors[which].numel() - 1))
    bit = data.draw(st.integers(0, 8 * tensors[which].element_size() - 1))
    changed = list(tensors)
    changed[which] = flip(tensors[which], element, bit)
    assert fingerprint(changed) != fingerprint(tensors)


@given(st.data())
def test_changes_of_several_elements_are_seen(data: st.DataObject) -> None:
    tensor = some_bits((9, 11), torch.float32, 0)
    elements = data.draw(st.sets(st.integers(0, 98), min_size=2, max_size=20))
    changed = tensor
    for element in elements:
        changed = flip(changed, element, data.draw(st.integers(0, 31)))
    assert fingerprint([changed]) != fingerprint([tensor])


@pytest.mark.parametrize("element", range(8))
def test_signs_of_the_longest_dtype_are_seen(element: int) -> None:
    """A sign is worth 2^63, which a fingerprint modulo 2^64 with even weights would lose."""
    tensor = torch.zeros(8, dtype=torch.float64)
    assert fingerprint([flip(tensor, element, 63)]) != fingerprint([tensor])


def test_small_changes_do_not_cancel() -> None:
    """Steps of one unit in the last place are what training in low precision makes."""
    seen = set()
    for steps in itertools.product((-8, -1, 0, 1, 8), repeat=5):
        bits = torch.tensor(steps, dtype=torch.int32)
        seen.add(int(fingerprint([bits])))
    assert len(seen) == 5**5


def test_swapped_elements_and_swapped_tensors_are_seen() -> None:
    first, second = some_bits((4,), torch.float32, 0), some_bits((4,), torch.float32, 1)
    assert fingerprint([first.flip(0)]) != fingerprint([first])
    assert fingerprint([second, first]) != fingerprint([first, second])


@pytest.mark.parametrize("element", [0, 6, 7, 8, 13, 14, 22])
def test_changes_at_the_edges_of_chunks_are_seen(monkeypatch: pytest.MonkeyPatch, element: int) -> None:
    tensor = some_bits((23,), torch.bfloat16, 0)
    monkeypatch.setattr(proof, "CHUNK", 7)
    assert fingerprint([flip(tensor, element, 3)]) != fingerprint([tensor])
    moved = torch.cat([tensor[7:14], tensor[:7], tensor[14:]])
    assert fingerprint([moved]) != fingerprint([tensor])


def test_fingerprint_reads_values_not_memory() -> None:
    tensor = some_bits((6, 8), torch.float32, 0)
    assert fingerprint([tensor.t().contiguous().t()]) == fingerprint([tensor])
    assert fingerprint([tensor[:, ::2]]) == fingerprint([tensor[:, ::2].clone()])
    assert CHUNK > WINDOW


# 2048 = WINDOW + 1024: with strides that share a factor with the number of places, half was never read.
@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2048, 2049, 3073, 5 * WINDOW + 3])
@pytest.mark.parametrize("index", [0, 1, 5])
def test_windows_walk_through_every_element(size: int, index: int) -> None:
    places = torch.arange(size)
    needed = -(-size // WINDOW)
    for first in (0, 3):
        windows = [read_window(places, period, index) for period in range(first, first + needed)]
        assert torch.equal(torch.cat(windows).unique(), places)
        assert {len(window) for window in windows} == {min(size, WINDOW)}


def test_sample_sees_a_change_of_one_bit_in_the_period_that_reads_it() -> None:
    tensors = [some_bits((3000,), torch.float32, 0), some_bits((2048,), torch.float32, 1)]
    for which, element in ((0, 0), (0, 2999), (1, 1500)):
        changed = list(tensors)
        changed[which] = flip(tensors[which], element, 0)
        seen = [fingerprint(changed, sample=p) != fingerprint(tensors, sample=p) for p in range(3)]
        assert any(seen)


# ---- Proof


def layers_of(**sizes: int) -> dict[str, tuple[nn.Parameter, ...]]:
    return {
        name.replace("_", " "): (nn.Parameter(torch.zeros(size), requires_grad=False),)
        for name, size in sizes.items()
    }


def groups_of(layers: dict[str, tuple[nn.Parameter, ...]], lr: float) -> list[dict[str, object]]:
    """Param groups of an optimizer over all layers; without gradients they must move if lr is not 0."""
    return [{"params": list(parameters), "lr": lr} for parameters in layers.values()]


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_proof_accepts_drawn_layers_that_moved_and_counts(verify: str) -> None:
    layers = layers_of(block_0=3, block_1=3, ends=2)
    check = Proof(layers, verify)
    check.begin(0, {"block 0", "ends"})
    layers["block 0"][0].add_(1)
    layers["ends"][0].add_(1)
    check.saw_step(groups_of(layers, 0.1))
    check.end(still_open=True)
    assert (check.periods, check.is_open) == (0, True)
    check.end()
    assert (check.periods, check.is_open) == (1, False)


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_proof_names_frozen_layers_that_moved(verify: str) -> None:
    layers = layers_of(block_0=3, block_1=3, block_2=3, ends=2)
    check = Proof(layers, verify)
    check.begin(7, {"block 0"})
    for name in ("block 0", "block 1", "ends"):
        layers[name][0].add_(1)
    check.saw_step(groups_of(layers, 0.1))
    with pytest.raises(ProofError, match="period 7: frozen weights moved in block 1, ends;"):
        check.end()


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_proof_names_drawn_layers_that_rested(verify: str) -> None:
    layers = layers_of(block_0=3, block_1=3, ends=2)
    check = Proof(layers, verify)
    check.begin(3, {"block 0", "block 1", "ends"})
    layers["block 0"][0].add_(1)
    check.saw_step(groups_of(layers, 0.0))
    check.end(still_open=True)  # a learning rate of 0 is a reason to rest
    check.saw_step(groups_of(layers, 0.1))
    with pytest.raises(ProofError, match="period 3: drawn but not trained: block 1, ends;"):
        check.end()


def test_layers_whose_update_went_unseen_in_backward_may_rest() -> None:
    layers = layers_of(block_0=3, block_1=3)
    check = Proof(layers, "full")
    check.begin(0, {"block 0", "block 1"})
    check.saw_step(groups_of(layers, 0.1), updated_before={layers["block 0"][0]})
    with pytest.raises(ProofError, match="drawn but not trained: block 1;"):
        check.end()


def test_a_rate_that_the_optimizer_finds_by_itself_must_move() -> None:
    layers = layers_of(block_0=3)
    check = Proof(layers, "full")
    check.begin(0, {"block 0"})
    check.saw_step([{"params": list(layers["block 0"]), "lr": None}])
    with pytest.raises(ProofError, match="drawn but not trained: block 0;"):
        check.end()


def test_layers_without_parameters_are_left_out() -> None:
    check = Proof(layers_of(block_0=1) | {"frozen part": ()}, "full")
    check.begin(0, {"frozen part"})
    check.end()
    assert check.periods == 1


def test_forget_drops_the_period() -> None:
    layers = layers_of(block_0=3)
    check = Proof(layers, "full")
    check.begin(0, set())
    layers["block 0"][0].add_(1)
    check.forget()
    check.end()
    assert check.periods == 0


def parameter(values: list[float], gradient: list[float] | None) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values))
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


def test_reasons_to_move_are_a_rate_and_a_gradient() -> None:
    driven, idle, lost = (parameter([1.0, 2.0], g) for g in ([0.0, 1.0], [0.0, 0.0], None))
    nan = parameter([1.0], [float("nan")])
    rate = dict.fromkeys((driven, idle, lost, nan), 1e-3)
    assert has_reason_to_move([idle, driven], rate)
    assert has_reason_to_move([lost], rate)
    assert has_reason_to_move([nan], rate)
    assert not has_reason_to_move([idle, lost], rate)
    assert not has_reason_to_move([driven, lost], dict.fromkeys(rate, 0.0))
    assert not has_reason_to_move([driven, idle], {**rate, driven: 0.0})
    assert not has_reason_to_move([], {})


def test_reasons_are_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = parameter([0.0] * 64, [1.0, 0.0, 0.0, 0.0] * 15 + [0.0] * 4)
    monkeypatch.setattr(proof, "CHUNK", 8)
    assert not has_reason_to_move([weight], {weight: 1e-3})  # 15, less than a quarter
    weight.grad[63] = 1.0
    assert has_reason_to_move([weight], {weight: 1e-3})


def test_gradients_outside_the_window_are_no_reason_to_move() -> None:
    weight = nn.Parameter(torch.zeros(2, WINDOW))
    weight.grad = torch.zeros(2, WINDOW)
    weight.grad[1, 5:21] = 1.0
    rates = {weight: 1e-3}
    assert [has_reason_to_move([weight], rates, sample=period) for period in (0, 1, 2)] == [
        False,
        True,
        False,
    ]
    assert has_reason_to_move([weight], rates)


@pytest.mark.parametrize(
    ("dtype", "lr", "must_move"),
    [
        (torch.float32, 1e-5, True),
        (torch.bfloat16, 1e-5, True),  # 5 % of such weights are small enough
        (torch.float32, 2.5e-13, False),  # the last steps of a cosine over 100,000
        (torch.bfloat16, 1e-9, False),
    ],
)
def test_updates_that_rounding_swallows_are_no_reason_to_move(
    dtype: torch.dtype, lr: float, must_move: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(64, 256, generator=generator)).to(dtype))
    weight.grad = torch.ones_like(weight)
    assert has_reason_to_move([weight], {weight: lr}, sample=0) is must_move


def test_run_may_end_on_learning_rates_too_small_to_move_anything(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, verify="sample")
    optimizer.param_groups[0]["lr"] = 1e-18
    tiny.fit(untied_llama, optimizer, 6)
    assert lisa.periods_proven == 2


def test_sparse_gradients_are_read() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([3])).sum().backward()
    for sample in (None, 0):
        assert has_reason_to_move([embedding.weight], {embedding.weight: 0.1}, sample=sample)


# ---- in a run


def attach(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, LISA]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return optimizer, LISA(model, optimizer, **{"active": 2, "period": 3, "verify": "full", **options})


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_frozen_block_that_moves_is_named_with_its_period(untied_llama: nn.Module, verify: str) -> None:
    optimizer, lisa = attach(untied_llama, verify=verify)
    tiny.fit(untied_llama, optimizer, 4)
    frozen = next(i for i in range(6) if i not in lisa.active_blocks)
    with torch.no_grad():
        for p in untied_llama.model.layers[frozen].parameters():
            p.mul_(1.5)
    tiny.fit(untied_llama, optimizer, 1)
    with pytest.raises(ProofError, match=rf"period 1: frozen weights moved in block {frozen};"):
        tiny.fit(untied_llama, optimizer, 1)


def test_one_element_of_a_frozen_block_is_seen_in_full_mode(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, 1)
    frozen = next(i for i in range(6) if i not in lisa.active_blocks)
    with torch.no_grad():
        untied_llama.model.layers[frozen].mlp.up_proj.weight[7, 3] += 1e-6
    with pytest.raises(ProofError, match=rf"block {frozen};"):
        tiny.fit(untied_llama, optimizer, 2)


def test_optimizer_that_moves_frozen_blocks_is_caught(untied_llama: nn.Module) -> None:
    """The defect of frameworks that only toggle `requires_grad`: what has a gradient still moves."""
    optimizer, lisa = attach(untied_llama)
    frozen = next(i for i in range(6) if i not in lisa.active_blocks)
    for p in untied_llama.model.layers[frozen].parameters():
        p.grad = torch.ones_like(p)
    tiny.backward(untied_llama, 0)
    optimizer.step()
    with pytest.raises(ProofError, match=rf"block {frozen};"):
        lisa.check()


def lose_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lose the gradients of parameters right after backward has made them."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def test_drawn_block_whose_gradient_is_lost_is_named(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    lost = lisa.active_blocks[1]
    lose_gradients(untied_llama.model.layers[lost].parameters())
    with pytest.raises(ProofError, match=rf"period 0: drawn but not trained: block {lost};"):
        tiny.fit(untied_llama, optimizer, 3)


@pytest.mark.filterwarnings("ignore:the weights are bfloat16 and AdamW rounds:UserWarning")
@pytest.mark.parametrize("verify", ["full", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_without_gradients_are_named(untied_llama: nn.Module, dtype: torch.dtype, verify: str) -> None:
    optimizer, lisa = attach(untied_llama.to(dtype), verify=verify)
    lose_gradients(lisa.layers.end_parameters(untied_llama).values())
    with pytest.raises(ProofError, match="period 0: drawn but not trained: ends;"):
        tiny.fit(untied_llama, optimizer, 3)


@pytest.mark.parametrize("verify", ["full", "sample"])
def test_drawn_block_that_became_nan_is_named(untied_llama: nn.Module, verify: str) -> None:
    """A loop that steps on NaN once has moved its weights, and proves nothing."""
    optimizer, lisa = attach(untied_llama, verify=verify)
    broken = lisa.active_blocks[1]

    def spoil(*_: object) -> None:
        if lisa.steps_done == 2:  # the last of the period: one more, and NaN is everywhere
            for p in untied_llama.model.layers[broken].parameters():
                p.grad.fill_(torch.nan)

    optimizer.register_step_pre_hook(spoil)
    with pytest.raises(ProofError, match=rf"period 0: the weights became NaN in block {broken}, because"):
        tiny.fit(untied_llama, optimizer, 3)
    assert lisa.periods_proven == 0


def test_check_proves_a_period_that_is_not_over(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    tiny.fit(untied_llama, optimizer, 4)
    lisa.check()
    assert lisa.periods_proven == 1
    with torch.no_grad():
        frozen = next(i for i in range(6) if i not in lisa.active_blocks)
        untied_llama.model.layers[frozen].mlp.up_proj.weight.add_(1)
    with pytest.raises(ProofError, match=rf"period 1: frozen weights moved in block {frozen};"):
        lisa.check()


def test_steps_of_learning_rate_zero_are_no_violation(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    optimizer.param_groups[0]["lr"] = 0.0
    tiny.fit(untied_llama, optimizer, 6)
    assert lisa.periods_proven == 2


def test_one_moving_step_in_a_period_is_asked_for(untied_llama: nn.Module) -> None:
    optimizer, _ = attach(untied_llama)
    before = tiny.weights(untied_llama)

    def undo(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.0
        with torch.no_grad():
            for name, p in untied_llama.named_parameters():
                p.copy_(before[name])

    with pytest.raises(ProofError, match="period 0: drawn but not trained: block"):
        tiny.fit(untied_llama, optimizer, 3, after=undo)


def test_gradients_of_zero_are_no_violation(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)
    for _ in range(3):
        ids = tiny.tokens(0)
        (untied_llama(input_ids=ids, use_cache=False).logits.sum() * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lisa.periods_proven == 1


def test_tokens_that_do_not_occur_are_no_violation(untied_llama: nn.Module) -> None:
    """The window of an embedding can hold nothing but rows without a gradient."""
    layers = find_layers(untied_llama, ends=["model.embed_tokens"])
    optimizer = torch.optim.AdamW(param_groups(untied_llama, layers), lr=1e-2)
    lisa = LISA(untied_llama, optimizer, active=1, period=1, verify="sample", layers=layers)
    ids = torch.full((1, 4), 127)
    for _ in range(5):
        untied_llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lisa.periods_proven == 5


def test_closures_are_judged_by_the_gradients_they_make(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama)

    def closure() -> float:
        optimizer.zero_grad()
        loss = untied_llama(input_ids=tiny.tokens(0), use_cache=False).logits.sum() * 0.0
        loss.backward()
        return loss.item()

    for _ in range(3):
        optimizer.step(closure)
    assert lisa.periods_proven == 1


def in_bf16(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, LISA]:
    optimizer = torch.optim.AdamW(model.to(torch.bfloat16).parameters(), lr=1e-3, weight_decay=0.0)
    return optimizer, LISA(model, optimizer, **{"active": 2, "period": 1, "verify": "sample", **options})


def swallow(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> None:
    """Moments after which Adam's updates of the ends, or of some rows, are lost in rounding to bf16."""
    for name, p in model.named_parameters():
        if "layers" not in name:
            exp_avg_sq = torch.full_like(p, 1e-8)
            exp_avg_sq[rows if p.dim() == 2 else slice(None)] = 1e8
            optimizer.state[p] = {
                "step": torch.tensor(5000.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": exp_avg_sq,
            }


@pytest.mark.filterwarnings("ignore:the weights are bfloat16 and AdamW rounds:UserWarning")
def test_coarse_weights_that_rest_in_their_window_are_read_in_full(untied_llama: nn.Module) -> None:
    optimizer, lisa = in_bf16(untied_llama)
    swallow(untied_llama, optimizer, slice(0, 96))  # three of four windows of embedding and head
    tiny.fit(untied_llama, optimizer, 6)
    assert 0 < lisa.periods_proven < 6
    swallow(untied_llama, optimizer, slice(None))
    with pytest.raises(ProofError, match="drawn but not trained: ends;"):
        tiny.fit(untied_llama, optimizer, range(6, 10))


@pytest.mark.filterwarnings("ignore:the weights are bfloat16 and AdamW rounds:UserWarning")
def test_a_doubt_is_no_error_at_the_end_of_a_run(untied_llama: nn.Module) -> None:
    optimizer, lisa = in_bf16(untied_llama, period=4)
    swallow(untied_llama, optimizer, slice(None))
    tiny.fit(untied_llama, optimizer, 2)
    lisa.check()
    tiny.fit(untied_llama, optimizer, range(2, 4))
    assert lisa.periods_proven == 0
    tiny.fit(untied_llama, optimizer, range(4, 6))
    with pytest.raises(ProofError, match="period 1: drawn but not trained: ends;"):
        lisa.check()


def test_verify_off_reads_nothing(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, verify="off")
    tiny.fit(untied_llama, optimizer, 1)
    with torch.no_grad():
        for p in untied_llama.parameters():
            p.add_(1)
    tiny.fit(untied_llama, optimizer, 2)
    lisa.check()
    assert lisa.periods_proven == 0
