"""`ends: rows`: an untied embedding trains by the rows that a step reads, under LISA."""

import io
from typing import Any

import pytest
import torch
from torch import nn

import lisatune.memory.plan
import tiny
from lisatune import LISA, AdamW, find_layers, param_groups
from lisatune.lisa.ends import EndsPolicy
from lisatune.lisa.proof import has_reason_to_move
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods import Lisa
from lisatune.methods.step import TrainingStep
from lisatune.optim.meter import state_elements
from lisatune.recipe import DataConfig, ModelConfig, Recipe, RunConfig

EMBEDDING = "model.embed_tokens.weight"
PERIOD = 3


def start(ends: str = "rows", seed: int = 0, **options: Any) -> tuple[nn.Module, AdamW, LISA]:
    model = tiny.llama(seed=seed)
    optimizer = AdamW(param_groups(model, find_layers(model), ends=ends), lr=1e-2, weight_decay=0)
    lisa = LISA(model, optimizer, ends=ends, **{"period": PERIOD, "verify": "full", **options})
    return model, optimizer, lisa


@pytest.mark.parametrize("verify", ["full", "sample"])
@pytest.mark.parametrize("ends", ["rows", "every:2+rows", "rows+factored"])
def test_rows_that_no_step_reads_never_move(ends: str, verify: str) -> None:
    model, optimizer, lisa = start(ends, verify=verify)
    before, read = tiny.weights(model), set()
    for step in range(4 * PERIOD):
        if lisa.ends_train:
            read |= set(tiny.tokens(step)[:, :-1].flatten().tolist())  # the last has no loss
        tiny.fit(model, optimizer, range(step, step + 1))
    moved = (model.get_parameter(EMBEDDING) != before[EMBEDDING]).any(dim=1).nonzero().flatten().tolist()
    assert set(moved) == read < set(range(tiny.VOCABULARY))
    assert lisa.periods_proven == 4


def test_gradient_and_state_are_those_of_the_rows_of_a_step_and_start_anew_at_a_draw() -> None:
    model, optimizer, _ = start(period=4)
    weight = model.get_parameter(EMBEDDING)
    others = sum(p.numel() for p in model.parameters() if p.requires_grad and p is not weight)
    for step in range(4):
        assert weight not in optimizer.state or step
        tiny.backward(model, step)
        assert weight.grad is not None
        assert weight.grad._nnz() == len(set(tiny.tokens(step).flatten().tolist()))
        elements = []
        handle = optimizer.register_step_post_hook(
            lambda *_, seen=elements: seen.append(state_elements(optimizer))
        )
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
        optimizer.step()
        handle.remove()
        optimizer.zero_grad()
        assert elements == [2 * others + 2 * tiny.tokens(0).numel() * weight.shape[1]]
    assert weight not in optimizer.state


@pytest.mark.parametrize("state", ["drop", "reset", "cpu", "keep"])
@pytest.mark.parametrize("ends", ["rows", "every:2+rows"])
def test_resume_is_bit_equal_in_every_period(ends: str, state: str) -> None:
    def save(step: int) -> None:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        if step in (3, 5, 7):
            saves[step] = file.getvalue()

    saves: dict[int, bytes] = {}
    model, optimizer, _ = start(ends, state=state)
    tiny.fit(model, optimizer, 11, after=save)
    for step, kept in saves.items():
        resumed, again, _ = start(ends, seed=1, state=state)
        for each, saved in zip((resumed, again), torch.load(io.BytesIO(kept)), strict=True):
            each.load_state_dict(saved)
        tiny.fit(resumed, again, range(step, 11))
        tiny.assert_same_weights(resumed, model)


def test_what_has_no_rows_of_its_own_is_refused_in_one_sentence() -> None:
    tied = tiny.llama(tied=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM ties it to the head"):
        param_groups(tied, find_layers(tied), ends="rows")
    for text, complaint in (
        ("head+rows", "head freezes the embedding, and rows trains rows of it"),
        ("frozen+rows", "so rows does nothing; write frozen alone"),
        ("rows+rows", "says twice which rows of the embedding train"),
    ):
        with pytest.raises(ValueError, match=complaint):
            EndsPolicy.parse(text)
    model = tiny.llama()
    groups = param_groups(model, find_layers(model), ends="rows")
    with pytest.raises(ValueError, match="the ends' state as ends 'train' says"):
        LISA(model, AdamW(groups))
    with pytest.raises(ValueError, match="the ends' state as ends 'rows' says"):
        LISA(model, AdamW(model.parameters()), ends="rows")


def test_detach_gives_the_embedding_its_dense_gradient_back() -> None:
    model, _, lisa = start()
    assert model.get_submodule("model.embed_tokens").sparse
    lisa.detach()
    tiny.backward(model, 0)
    assert not model.get_parameter(EMBEDDING).grad.is_sparse


def test_rows_are_clipped_with_all_other_gradients() -> None:
    (model, optimizer, _), dense = start(), tiny.llama()
    twin = torch.optim.AdamW(dense.parameters())
    LISA(dense, twin, period=PERIOD)
    norms = []
    for each, own in ((model, optimizer), (dense, twin)):
        tiny.backward(each, 0)
        step = TrainingStep(
            model=each, loss=CausalLMLoss(each), optimizer=own, device=torch.device("cpu"), max_grad_norm=0.1
        )
        norms.append(step.clip())
    torch.testing.assert_close(*norms)
    assert norms[0] > 0.1
    rows = model.get_parameter(EMBEDDING).grad
    torch.testing.assert_close(rows.to_dense(), dense.get_parameter(EMBEDDING).grad)


@pytest.mark.parametrize("sample", [None, 0, 1, 2, 3])
def test_sparse_gradients_are_reasons_to_move_where_dense_ones_are(sample: int | None) -> None:
    for ids in ([3, 3, 40], [100], list(range(128))):
        weight = nn.Parameter(torch.full((128, 32), 0.1))
        rates = {weight: 1e-2}
        verdicts = []
        for is_sparse in (True, False):
            weight.grad = None
            nn.functional.embedding(torch.tensor(ids), weight, sparse=is_sparse).sum().backward()
            verdicts.append(has_reason_to_move([weight], rates, sample=sample))
        assert verdicts[0] == verdicts[1]
        assert verdicts[0] or sample is not None


@pytest.mark.parametrize(("accumulation", "rows"), [(1, 16), (2, 32), (5, 80), (20, 128)])
def test_plan_reserves_a_row_for_each_token_of_a_step(accumulation: int, rows: int) -> None:
    """Of 128 rows: `rows` of gradient, and `rows` of both moments with 24 bytes of their table."""

    def plan(ends: str) -> lisatune.memory.plan.MemoryPlan:
        recipe = Recipe(
            model=ModelConfig(name="x"),
            data=DataConfig(train="x", max_length=8),
            method=Lisa(ends=ends, active=1),
            run=RunConfig(precision="fp32", batch_size=2, steps=20, accumulation=accumulation, device="cpu"),
        )
        return lisatune.memory.plan.plan_memory(recipe, config=tiny.llama(blocks=2).config)

    sparse, dense = plan("rows"), plan("train")
    assert sparse.kind == "traced", sparse.note
    assert sparse.at_peak["weights"] == dense.at_peak["weights"]
    width = tiny.llama().config.hidden_size
    less = dense.static_bytes - sparse.static_bytes
    assert less == 8 * width * (128 - rows) - 24 * rows + 4  # no step counter
