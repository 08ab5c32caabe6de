"""What only an accelerator can prove: memory that comes back, moments on the host, a real loss scaler."""

import pytest
import torch

import tiny
from lisatune import LISA, build_adamw, find_layers
from lisatune.nn.coded import coded_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fit_on(device: str, steps: int, **options: object) -> tuple[torch.nn.Module, LISA]:
    model = tiny.llama().to(device)
    optimizer = build_adamw(model, find_layers(model), lr=1e-3)
    lisa = LISA(model, optimizer, **{"active": 2, "period": 3, "verify": "full", **options})
    for step in range(steps):
        ids = tiny.tokens(step).to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, lisa


@pytest.mark.parametrize("state", ["drop", "reset", "cpu", "keep"])
def test_every_state_policy_trains_and_proves_on_the_device(state: str) -> None:
    _, lisa = fit_on("cuda", 10, state=state)
    assert lisa.periods_proven == 3


def test_allocated_memory_does_not_grow_from_pass_to_pass() -> None:
    allocated = []
    for steps in (9, 18):  # one pass over the six blocks, and two
        model, lisa = fit_on("cuda", steps)
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        lisa.detach()
        del model, lisa
        torch.cuda.empty_cache()
    assert allocated[1] <= allocated[0]


def test_host_state_trains_like_kept_state() -> None:
    host, _ = fit_on("cuda", 20, state="cpu")
    kept, _ = fit_on("cuda", 20, state="keep")
    tiny.assert_same_weights(host, kept)


def test_draws_are_those_of_the_cpu() -> None:
    assert fit_on("cuda", 8)[1].active_blocks == fit_on("cpu", 8)[1].active_blocks


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_frozen_weights_leave_the_device_and_come_back_from_pinned_memory(bits: str) -> None:
    if bits == "nf4":
        pytest.importorskip("bitsandbytes")
    model, lisa = fit_on("cuda", 8, frozen_weights=bits)
    assert lisa.periods_proven == 2
    coded = coded_weights(model)
    assert len(coded) == 4 * 7
    assert all(weight.exact().is_pinned() for weight in coded.values())
    assert all(tensor.is_cuda for weight in coded.values() for tensor in weight.codes.values())
    lisa.detach()
    tiny.assert_same_weights(model, fit_on("cuda", 8, frozen_weights=bits)[0])
