"""Where nothing before the blocks trains, nothing below the lowest active block is recorded for backward."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from lisatune import LISA
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.nn.blocks import enable_activation_checkpointing

ACTIVE = (3, 5)
LOWEST_TWO = (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)


def attach(model: nn.Module, ends: str, **options: Any) -> tuple[torch.optim.Optimizer, LISA]:
    """Train blocks 3 and 5 of 6."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, period=1, sampler=LOWEST_TWO, ends=ends, verify="full", **options)
    assert lisa.active_blocks == ACTIVE
    return optimizer, lisa


class Held:
    """A tensor that autograd keeps for backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Recorder:
    """Counts what autograd keeps of each block, and notes which blocks' outputs have a graph."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[weakref.WeakSet[Held]] = [weakref.WeakSet() for _ in model.model.layers]
        self.has_graph: list[bool] = []
        self._block: int | None = None
        for i, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(lambda *_, i=i: setattr(self, "_block", i))
            block.register_forward_hook(self._after)

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        self.has_graph.append(hidden.grad_fn is not None)
        self._block = None

    def pack(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        if self._block is not None:
            self._held[self._block].add(held)
        return held

    def unpack(self, held: Held) -> Tensor:
        return held.tensor

    def count(self) -> None:
        self.saved = [len(held) for held in self._held]


def record(model: nn.Module) -> Recorder:
    model_loss = CausalLMLoss(model)
    recorder = Recorder(model)
    ids = tiny.tokens(0)
    with torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        loss, _ = model_loss({"input_ids": ids, "labels": ids, "position_ids": positions})
    recorder.count()
    loss.backward()
    return recorder


@pytest.mark.parametrize("ends", ["frozen", "head", "every:2"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_recorded_below_the_lowest_active_block(ends: str, tied: bool) -> None:
    model = tiny.llama(tied=tied)
    optimizer, lisa = attach(model, ends)
    if ends == "every:2":
        tiny.fit(model, optimizer, 1)  # on to a period in which the ends rest
        assert not lisa.ends_train
    recorder = record(model)
    assert recorder.has_graph == [False, False, False, True, True, True]
    assert recorder.saved[:3] == [0, 0, 0]
    assert min(recorder.saved[3:]) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embedding_has_everything_recorded(tied: bool) -> None:
    model = tiny.llama(tied=tied)
    attach(model, "train")
    recorder = record(model)
    assert recorder.has_graph == [True] * 6
    assert min(recorder.saved) > 0


@pytest.mark.parametrize("ends", ["frozen", "head"])
@pytest.mark.parametrize("tied", [True, False])
def test_recomputation_of_activations_keeps_the_cut(ends: str, tied: bool) -> None:
    model = tiny.llama(tied=tied)
    enable_activation_checkpointing(model)
    model.train()
    attach(model, ends)
    runs = [0] * 6
    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    recorder = record(model)
    assert recorder.has_graph[:6] == [False, False, False, True, True, True]
    assert recorder.saved[:3] == [0, 0, 0]
    assert min(recorder.saved[3:]) > 0
    assert [times - runs[0] for times in runs] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ends", ["frozen", "head"])
def test_gradients_are_those_of_a_graph_over_everything(ends: str, checkpointing: bool) -> None:
    model = tiny.llama(tied=False)
    plain = copy.deepcopy(model)
    if checkpointing:
        enable_activation_checkpointing(model)
    model.train()
    _, lisa = attach(model, ends)
    for each in (model, plain):
        tiny.backward(each, 0)
    trained = set(lisa.trainable_parameters())
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is not None) == (mine in trained)
        if mine in trained:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpointing_of_either_kind_keeps_the_gradients_under_head(
    tied: bool, reentrant: bool, before: bool
) -> None:
    """The reentrant one needs an input that requires grad, or gradients of all blocks were lost."""
    model = tiny.llama(tied=tied)
    plain = copy.deepcopy(model)
    attach(plain, "head")
    tiny.backward(plain, 0)
    model.train()
    if before:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    attach(model, "head")
    if not before:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    tiny.backward(model, 0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.equal(mine.grad, theirs.grad)


def test_learned_positions_do_not_hold_the_graph_open_under_head() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=6, n_embd=32, n_head=4, vocab_size=128, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    attach(model, "head")
    has_graph: list[bool] = []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda module, args, output: has_graph.append(
                (output if isinstance(output, Tensor) else output[0]).grad_fn is not None
            )
        )
    model(input_ids=tiny.tokens(0))
    assert has_graph == [False, False, False, True, True, True]
