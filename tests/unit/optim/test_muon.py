"""Muon and AdamW as one optimizer do what torch's two do side by side."""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import tiny
from lisatune import LISA
from lisatune.methods.optimizers import build_from_groups
from lisatune.optim.muon import MuonWithAdamW
from lisatune.recipe import OptimizerConfig


def test_weights_are_those_of_torchs_two_optimizers_side_by_side() -> None:
    model, twin = tiny.llama(), tiny.llama()
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    groups = [
        {"params": [(n, p) for n, p in named.items() if (".layers." in n) == inside], "layer": layer}
        for inside, layer in ((False, "ends"), (True, "block 0"))
    ]
    optimizer = build_from_groups(groups, OptimizerConfig(name="muon", lr=1e-3, options={"momentum": 0.9}))
    theirs = dict(twin.named_parameters())
    pair = (
        torch.optim.Muon(
            [theirs[n] for n in matrices],
            lr=1e-3,
            momentum=0.9,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([p for n, p in theirs.items() if n not in matrices], lr=1e-3, weight_decay=0.0),
    )
    for step in range(4):
        tiny.backward(model, step)
        tiny.backward(twin, step)
        optimizer.step()
        optimizer.zero_grad()
        for each in pair:
            each.step()
            each.zero_grad()
        if step == 1:  # loading replaces groups and state
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tiny.assert_same_weights(model, twin)
    assert set(optimizer.state[named[matrices[0]]]) == {"momentum_buffer"}


def test_hooks_see_one_step_and_a_closure_runs_once() -> None:
    model = tiny.llama()
    groups = [{"params": [*model.model.layers.parameters()][:1], "matrices": True}]
    groups.append({"params": [model.model.norm.weight]})
    optimizer = MuonWithAdamW(groups, lr=1e-3)
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("hook"))
    try:
        assert optimizer.step(lambda: calls.append("closure") or 3.0) == 3.0
    finally:
        handle.remove()
    assert calls == ["closure", "hook"]


def test_lisa_releases_what_freezes_and_a_vector_cannot_be_a_matrix() -> None:
    model = tiny.llama()
    named = [*model.named_parameters()]
    optimizer = build_from_groups([{"params": named}], OptimizerConfig(name="muon", lr=1e-3))
    with LISA(model, optimizer, active=1, period=2) as lisa:
        tiny.fit(model, optimizer, 7)
        active = {p for block in lisa.active_blocks for p in model.model.layers[block].parameters()}
        blocks = {p for p in model.model.layers.parameters() if p in optimizer.state}
        assert blocks <= active
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        MuonWithAdamW([{"params": [model.model.norm.weight], "matrices": True}], lr=1e-3)
