"""Frozen blocks that are corrected: adapters beside their linear layers train in every step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import tiny
from lisatune import LISA, AdamW, Correction, ProofError, find_layers, param_groups
from lisatune.lisa.correction import find_correction
from lisatune.lisa.low_rank import LowRankCorrection
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.runs.checkpoint import load_checkpoint, load_weights, save_checkpoint

BF16 = {"rounding": "stochastic", "moments": "8bit"}

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


def attach(
    model: nn.Module,
    *,
    correction: str | Correction = "lora",
    ends: str = "train",
    adamw: dict[str, Any] | None = None,
    in_backward: bool = False,
    **options: Any,
) -> tuple[AdamW, LISA]:
    """Attach LISA with γ = 2, K = 3, adapters and the full proof."""
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=ends), lr=1e-2, **(adamw or {}))
    if in_backward:
        optimizer.update_in_backward()
    chosen = {"active": 2, "period": 3, "verify": "full", "ends": ends, **options}
    return optimizer, LISA(model, optimizer, correction=correction, **chosen)


def of(model: nn.Module) -> LowRankCorrection:
    correction = find_correction(model)
    assert correction is not None
    return correction


def trained(steps: int = 5, **options: Any) -> tuple[LlamaForCausalLM, AdamW, LISA]:
    model = tiny.llama()
    optimizer, lisa = attach(model, **options)
    tiny.fit(model, optimizer, steps)
    return model, optimizer, lisa


def logits(model: nn.Module) -> Tensor:
    was = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny.tokens(0), use_cache=False).logits
    model.train(was)
    return found


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Compare weights and adapters bit for bit."""
    tiny.assert_same_weights(model, other)
    for p, q in zip(of(model).all_parameters(), of(other).all_parameters(), strict=True):
        assert torch.equal(p, q)


def blocks_that_moved(before: list[Tensor], model: nn.Module) -> set[int]:
    """Name the blocks of which an adapter moved."""
    moved = set()
    for i, block in enumerate(of(model).blocks):
        for adapter in block:
            moved |= {
                i for p in (adapter.A, adapter.B) if not any(p is q or torch.equal(p, q) for q in before)
            }
    return moved


# ---- what trains


def test_adapters_of_all_blocks_train_in_every_step_and_weights_only_where_drawn() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, active=1, sampler="ascending")
    before, weights = of(model), tiny.weights(model)
    adapters = [p.detach().clone() for p in before.all_parameters()]
    tiny.fit(model, optimizer, 3)
    assert blocks_that_moved(adapters, model) == set(range(6))
    assert {name.split(".")[2] for name in tiny.moved(weights, model) if ".layers." in name} == {"0"}
    assert len(before.adapters) == 6 * 7
    assert not any(p.grad is not None for p in before.all_parameters())
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    assert "adapters of all blocks moved" in lisa.summarize()["proof"]


def test_above_trains_the_adapters_that_backward_reaches_anyway() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, correction=Correction(blocks="above"), ends="frozen", active=1, seed=1)
    reached: set[int] = set()
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, args, out, i=i: reached.add(i) if out.requires_grad else None)
    lowest = lisa.active_blocks[0]
    assert 0 < lowest < 5, "else the test shows nothing"
    before = [p.detach().clone() for p in of(model).all_parameters()]
    tiny.fit(model, optimizer, 2)
    assert blocks_that_moved(before, model) == set(range(lowest, 6))
    assert reached == set(range(lowest, 6))
    while lisa.active_blocks[0] <= lowest:
        tiny.fit(model, optimizer, 1)
    adapter = of(model).blocks[lowest][0]
    assert bool(adapter.B.any()), "what it has learned stays added"
    assert not adapter.A.requires_grad


def test_adapters_rest_while_their_block_trains() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, correction=Correction(blocks="frozen"), active=2, seed=1)
    for _ in range(3):  # periods
        active = set(lisa.active_blocks)
        before = [p.detach().clone() for p in of(model).all_parameters()]
        tiny.fit(model, optimizer, lisa.period)
        assert blocks_that_moved(before, model) == set(range(6)) - active
    assert lisa.periods_proven == 3


def test_named_matrices_alone_get_adapters() -> None:
    model = tiny.llama()
    attach(model, correction=Correction(matrices=("o_proj", "mlp.down_proj")))
    assert {name.rpartition(".")[2] for name in of(model).names.values()} == {"o_proj", "down_proj"}
    assert len(of(model).adapters) == 12


def test_a_layer_with_a_forward_of_its_own_keeps_it_and_gets_no_adapter() -> None:
    """As Accelerate's hooks give to each layer of a model that `device_map` spreads."""
    model, plain = tiny.llama(), tiny.llama()
    patched = {layer: layer.forward for layer in (b.mlp.up_proj for b in model.model.layers)}
    for layer, forward in patched.items():
        layer.forward = lambda x, forward=forward: 2 * forward(x)
    before = logits(model)
    _, lisa = attach(model)
    assert torch.equal(logits(model), before)
    assert not {layer for layer in patched if "_adapter" in vars(layer)}
    lisa.detach()
    assert torch.equal(logits(model), before)
    for each in plain.modules():
        each.forward = each.forward
    with pytest.raises(ValueError, match="have none, or only such with a forward of their own"):
        attach(plain)


def test_micro_steps_add_up() -> None:
    def take_step(micro_steps: list[list[int]]) -> list[Tensor]:
        model = tiny.llama()
        optimizer, _ = attach(model)
        for rows in micro_steps:
            ids = torch.cat([tiny.tokens(row) for row in rows])
            (model(input_ids=ids, labels=ids).loss * len(rows) / 2).backward()
        grads = [p.grad.clone() for p in of(model).parameters() if p.grad is not None]
        optimizer.step()
        return grads

    for one, other in zip(take_step([[0], [1]]), take_step([[0, 1]]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("by", ["optimizer", "model", "hand"])
def test_a_step_that_is_left_out_leaves_no_gradient_behind(by: str) -> None:
    model, _, _ = one = trained(2)
    twin, _, _ = other = trained(2)
    tiny.backward(twin, 99)
    if by == "hand":
        for p in twin.parameters():
            p.grad = None
    else:
        {"optimizer": other[1], "model": twin}[by].zero_grad()
    for each in (one, other):
        tiny.fit(each[0], each[1], range(2, 5))
    assert_same(model, twin)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scaler_is_refused_because_it_does_not_divide_the_adapters_gradients(
    kind: Any, unscales: bool, overflows: bool
) -> None:
    model = tiny.llama()
    optimizer = kind(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, correction="lora")
    before, adapters = tiny.weights(model), [p.detach().clone() for p in of(model).all_parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=tiny.tokens(0), labels=tiny.tokens(0)).loss).backward()
    if overflows:
        lisa.trainable_parameters()[0].grad.fill_(float("inf"))
    if unscales:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"adapters .* loss scaler .* GradScaler\(enabled=False\)"):
        scaler.step(optimizer)
    assert not tiny.moved(before, model)
    assert not blocks_that_moved(adapters, model)

    optimizer.zero_grad()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.scale(model(input_ids=tiny.tokens(0), labels=tiny.tokens(0)).loss).backward()
    disabled.step(optimizer)
    assert lisa.steps_done == 1
    lisa.detach()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=tiny.tokens(0), labels=tiny.tokens(0)).loss).backward()
    before = tiny.weights(model)
    scaler.step(optimizer)
    assert tiny.moved(before, model) == before.keys()


def test_a_loop_can_clip_adapters_and_weights_together() -> None:
    model = tiny.llama()
    _, lisa = attach(model)
    tiny.backward(model, 0)
    assert set(of(model).parameters()) < set(lisa.trainable_parameters())
    nn.utils.clip_grad_norm_(lisa.trainable_parameters(), 1e-3)
    norms = [float(p.grad.norm()) for p in lisa.trainable_parameters() if p.grad is not None]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(1e-3, rel=0.01)


def test_the_rate_follows_the_schedule_and_b_has_its_ratio() -> None:
    model = tiny.llama()
    optimizer, _ = attach(model, correction=Correction(lr=1e-3, lr_ratio=16))
    scheduler = LambdaLR(optimizer, lambda step: (0.0, 1.0, 0.5)[step])
    rates = []
    for step in range(3):
        before = [p.detach().clone() for p in of(model).all_parameters()]
        tiny.fit(model, optimizer, range(step, step + 1))
        rates.append([group["lr"] for group in of(model).optimizer.param_groups])
        assert bool(blocks_that_moved(before, model)) == (step > 0)
        if step < 2:
            scheduler.step()
    assert rates == [[0, 0], [1e-3, 16e-3], [5e-4, 8e-3]]


def test_the_rate_follows_the_schedule_also_beside_a_last_group_that_has_none() -> None:
    model = tiny.llama()
    *rest, norm, head = model.parameters()
    optimizer = AdamW([{"params": [*rest, head], "lr": 1e-2}, {"params": [norm], "lr": 0.0}])
    LISA(model, optimizer, active=2, correction=Correction(lr=4e-3))
    schedule = LambdaLR(optimizer, lambda step: (step + 1) / 4)
    rates = []

    def note(step: int) -> None:
        rates.append(of(model).optimizer.param_groups[0]["lr"])
        schedule.step()

    tiny.fit(model, optimizer, 3, after=note)
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3])


def test_one_cycle_goes_up_to_the_full_rate() -> None:
    model = tiny.llama()
    optimizer, _ = attach(model)
    scheduler = OneCycleLR(optimizer, max_lr=3e-2, total_steps=10)
    rates = []
    for step in range(9):
        tiny.fit(model, optimizer, range(step, step + 1))
        rates.append(of(model).optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert max(rates) == pytest.approx(1e-3, rel=0.02)


def test_moments_have_the_format_of_the_optimizer() -> None:
    model, _, lisa = trained(1, adamw={"moments": "bf16"})
    states = of(model).optimizer.state
    assert {state["exp_avg"].dtype for state in states.values()} == {torch.bfloat16}
    other, _, plain = trained(1, adamw={"moments": "bf16"}, correction="none")
    assert find_correction(other) is None
    numbers = sum(p.numel() for p in of(model).all_parameters())
    assert lisa.state_bytes() - plain.state_bytes() == 4 * numbers + 4 * len(states)


# ---- how blocks run


@pytest.mark.parametrize("how", ["all", "frozen", "reentrant", "in backward"])
def test_recomputing_and_updating_in_backward_change_no_weight(how: str) -> None:
    plain, _, _ = trained(5)
    model = tiny.llama()
    optimizer, lisa = attach(model, in_backward=how == "in backward")
    if how in ("all", "frozen"):
        BlockForward(model, lisa.layers, checkpointing=how)  # type: ignore[arg-type]
    elif how == "reentrant":
        model.activation_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    tiny.fit(model.train(), optimizer, 5)
    assert_same(model, plain)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_share_their_graphs() -> None:
    torch._dynamo.reset()
    plain, _, _ = trained(4)
    model = tiny.llama()
    optimizer, lisa = attach(model)
    before = num_graphs()
    with BlockForward(model, lisa.layers, backend="eager"):
        tiny.fit(model.train(), optimizer, 4)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert num_graphs() - before == 2, "frozen and active"


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_adapters_train_beside_codes(bits: str, tmp_path: Path) -> None:
    model, optimizer, lisa = trained(7, frozen_weights=bits)
    assert lisa.periods_proven == 2
    assert all(bool(adapter.B.any()) for adapter in of(model).adapters)
    want = logits(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(saved), want, rtol=0, atol=1e-5)
    resumed = tiny.llama(seed=1)
    theirs, _ = attach(resumed, frozen_weights=bits)
    resumed.load_state_dict(saved.state_dict())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(resumed, model)
    for each, its in ((model, optimizer), (resumed, theirs)):
        tiny.fit(each, its, range(7, 10))
    assert_same(resumed, model)


# ---- the model that is saved


@pytest.mark.parametrize("tied", [True, False])
def test_logits_in_memory_are_those_of_the_saved_model(tied: bool, tmp_path: Path) -> None:
    model = tiny.llama(tied=tied)
    optimizer, lisa = attach(model)
    tiny.fit(model, optimizer, 5)
    want = logits(model)
    base = tiny.llama(tied=tied)
    base.load_state_dict({name: p.detach() for name, p in model.named_parameters()}, strict=False)
    assert float((logits(base) - want).abs().max()) > 1e-3, "else the adapters have learned nothing"
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(saved), want, rtol=0, atol=1e-5)
    lisa.detach()
    tiny.assert_same_weights(model, saved)
    assert torch.equal(logits(model), logits(saved))
    assert find_correction(model) is None
    assert all("forward" not in vars(module) for module in model.modules())


def test_weights_of_16_bits_are_rounded_once() -> None:
    model = tiny.llama().to(torch.bfloat16)
    optimizer, lisa = attach(model, adamw={"rounding": "exact"})
    tiny.fit(model, optimizer, 5)
    exact = {
        name: (a.weight.double() + a.scale * (a.B.detach().double() @ a.A.detach().double())).bfloat16()
        for a, name in of(model).names.items()
    }
    for name, merged in exact.items():
        assert torch.equal(model.state_dict()[f"{name}.weight"], merged)
    lisa.detach()
    for name, merged in exact.items():
        assert torch.equal(model.get_submodule(name).weight, merged)


def test_a_copy_of_the_model_computes_and_saves_the_same_and_trains_nothing_here() -> None:
    model, optimizer, _ = trained(3)
    copied = copy.deepcopy(model)
    want = logits(model)
    assert find_correction(copied) is None
    tiny.fit(model, optimizer, range(3, 5))
    assert torch.equal(logits(copied), want)
    other = tiny.llama()
    other.load_state_dict(copied.state_dict())
    torch.testing.assert_close(logits(other), want, rtol=0, atol=1e-5)


def test_a_model_that_is_saved_whole_computes_and_saves_the_same(tmp_path: Path) -> None:
    model, _, _ = trained(4, frozen_weights="int8")
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(whole), logits(model))
    for name, weight in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight)


@pytest.mark.parametrize("correction", ["none", "lora"])
def test_a_copy_can_be_trained_by_a_lisa_of_its_own(correction: str) -> None:
    model, _, _ = trained(4)
    twin, want = copy.deepcopy(model).requires_grad_(True), model.state_dict()
    optimizer, lisa = attach(twin, correction=correction)
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, want[name]), name
    tiny.fit(twin, optimizer, 6)
    saved = copy.deepcopy(twin.state_dict())
    lisa.detach()
    assert all("forward" not in vars(module) for module in twin.modules())
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, saved[name]), name


def test_detaching_twice_merges_once() -> None:
    model, _, lisa = trained(4)
    lisa.detach()
    want = copy.deepcopy(model.state_dict())
    lisa.detach()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, want[name])


@pytest.mark.parametrize("frozen_weights", ["exact", "int8"])
def test_other_weights_take_the_place_of_the_sum(frozen_weights: Any) -> None:
    model, _, _ = trained(2, verify="off", frozen_weights=frozen_weights)
    best = {name: weight.clone() for name, weight in model.state_dict().items()}
    want = logits(model)
    tiny.fit(model, of(model)._follows, range(2, 5))  # type: ignore[arg-type]
    model.load_state_dict(best)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, best[name])


# ---- resume


@pytest.mark.parametrize(
    ("dtype", "adamw"),
    [(torch.float32, {}), (torch.float32, {"moments": "bf16"}), (torch.bfloat16, BF16)],
)
@pytest.mark.parametrize("merges", [True, False])
def test_resume_from_merged_weights_or_unmerged_ones_is_bit_equal(
    dtype: torch.dtype, adamw: dict[str, Any], merges: bool
) -> None:
    models = [tiny.llama(seed=seed, hidden=64).to(dtype) for seed in (0, 0, 1)]
    whole, first, second = models
    optimizers = [attach(model, adamw=adamw)[0] for model in models]
    tiny.fit(whole, optimizers[0], 10)
    tiny.fit(first, optimizers[1], 5)
    state = copy.deepcopy(optimizers[1].state_dict())
    if merges:
        second.load_state_dict(first.state_dict())
    else:
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            p.data.copy_(q.data)
    optimizers[2].load_state_dict(state)
    assert_same(second, first)
    tiny.fit(second, optimizers[2], range(5, 10))
    assert_same(second, whole)


@pytest.mark.parametrize("correction", ["lora", "sign"])
def test_modules_that_are_drawn_one_by_one_are_corrected_and_resume(correction: str) -> None:
    options = {"correction": correction, "unit": "module"}
    whole, first, second = (tiny.llama(seed=seed) for seed in (0, 0, 1))
    (its, lisa), (theirs, _), (other, _) = (attach(model, **options) for model in (whole, first, second))
    tiny.fit(whole, its, 7)
    assert lisa.periods_proven == 2
    tiny.fit(first, theirs, 4)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(theirs.state_dict()))
    tiny.fit(second, other, range(4, 7))
    tiny.assert_same_weights(second, whole)


def test_the_checkpoint_of_a_run_holds_unmerged_weights_and_the_adapters(tmp_path: Path) -> None:
    model, optimizer, _ = trained(4)
    path = save_checkpoint(tmp_path, step=4, model=model, optimizer=optimizer)
    other = tiny.llama(seed=1)
    theirs, _ = attach(other)
    load_checkpoint(path, model=other, optimizer=theirs)
    assert_same(other, model)
    tiny.fit(other, theirs, range(4, 7))
    load_weights(path, model=other)  # the best checkpoint of a run
    assert_same(other, model)


def test_weights_that_do_not_belong_to_the_state_are_refused() -> None:
    _, optimizer, _ = trained(4)
    other = tiny.llama(seed=1)
    theirs, _ = attach(other)
    before = tiny.weights(other)
    with pytest.raises(
        ValueError, match=r"weight of model\.layers\.0\.self_attn\.q_proj is not the one .* first"
    ):
        theirs.load_state_dict(optimizer.state_dict())
    assert tiny.moved(before, other) == set()


@pytest.mark.parametrize("correction", ["none", Correction(rank=4)])
def test_state_of_another_correction_is_refused(correction: str | Correction) -> None:
    model, optimizer, _ = trained(4)
    other = copy.deepcopy(tiny.llama())
    theirs, _ = attach(other, correction=correction)
    with pytest.raises(ValueError, match=r"LISA was saved with other settings.*correction: saved"):
        theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"LISA was saved with other settings.*correction: saved"):
        optimizer.load_state_dict(theirs.state_dict())
    assert model is not None


def test_state_from_before_corrections_existed_loads() -> None:
    model, optimizer, _ = trained(4, correction="none")
    state = optimizer.state_dict()
    del state["lisa"]["settings"]["correction"]
    optimizer.load_state_dict(state)
    tiny.fit(model, optimizer, range(4, 6))


# ---- proof


def test_proof_sees_an_adapter_that_does_not_train() -> None:
    model = tiny.llama()
    optimizer, _ = attach(model)
    for adapter in of(model).blocks[3]:
        adapter.A.requires_grad_(False)
        adapter.B.requires_grad_(False)
    with pytest.raises(ProofError, match="drawn but not trained: adapters of block 3;"):
        tiny.fit(model, optimizer, 3)


def test_proof_sees_a_resting_adapter_that_moves() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, correction=Correction(blocks="above"), active=1, seed=1)
    assert lisa.active_blocks[0] > 0
    tiny.fit(model, optimizer, 1)
    of(model).blocks[0][0].B.data[0, 0] = 1
    with pytest.raises(ProofError, match="frozen weights moved in adapters of block 0"):
        tiny.fit(model, optimizer, range(1, 3))


# ---- refusals


@pytest.mark.parametrize(
    ("correction", "options", "message"),
    [
        (
            Correction(rank=20),
            {},
            r"correction_rank 20 .* model\.layers\.0\.self_attn\.k_proj \[16, 32\]; .* 16",
        ),
        (
            Correction(matrices=("c_fc",)),
            {},
            "'c_fc', but the blocks' linear layers are down_proj, gate_proj",
        ),
        ("lora", {"active": 6}, "all 6 blocks train in every step; lower active"),
        (Correction(blocks="above"), {"active": 0}, "above needs blocks that train"),
        ("lore", {}, "correction must be 'none', 'lora' or 'sign', got 'lore'"),
    ],
)
def test_what_cannot_be_corrected_is_refused(
    correction: str | Correction, options: dict[str, Any], message: str
) -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match=message):
        attach(model, correction=correction, **options)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 1.5},
        {"lr": 0},
        {"lr": "1e-3"},
        {"lr_ratio": -1},
        {"blocks": "below"},
        {"matrices": "o_proj"},
        {"matrices": None},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"correction_{next(iter(options))} must be"):
        Correction(**options)


def test_models_without_linear_layers_and_float16_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16))
    with pytest.raises(ValueError, match="those of GPT2LMHeadModel have none"):
        attach(gpt2, active=1)
    layers = find_layers(model := tiny.llama())
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="beside float16 weights"):
        LowRankCorrection(model.half(), layers, optimizer, Correction(), seed=0)
