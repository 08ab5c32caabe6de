"""Policies of the ends: what they say; which parameters have gradients, state and motion in each period."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from lisatune import LISA, AdamW, ProofError, build_adamw, find_layers, param_groups
from lisatune.lisa.ends import EndsPolicy
from lisatune.methods import Lisa
from lisatune.recipe import OptimizerConfig

PERIOD = 3
STATES = ("drop", "reset", "cpu", "keep")


def attach(model: nn.Module, ends: str, **options: Any) -> tuple[Optimizer, LISA]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return optimizer, LISA(
        model, optimizer, **{"active": 2, "period": PERIOD, "verify": "full", "ends": ends, **options}
    )


def block_names(lisa: LISA, model: nn.Module) -> set[str]:
    """Parameter names of the active blocks."""
    blocks = lisa.layers.block_parameters(model)
    return {name for i in lisa.active_blocks for name in blocks[i]}


def names_of(model: nn.Module, parameters: Any) -> set[str]:
    chosen = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


# ---- the text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("train", EndsPolicy()),
        ("frozen", EndsPolicy(trains="none")),
        ("head", EndsPolicy(trains="head")),
        ("every:5", EndsPolicy(every=5)),
        ("every:1", EndsPolicy()),
        ("8bit", EndsPolicy(moments="8bit")),
        ("train+factored", EndsPolicy(moments="factored")),
        ("rows:5-6", EndsPolicy(trains="rows", span=(5, 6))),
        ("every:3 + head+ cpu+8bit", EndsPolicy(trains="head", every=3, moments="8bit", state_device="cpu")),
    ],
)
def test_text_and_policy_are_the_same(text: str, policy: EndsPolicy) -> None:
    assert EndsPolicy.parse(text) == policy
    assert EndsPolicy.parse(str(policy)) == policy
    assert EndsPolicy.parse(policy) is policy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there is no ''"),
        ("heads", "there is no 'heads'"),
        ("every", "every:M needs a number of periods M >= 1, got ''"),
        ("every:0", "every:M needs a number of periods M >= 1, got '0'"),
        ("every:-2", "got '-2'"),
        ("every:1.5", "got '1.5'"),
        ("8bit:2", "there is no '8bit:2'"),
        ("train+head", "says twice which ends train: train and head"),
        ("head+frozen", "says twice which ends train: head and frozen"),
        ("train+every:2", "says twice when they train: train and every:2"),
        ("every:2+every:3", "says twice when they train"),
        ("8bit+factored", "says twice how moments are stored: 8bit and factored"),
        ("cpu+cpu", "says twice where moments are"),
        ("rows:6-5", "rows:A-B needs two row numbers A <= B, got '6-5'"),
        ("rows:", "rows:A-B needs two row numbers A <= B, got ''"),
        ("rows:5-6+head", "says twice which ends train: rows:5-6 and head"),
        ("rows:5-6+8bit", "trains in every step, so 8bit does nothing; write rows:A-B alone"),
        ("frozen+8bit", "so 8bit does nothing; write frozen alone"),
        ("every:2+frozen", "so every:2 does nothing; write frozen alone"),
    ],
)
def test_contradictions_and_unknown_words_are_refused_in_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^ends ") as caught:
        EndsPolicy.parse(text)
    assert complaint in str(caught.value)
    with pytest.raises(ValueError, match=r"^method\.ends ") as caught:
        Lisa(ends=text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"every": 0}, "every of an EndsPolicy must be >= 1 periods, got 0"),
        ({"trains": "heads"}, "must be all, head, none, or rows with a span, got 'heads'"),
        ({"trains": "rows"}, "got 'rows' with span None"),
        ({"span": (1, 2)}, "got 'all' with span (1, 2)"),
    ],
)
def test_fields_that_are_no_policy_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        EndsPolicy(**fields)


# ---- what trains when


@pytest.mark.parametrize(
    ("ends", "state", "tied"),
    [
        *(
            (ends, "drop", tied)
            for ends in ("train", "head", "frozen", "every:2", "every:3", "head+every:2")
            for tied in (True, False)
        ),
        *(("every:2", state, True) for state in STATES[1:]),
    ],
)
def test_gradients_state_and_motion_are_those_of_the_policy_in_each_period(
    ends: str, state: str, tied: bool
) -> None:
    model = tiny.llama(tied=tied)
    optimizer, lisa = attach(model, ends, state=state)
    embedding = "model.embed_tokens.weight"
    trained = set(lisa.layers.ends)
    if "head" in ends and not tied:
        trained.remove(embedding)
    every = int(ends[-1]) if "every" in ends else 1
    for period in range(4):
        wanted = block_names(lisa, model)
        if ends != "frozen" and period % every == 0:
            wanted |= trained
        before = tiny.weights(model)
        for step in range(PERIOD * period, PERIOD * (period + 1)):
            tiny.backward(model, step)
            assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
            assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
            assert names_of(model, lisa.trainable_parameters()) == wanted
            if state != "keep":
                assert names_of(model, optimizer.state) <= wanted
            optimizer.step()
            optimizer.zero_grad()
        assert tiny.moved(before, model) == wanted
    assert lisa.periods_proven == 4


@pytest.mark.parametrize("ends", ["every:2", "head+every:2", "head", "frozen"])
def test_state_is_two_numbers_per_trained_element(untied_llama: nn.Module, ends: str) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=1e-2)
    sizes = []
    optimizer.register_step_post_hook(  # before LISA's
        lambda *_: sizes.append(sum(s["exp_avg"].numel() for s in optimizer.state.values()))
    )
    lisa = LISA(untied_llama, optimizer, period=2, ends=ends)
    expected = []
    for step in range(8):
        expected.append(sum(p.numel() for p in lisa.trainable_parameters()))
        tiny.fit(untied_llama, optimizer, range(step, step + 1))
    assert sizes == expected


def test_moments_of_resting_ends_go_the_way_of_a_frozen_blocks(untied_llama: nn.Module) -> None:
    """Released under drop, kept in host memory under cpu: then the ends go on where they stopped."""
    results = {}
    for state in STATES:
        model = copy.deepcopy(untied_llama)
        tiny.fit(model, attach(model, "every:2", state=state, active=6)[0], 9)
        results[state] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(results["cpu"], results["keep"])
    assert not torch.equal(results["drop"], results["keep"])


def test_all_blocks_and_every_period_is_full_fine_tuning(tied_llama: nn.Module) -> None:
    full = copy.deepcopy(tied_llama)
    tiny.fit(tied_llama, attach(tied_llama, "every:1", active=6)[0], 7)
    tiny.fit(full, torch.optim.AdamW(full.parameters(), lr=1e-2, weight_decay=0.1), 7)
    tiny.assert_same_weights(tied_llama, full)


def test_all_blocks_with_resting_ends_is_full_fine_tuning_that_freezes_the_ends_in_between(
    tied_llama: nn.Module,
) -> None:
    full = copy.deepcopy(tied_llama)
    tiny.fit(tied_llama, attach(tied_llama, "every:3", active=6, state="keep")[0], 5 * PERIOD)
    twin = torch.optim.AdamW(full.parameters(), lr=1e-2, weight_decay=0.1)
    ends = find_layers(full).end_parameters(full).values()
    for step in range(5 * PERIOD):
        tiny.backward(full, step)
        if step // PERIOD % 3:
            for p in ends:
                p.grad = None
        twin.step()
        twin.zero_grad()
    tiny.assert_same_weights(tied_llama, full)


@pytest.mark.parametrize(("ends", "ramps"), [("every:2", True), ("train", False)])
def test_ends_that_rest_in_between_ramp_when_they_train_again(
    untied_llama: nn.Module, ends: str, ramps: bool
) -> None:
    layers = find_layers(untied_llama)
    optimizer = build_adamw(untied_llama, layers, lr=1e-2)
    lisa = LISA(untied_llama, optimizer, period=4, warmup=3, ends=ends, layers=layers)
    rates = []
    optimizer.register_step_pre_hook(  # after LISA's
        lambda *_: rates.append((lisa.ends_train, optimizer.param_groups[0]["lr"]))
    )
    assert optimizer.param_groups[0]["layer"] == "ends"
    tiny.fit(untied_llama, optimizer, 12)
    trained = [rate for trains, rate in rates if trains]
    wanted = [2.5e-3, 5e-3, 7.5e-3, 1e-2] if ramps else [1e-2] * 4
    assert trained == pytest.approx(wanted * (2 if ramps else 3))
    assert optimizer.param_groups[0]["lr"] == 1e-2


# ---- head


def test_tied_head_trains_by_the_gradient_through_the_head_alone(tied_llama: nn.Module) -> None:
    """The gradient of W in loss(E, W), E = W being held constant: that of the head of an untied twin."""
    twin = tiny.llama(tied=False)
    state = dict(tied_llama.state_dict())
    twin.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    attach(tied_llama, "head")
    tiny.backward(tied_llama, 0)
    tiny.backward(twin, 0)
    torch.testing.assert_close(tied_llama.lm_head.weight.grad, twin.lm_head.weight.grad, rtol=0, atol=0)
    both = twin.lm_head.weight.grad + twin.model.embed_tokens.weight.grad
    assert not torch.allclose(tied_llama.lm_head.weight.grad, both)


@pytest.mark.parametrize("tied", [True, False])
def test_detach_takes_every_hook_off_the_model(tied: bool) -> None:
    model = tiny.llama(tied=tied)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    _, lisa = attach(model, "head")
    lisa.detach()
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    tiny.backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())


def test_refused_lisa_leaves_no_hook_behind(tied_llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"must store the ends' state as ends 'head.8bit' says"):
        attach(tied_llama, "head+8bit")
    assert not tied_llama.model.embed_tokens._forward_hooks


def test_head_freezes_embeddings_of_positions_too() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=3, n_embd=32, n_head=4, vocab_size=128, n_positions=32)
    model = AutoModelForCausalLM.from_config(config)
    _, lisa = attach(model, "head")
    ends = names_of(model, lisa.trainable_parameters()) & set(lisa.layers.ends)
    assert ends == {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}


class OwnModel(nn.Module):
    """A model that doesn't tell where its embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


def test_head_of_a_model_whose_embedding_is_unknown_is_refused() -> None:
    model = OwnModel()
    layers = find_layers(model, blocks="blocks")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="ends 'head' needs the input embedding of OwnModel"):
        LISA(model, optimizer, active=1, ends="head", layers=layers)
    LISA(model, optimizer, active=1, ends="every:2", layers=layers)


# ---- proof


def test_ends_that_move_while_they_should_rest_are_found(untied_llama: nn.Module) -> None:
    optimizer, _ = attach(untied_llama, "every:2")
    tiny.fit(untied_llama, optimizer, 5)
    with torch.no_grad():
        untied_llama.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(ProofError, match="period 1: frozen weights moved in ends"):
        tiny.fit(untied_llama, optimizer, range(5, 6))


def test_embedding_that_moves_under_head_is_found(untied_llama: nn.Module) -> None:
    optimizer, _ = attach(untied_llama, "head")
    tiny.fit(untied_llama, optimizer, 1)
    with torch.no_grad():
        untied_llama.model.embed_tokens.weight[3, 4] += 1e-3
    with pytest.raises(ProofError, match="period 0: frozen weights moved in frozen part"):
        tiny.fit(untied_llama, optimizer, range(1, 3))


def test_ends_that_rest_while_they_should_train_are_found(untied_llama: nn.Module) -> None:
    optimizer, lisa = attach(untied_llama, "every:2")
    tiny.fit(untied_llama, optimizer, 6)
    with pytest.raises(ProofError, match="period 2: drawn but not trained: ends"):  # noqa: PT012
        for step in range(6, 9):
            tiny.backward(untied_llama, step)
            for p in lisa.layers.end_parameters(untied_llama).values():
                p.grad = None
            optimizer.step()
            optimizer.zero_grad()


# ---- resume


class Run:
    def __init__(self, ends: str, state: str, seed: int = 0) -> None:
        self.model = tiny.llama(tied=True, seed=seed)
        layers = find_layers(self.model)
        self.optimizer = build_adamw(self.model, layers, lr=1e-2)
        self.lisa = LISA(
            self.model, self.optimizer, period=PERIOD, ends=ends, state=state, warmup=1, verify="full"
        )

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        weights, state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("ends", "state"), [("head", "drop"), ("head+every:3", "drop"), *(("every:2", state) for state in STATES)]
)
def test_resume_is_bit_equal_in_every_period(ends: str, state: str) -> None:
    run = Run(ends, state)
    saves: dict[int, bytes] = {}

    def after(step: int) -> None:
        if step in (3, 4, 8):  # at a draw, where the ends rest, and where some train again
            saves[step] = run.save()

    tiny.fit(run.model, run.optimizer, 11, after=after)
    for step, saved in saves.items():
        resumed = Run(ends, state, seed=1)
        resumed.load(saved)
        flags = {name for name, p in resumed.model.named_parameters() if p.requires_grad}
        assert flags == names_of(resumed.model, resumed.lisa.trainable_parameters())
        tiny.fit(resumed.model, resumed.optimizer, range(step, 11))
        tiny.assert_same_weights(resumed.model, run.model)
        assert resumed.lisa.periods_proven == run.lisa.periods_proven


# ---- some rows alone


def build_rows(model: nn.Module, ends: str = "rows:5-6", **options: Any) -> tuple[AdamW, LISA]:
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=ends, weight_decay=0.1), lr=1e-2)
    how = {"active": 2, "period": PERIOD, "verify": "full", **options}
    return optimizer, LISA(model, optimizer, ends=ends, **how)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_of_embedding_and_head_only_the_rows_named_move_and_have_state(
    tied: bool, precision: torch.dtype
) -> None:
    model = tiny.llama(tied=tied).to(precision)
    before = tiny.weights(model)
    first = int(tiny.tokens(0).min())  # a row that is read
    optimizer, lisa = build_rows(model, f"rows:{first}-{first + 1}")
    for step in range(2 * PERIOD):
        for part in range(2):  # micro-steps
            tiny.backward(model, 2 * step + part)
        optimizer.step()
        optimizer.zero_grad()
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert tiny.moved(before, model) - block_names_of_all(lisa, model) == ends
    for name in ends:
        weight = model.get_parameter(name)
        moved = (weight != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert moved == [first, first + 1][: len(moved)]
        assert len(moved) == 2 or name == "model.embed_tokens.weight"
        assert optimizer.state[weight]["exp_avg"].shape == (2, weight.shape[1])
    assert lisa.periods_proven == 2
    assert lisa.idle_row_numbers == sum(before[name].numel() - 2 * before[name].shape[1] for name in ends)


def block_names_of_all(lisa: LISA, model: nn.Module) -> set[str]:
    return {name for block in lisa.layers.block_parameters(model) for name in block}


def test_rows_named_train_as_adamw_trains_them(untied_llama: nn.Module) -> None:
    """As one whose gradients are zero but for these rows."""
    other = copy.deepcopy(untied_llama)
    optimizer = torch.optim.AdamW([other.lm_head.weight, other.model.embed_tokens.weight], lr=1e-2)
    other.requires_grad_(False)
    ours, _ = build_rows(untied_llama, active=1, verify="off")
    for group in ours.param_groups:
        group["weight_decay"] = 0.0 if group["rows"] else group["weight_decay"]
        group["lr"] = 1e-2 if group["rows"] else 0.0
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for p in group["params"]:
            p.requires_grad_(True)
            p.register_hook(lambda grad: grad * row_mask(grad))
    tiny.fit(untied_llama, ours, 4)
    tiny.fit(other, optimizer, 4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(untied_llama.get_parameter(name), other.get_parameter(name))


def row_mask(grad: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(len(grad), 1)
    mask[5:7] = 1
    return mask


def test_another_row_that_moves_is_found(untied_llama: nn.Module) -> None:
    optimizer, _ = build_rows(untied_llama)
    tiny.fit(untied_llama, optimizer, 1)
    with torch.no_grad():
        untied_llama.lm_head.weight[7] += 1  # type: ignore[operator, index, union-attr]
    with pytest.raises(ProofError, match="frozen part"):
        tiny.fit(untied_llama, optimizer, range(1, PERIOD))


def test_rows_that_are_not_there_are_refused(untied_llama: nn.Module) -> None:
    rows = len(untied_llama.get_parameter("lm_head.weight"))
    with pytest.raises(ValueError, match=rf"ends 'rows:5-{rows}': lm_head.weight has {rows} rows \(from 0\)"):
        build_rows(untied_llama, f"rows:5-{rows}")
    other = AdamW(param_groups(untied_llama, find_layers(untied_llama), ends="rows:5-7"))
    with pytest.raises(ValueError, match=r"says? rows=True and span=\(5, 7\)|span=\(5, 7\)"):
        LISA(untied_llama, other, ends="rows:5-6")


# ---- state formats are the optimizer's


@pytest.mark.parametrize("ends", ["8bit", "factored", "cpu", "head+8bit+cpu"])
def test_optimizer_that_stores_the_ends_otherwise_is_refused(untied_llama: nn.Module, ends: str) -> None:
    with pytest.raises(ValueError, match=rf"build it as lisatune.AdamW\(.*ends='{ends}'".replace("+", r"\+")):
        attach(untied_llama, ends)


def test_groups_that_another_optimizer_would_not_read_are_refused(untied_llama: nn.Module) -> None:
    groups = param_groups(untied_llama, find_layers(untied_llama), ends="8bit")
    with pytest.raises(ValueError, match="the ends' state as ends '8bit' says"):
        LISA(untied_llama, torch.optim.AdamW(groups), ends="8bit")


def test_groups_of_an_embedding_that_never_trains_are_not_looked_at(untied_llama: nn.Module) -> None:
    groups = param_groups(untied_llama, find_layers(untied_llama), weight_decay=0.1, ends="head+8bit")
    embedding = [group for group in groups if group["params"][0][0] == "model.embed_tokens.weight"]
    assert len(embedding) == 1
    embedding[0]["moments"] = "fp32"
    name, norm = embedding[0]["params"].pop()
    groups.append({"params": [(name, norm)], "weight_decay": 0.0, "layer": "ends", "moments": "8bit"})
    LISA(untied_llama, AdamW(groups), ends="head+8bit")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_moments_in_host_memory_change_nothing(precision: torch.dtype) -> None:
    models = [tiny.llama(tied=True).to(precision) for _ in range(2)]
    for model, ends in zip(models, ("every:2", "every:2+cpu"), strict=True):
        optimizer = AdamW(param_groups(model, find_layers(model), ends=ends), lr=1e-2)
        tiny.fit(model, optimizer, 2)  # as full fine-tuning
        LISA(model, optimizer, period=PERIOD, ends=ends, verify="full")
        tiny.fit(model, optimizer, range(2, 12))
    tiny.assert_same_weights(*models)


@pytest.mark.parametrize("ends", ["8bit", "factored", "head+factored", "every:2+8bit"])
def test_compact_state_is_that_of_the_ends_alone(ends: str) -> None:
    model = tiny.llama(tied=False, hidden=64)
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=ends), lr=1e-2)
    in_step: list[dict[str, dict[str, tuple[int, torch.dtype]]]] = []
    named = {p: name for name, p in model.named_parameters()}
    optimizer.register_step_post_hook(  # before LISA's
        lambda *_: in_step.append(
            {
                named[p]: {key: (value.numel(), value.dtype) for key, value in entry.items()}
                for p, entry in optimizer.state.items()
            }
        )
    )
    lisa = LISA(model, optimizer, period=1, ends=ends, verify="full", layers=layers)
    tiny.fit(model, optimizer, 3)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name, entry in in_step[2].items():
        if name not in layers.ends:
            assert entry["exp_avg"] == entry["exp_avg_sq"] == (sizes[name], torch.float32)
    head = in_step[2]["lm_head.weight"]
    if "8bit" in ends:
        assert head["exp_avg_codes"] == head["exp_avg_sq_codes"] == (128 * 64, torch.uint8)
        assert "exp_avg" not in head
    else:
        assert head["exp_avg_sq_rows"][0] + head["exp_avg_sq_columns"][0] == 128 + 64
        assert set(head) == {"step", "exp_avg_sq_rows", "exp_avg_sq_columns"}
    assert ("model.embed_tokens.weight" in in_step[2]) == ("head" not in ends)
    assert ("lm_head.weight" in in_step[1]) == ("every" not in ends)
    assert lisa.periods_proven == 3


@pytest.mark.parametrize("ends", ["train", "head", "every:2", "every:2+8bit+cpu", "factored"])
def test_recipe_builds_the_optimizer_that_its_policy_needs(untied_llama: nn.Module, ends: str) -> None:
    method, layers = Lisa(ends=ends, period=2), find_layers(untied_llama)
    optimizer = method.build_optimizer(untied_llama, layers, OptimizerConfig())
    needs_own = any(word in ends for word in ("8bit", "cpu", "factored"))
    assert isinstance(optimizer, AdamW) == needs_own
    lisa = method.attach(untied_llama, optimizer, layers, total_steps=8)
    tiny.fit(untied_llama, optimizer, 4)
    assert lisa.periods_proven == 2
