"""SophiaG against a twin that reads like the paper's algorithm 3, and the labels that its estimate needs."""

import math

import pytest
import torch
from torch import Tensor, nn

import tiny
from lisatune import LISA
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods.sampled_labels import SophiaStep, draw
from lisatune.optim.sophia import SophiaG

LR, BETA1, BETA2, RHO, DECAY, EVERY = 0.01, 0.965, 0.99, 0.04, 0.1, 3


def paper(
    theta: list[float], grads: list[list[float]], estimates: list[list[float]], labels: int
) -> list[float]:
    """Algorithm 3 element by element, with the first estimate taken whole."""
    theta, moment, h = list(theta), [0.0] * len(theta), [math.nan] * len(theta)
    for t, grad in enumerate(grads):
        for i in range(len(theta)):
            if t % EVERY == 0:
                new = labels * estimates[t // EVERY][i] ** 2
                h[i] = new if t == 0 else BETA2 * h[i] + (1 - BETA2) * new
            moment[i] = BETA1 * moment[i] + (1 - BETA1) * grad[i]
            theta[i] -= LR * DECAY * theta[i]
            theta[i] -= LR * math.copysign(min(abs(moment[i]) / max(RHO * h[i], 1e-15), 1), moment[i])
    return theta


def test_steps_are_the_papers() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=rng, dtype=torch.float64)
    grads = torch.randn(8, 5, generator=rng, dtype=torch.float64)
    estimates = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    optimizer = SophiaG([p], lr=LR, betas=(BETA1, BETA2), rho=RHO, weight_decay=DECAY, every=EVERY)
    for t, grad in enumerate(grads):
        assert optimizer.wants_estimate == (t % EVERY == 0)
        if optimizer.wants_estimate:
            p.grad = estimates[t // EVERY].clone()
            optimizer.update_hessian(7)
        p.grad = grad.clone()
        optimizer.step()
    expected = paper(start.tolist(), grads.tolist(), estimates.tolist(), 7)
    assert torch.allclose(p.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_labels_are_drawn_from_softmax_and_from_the_generator_alone() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    before = torch.get_rng_state()
    drawn = draw(logits.expand(40_000, 4), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert torch.allclose(shares, logits.softmax(0), atol=0.01)
    again = draw(logits.expand(40_000, 4), torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def make_step(model: nn.Module, optimizer: SophiaG) -> SophiaStep:
    return SophiaStep(
        model=model,
        loss=CausalLMLoss(model),
        optimizer=optimizer,
        device=torch.device("cpu"),
        max_grad_norm=None,
    )


def make_batch(step: int = 0) -> dict[str, Tensor]:
    ids = tiny.tokens(step, length=16)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(16).expand(2, -1)}


def test_the_estimate_is_the_square_of_the_gradient_on_labels_that_the_model_drew() -> None:
    model = tiny.llama(tied=True)
    optimizer = SophiaG(model.parameters(), every=2)
    step, batch = make_step(model, optimizer), make_batch()
    drawn = step._draw_labels(batch, 0)
    assert torch.equal(drawn["labels"] == -100, batch["labels"] == -100)
    assert not torch.equal(drawn["labels"], batch["labels"])
    step.backward([batch])
    gradient = model.lm_head.weight.grad.clone()  # type: ignore[union-attr]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), drawn["labels"][:, 1:].flatten()
    ).backward()
    labels = int((drawn["labels"][:, 1:] != -100).sum())
    estimate = labels * model.lm_head.weight.grad.square()  # type: ignore[union-attr]
    assert torch.allclose(optimizer.state[model.lm_head.weight]["hessian"], estimate, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(gradient, model.lm_head.weight.grad)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_leaves_no_estimate() -> None:
    model = tiny.llama()
    optimizer = SophiaG(model.parameters())
    step = make_step(model, optimizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    step.backward([make_batch()])
    assert not optimizer.state


def test_a_block_that_thaws_gets_an_estimate_before_its_first_step() -> None:
    model = tiny.llama()
    optimizer = SophiaG(model.parameters(), lr=1e-3, every=100)
    with LISA(model, optimizer, active=1, period=2, lr_scaling="none") as lisa:
        step = make_step(model, optimizer)
        for number in range(6):
            (block,) = lisa.active_blocks
            weight = model.model.layers[block].mlp.up_proj.weight
            before = weight.detach().clone()
            step.backward([make_batch(number)])
            assert "hessian" in optimizer.state[weight]
            step.update()
            moved = (weight.detach() - before).abs()
            assert float(moved.max()) <= 1e-3 * (1 + 1e-4)
            assert float((moved > 0.99e-3).float().mean()) < 1, "not every element steps by lr"


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"rho": 0}, {"betas": (1.0, 0.9)}, {"every": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of SophiaG is out of range, got"):
        SophiaG([nn.Parameter(torch.zeros(2))], **wrong)  # type: ignore[arg-type]
