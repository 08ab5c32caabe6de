"""Frozen blocks that take steps of equal size in backward, without state."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from lisatune import LISA, AdamW, Correction, ProofError, find_layers, param_groups
from lisatune.distributed import ranks
from lisatune.lisa.sign import SignCorrection
from lisatune.methods import METHODS
from lisatune.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig

LR = 1e-2

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


def attach(
    model: nn.Module,
    *,
    correction: str | Correction = "sign",
    adamw: dict[str, Any] | None = None,
    in_backward: bool = False,
    **options: Any,
) -> tuple[AdamW, LISA]:
    """Attach LISA with the block 0, K = 3 and the full proof."""
    optimizer = AdamW(param_groups(model, find_layers(model)), lr=LR, weight_decay=0.0, **(adamw or {}))
    if in_backward:
        optimizer.update_in_backward()
    chosen = {"active": 1, "period": 3, "verify": "full", "sampler": "ascending", **options}
    return optimizer, LISA(model, optimizer, correction=correction, **chosen)


def test_frozen_numbers_move_by_a_share_of_the_rate_against_their_gradient() -> None:
    model, twin = tiny.llama(), tiny.llama()
    before = tiny.weights(model)
    tiny.backward(twin, 0)
    optimizer, _ = attach(model, correction=Correction(kind="sign", share=0.25))
    tiny.backward(model, 0)
    for block in model.model.layers[1:]:
        for p in block.parameters():
            assert p.grad is None, "freed at once"
    for name, p in model.named_parameters():
        if ".layers." in name and ".layers.0." not in name:
            grad = twin.get_parameter(name).grad
            assert grad is not None
            torch.testing.assert_close(p.detach(), before[name] - LR * 0.25 * grad.sign(), rtol=0, atol=1e-7)
        else:
            assert torch.equal(p, before[name])
    optimizer.step()
    frozen = {p for block in model.model.layers[1:] for p in block.parameters()}
    assert frozen.isdisjoint(optimizer.state)


def test_steps_below_the_spacing_of_bf16_move_numbers_by_the_right_amount_on_average() -> None:
    model = tiny.llama(hidden=64).to(torch.bfloat16)
    optimizer, _ = attach(model, correction=Correction(kind="sign", share=1e-3), active=0)
    weight = model.model.layers[3].mlp.up_proj.weight
    before = weight.detach().clone()
    tiny.backward(model, 0)
    change = weight.detach().double() - before.double()
    assert 0 < float((change != 0).double().mean()) < 0.5, "a step is below the spacing of most numbers"
    twin = tiny.llama(hidden=64).to(torch.bfloat16)
    tiny.backward(twin, 0)
    grad = twin.model.layers[3].mlp.up_proj.weight.grad
    assert grad is not None
    along = float((change * -grad.sign().double()).mean())
    assert along == pytest.approx(LR * 1e-3 * float((grad != 0).double().mean()), rel=0.3)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_inside_a_period_is_bit_equal(dtype: torch.dtype) -> None:
    whole, first, second = (tiny.llama(seed=seed).to(dtype) for seed in (0, 0, 1))
    optimizers = [attach(model, adamw={"rounding": "stochastic"})[0] for model in (whole, first, second)]
    tiny.fit(whole, optimizers[0], 8)
    tiny.fit(first, optimizers[1], 4)
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    tiny.fit(second, optimizers[2], range(4, 8))
    tiny.assert_same_weights(second, whole)


def test_a_step_that_is_left_out_can_be_followed_by_another_and_nan_moves_nothing() -> None:
    model = tiny.llama()
    optimizer, _ = attach(model)
    ids = tiny.tokens(0)
    before = tiny.weights(model)
    (model(input_ids=ids, labels=ids).loss * torch.nan).backward()
    optimizer.zero_grad()
    assert tiny.moved(before, model) == set()
    tiny.fit(model, optimizer, 1)
    assert tiny.moved(before, model) == before.keys()


@pytest.mark.parametrize("by", ["optimizer", "model", "hand"])
@pytest.mark.parametrize("breaks_off", [False, True])
def test_a_step_may_be_left_out_however_its_gradients_are_released(by: str, breaks_off: bool) -> None:
    """HF Trainer calls `model.zero_grad()`; with `auto_find_batch_size` also after memory ran out."""
    model = tiny.llama()
    optimizer, lisa = attach(model)
    if breaks_off:

        def run_out(*_: Any) -> None:
            raise torch.OutOfMemoryError("memory ran out")

        hook = model.model.layers[2].register_full_backward_pre_hook(run_out)
        with pytest.raises(torch.OutOfMemoryError):
            tiny.backward(model, 0)
        hook.remove()
    else:
        tiny.backward(model, 0)
    if by == "hand":
        for p in model.parameters():
            p.grad = None
    else:
        {"optimizer": optimizer, "model": model}[by].zero_grad()
    tiny.fit(model, optimizer, range(1, 4))
    assert (lisa.steps_done, lisa.periods_proven) == (3, 1)


def test_proof_speaks_of_drawn_blocks_and_frozen_ends_alone() -> None:
    model = tiny.llama()
    optimizer, lisa = attach(model, ends="frozen")
    tiny.fit(model, optimizer, 4)
    proof = lisa.summarize()["proof"]
    assert proof.startswith("1 period and 1 step: drawn blocks moved (100 % of their numbers), others took")
    assert "bit-identical" not in proof
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ProofError, match="frozen weights moved in ends;"):
        tiny.fit(model, optimizer, range(4, 6))


def test_detach_leaves_the_blocks_to_their_gradients() -> None:
    model = tiny.llama()
    _, lisa = attach(model)
    lisa.detach()
    before = tiny.weights(model)
    tiny.backward(model, 0)
    assert tiny.moved(before, model) == set()
    assert all(p.grad is not None for p in model.parameters())


def test_model_optimizer_and_lisa_are_freed_when_nobody_holds_them() -> None:
    def train() -> list["weakref.ref[object]"]:
        model = tiny.llama()
        optimizer, lisa = attach(model)
        tiny.fit(model, optimizer, 2)
        return [weakref.ref(each) for each in (model, optimizer, lisa, *model.parameters())]

    alive = train()
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


def test_accumulation_in_a_loop_is_refused() -> None:
    model = tiny.llama()
    attach(model)
    tiny.backward(model, 0)
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer\.step\(\); .* lora"):
        tiny.backward(model, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_weights": "int8"}, "codes of frozen weights cannot take a step"),
        ({"in_backward": True}, "would both use the gradients of frozen blocks"),
    ],
)
def test_what_sign_cannot_work_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny.llama(), **options)


def test_float16_and_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    blocks: list[list[nn.Parameter]] = [list(block.parameters()) for block in model.model.layers]
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="cannot round float16"):
        SignCorrection(model.half(), blocks, optimizer, Correction(kind="sign"), seed=0)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ValueError, match="in one process only"):
        SignCorrection(model, blocks, optimizer, Correction(kind="sign"), seed=0)


@pytest.mark.parametrize(
    ("method", "optimizer", "run", "message"),
    [
        ({}, {}, {"accumulation": 2}, r"run\.accumulation=2 is impossible"),
        ({}, {"max_grad_norm": 1.0}, {}, r"optimizer\.max_grad_norm=1\.0; set it to null"),
        ({}, {"in_backward": True}, {}, r"set optimizer\.in_backward: false"),
        ({"frozen_weights": "int8"}, {}, {}, r"set method\.frozen_weights: exact, or"),
        ({"correction_share": 0}, {}, {}, r"method\.correction_share must be > 0 and finite, got 0"),
        ({"correction_rank": 4}, {}, {}, r"method\.correction_rank does nothing with .* sign; .* lora$"),
    ],
)
def test_recipes_that_cannot_work_are_refused_as_they_are_read(
    method: dict[str, Any], optimizer: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    def read(method: dict[str, Any], optimizer: dict[str, Any], run: dict[str, Any]) -> Recipe:
        return Recipe(
            model=ModelConfig(name="none"),
            data=DataConfig(train="none"),
            method=METHODS["lisa"](correction="sign", **method),
            optimizer=OptimizerConfig(**{"max_grad_norm": None, **optimizer}),
            run=RunConfig(**run),
        )

    read({}, {}, {})
    with pytest.raises(ValueError, match=message):
        read(method, optimizer, run)
