"""Blocks that recompute or are compiled give the same gradients, and draws compile nothing anew."""

import copy
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

import lisatune
import tiny
from lisatune import LISA, build_adamw, find_layers
from lisatune.nn.blocks import BlockForward, check_compiler, num_graphs

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=128, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM",
    ),
}  # fmt: skip

# torch's compiler looks at the gradient of every input, also of those that are no leaves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

FREEZES = {
    "prefix frozen": ({2}, True, True),
    "only the first": ({0}, True, True),
    "no block": (set(), True, True),
    "only the head": (set(), False, True),
    "embedding frozen": ({1, 3}, False, True),
    "everything": ({0, 1, 2, 3}, True, True),
}
"""Active blocks, whether the embedding trains, whether the head does."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).train()


def is_below(name: str) -> bool:
    """Whether a parameter is an input embedding."""
    return any(part in name for part in ("embed_tokens", "wte", "wpe"))


def freeze(model: nn.Module, active: set[int], embedding: bool, head: bool) -> None:
    model.requires_grad_(False)
    layers = find_layers(model)
    for index in active:
        model.get_submodule(layers.blocks[index]).requires_grad_(True)
    for name, p in layers.end_parameters(model).items():
        p.requires_grad_(embedding if is_below(name) else head)


def run(model: nn.Module, length: int = 24, step: int = 0) -> dict[str, Tensor]:
    ids = tiny.tokens(step, length=length)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    if not loss.requires_grad:
        return {"loss": loss}
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("frozen", FREEZES.values(), ids=FREEZES)
def test_recomputing_gives_the_same_gradients_bit_for_bit(
    family: str, frozen: tuple[set[int], bool, bool]
) -> None:
    model = build(family)
    freeze(model, *frozen)
    want = run(model)
    for checkpointing in ("all", "frozen"):
        with BlockForward(model, find_layers(model), checkpointing=checkpointing):
            got = run(model)
        assert got.keys() == want.keys(), checkpointing
        assert all(torch.equal(got[name], want[name]) for name in want), checkpointing


def count_forwards(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[int]:
    """Count how often modules of a kind run, in backward too."""
    calls, forward = [0], kind.forward

    def counted(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return calls


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_recompute_where_the_loop_leaves_the_cache_on(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers passes a new key-value cache by default, by name or by position."""
    model = build(family)
    ids = tiny.tokens(0, length=24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    layers = find_layers(model)
    calls = count_forwards(monkeypatch, type(model.get_submodule(layers.blocks[0])))
    with BlockForward(model, layers, checkpointing="all"):
        got = gradients()
    assert calls == [2 * layers.num_blocks]
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_cache_that_holds_something_is_used(family: str) -> None:
    model = build(family)
    ids = tiny.tokens(0, length=24)

    def lose() -> Tensor:
        past = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        return model(input_ids=ids[:, 10:], past_key_values=past, labels=ids[:, 10:]).loss

    model.eval()
    want = lose()
    with BlockForward(model, find_layers(model), checkpointing="all"):
        with torch.no_grad():
            past = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        model.train()
        got = model(input_ids=ids[:, 10:], past_key_values=past, labels=ids[:, 10:]).loss
    assert torch.equal(got, want)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of activations that backward keeps, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []  # so that no storage is freed and its address used again
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), pack(t))[1], lambda t: t):
        ids = tiny.tokens(0, length=24)
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_frozen_blocks_store_less_and_active_ones_as_much_as_before(family: str) -> None:
    model, stored = build(family), {}
    freeze(model, {1}, True, True)
    for checkpointing in (None, "frozen", "all"):
        with BlockForward(model, find_layers(model), checkpointing=checkpointing):
            stored[checkpointing] = saved_bytes(model)
    assert stored["all"] < stored["frozen"] < stored[None]
    # Three of four blocks are frozen, so they are most of what recomputing saves.
    assert stored[None] - stored["frozen"] > stored["frozen"] - stored["all"]


def test_which_blocks_recompute_follows_every_draw() -> None:
    model = tiny.llama()
    optimizer = build_adamw(model, find_layers(model), lr=1e-3)
    lisa = LISA(model, optimizer, active=2, period=1)
    twin = tiny.llama()
    its_optimizer = build_adamw(twin, find_layers(twin), lr=1e-3)
    LISA(twin, its_optimizer, active=2, period=1)
    BlockForward(model, lisa.layers, checkpointing="frozen")
    tiny.fit(model, optimizer, 6)
    tiny.fit(twin, its_optimizer, 6)
    tiny.assert_same_weights(model, twin)


@pytest.mark.parametrize(
    ("family", "checkpointing", "backend"),
    [("llama", "frozen", "aot_eager"), ("gemma3", None, "eager"), ("gpt2", "all", "eager")],
)
def test_compiled_blocks_give_the_same_gradients_and_no_draw_compiles_anew(
    family: str, checkpointing: str | None, backend: str
) -> None:
    """Which graphs there are does not depend on the backend. One that traces backward too is slow."""
    model = build(family)
    plain = copy.deepcopy(model)
    names = list(model.state_dict())
    layers = find_layers(model)
    blocks = BlockForward(model, layers, checkpointing=checkpointing, backend=backend)
    below = [p for name, p in layers.end_parameters(model).items() if is_below(name)]
    blocks.warm_up(lambda: run(model, length=40), embedding=below, rests=True)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    built = num_graphs()
    assert built == {"gemma3": 8}.get(family, 4)
    rng = random.Random(0)
    for draw in range(20):
        chosen = (set(rng.sample(range(4), rng.choice([1, 2, 3]))), draw % 3 > 0, True)
        freeze(model, *chosen)
        freeze(plain, *chosen)
        length = rng.choice([16, 32, 64])
        got, want = run(model, length, draw), run(plain, length, draw)
        # Float32 rounding in fused operations.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert num_graphs() == built
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_one_graph_of_forward_and_backward_takes_batches_of_any_length(family: str) -> None:
    model = build(family)
    plain = copy.deepcopy(model)
    BlockForward(model, find_layers(model), backend="aot_eager")
    graphs = set()
    for step, length in enumerate((40, 16, 64)):
        torch.testing.assert_close(run(model, length, step), run(plain, length, step), rtol=1e-4, atol=1e-6)
        graphs.add(num_graphs())
    assert graphs == {2 if family == "gemma3" else 1}


def test_evaluation_and_generation_are_not_compiled() -> None:
    model = build("llama")
    ids = tiny.tokens(0)
    want = copy.deepcopy(model).eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    BlockForward(model, find_layers(model), backend="aot_eager")
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), want)
    assert num_graphs() == 0


def test_autocast_and_compiled_blocks_agree_with_autocast_alone() -> None:
    model = build("llama")
    freeze(model, {1}, True, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = run(model)
        with BlockForward(model, find_layers(model), backend="aot_eager", checkpointing="frozen"):
            got = run(model)
    # bf16 has 8 bits.
    torch.testing.assert_close(got, want, rtol=5e-2, atol=2e-3)


def test_undo_gives_the_blocks_back_and_a_second_one_is_refused() -> None:
    model = tiny.llama()
    layers = find_layers(model)
    blocks = BlockForward(model, layers, checkpointing="all")
    with pytest.raises(RuntimeError, match="already have a BlockForward"):
        BlockForward(model, layers, checkpointing="all")
    blocks.undo()
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_blocks_with_a_forward_of_their_own_run_it_and_are_not_compiled() -> None:
    model, calls = tiny.llama(), []
    layers = find_layers(model)
    for path in layers.blocks:
        block: Any = model.get_submodule(path)

        def count(*args: Any, inner: Any = block.forward, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        block.forward = count
    with pytest.raises(ValueError, match="a block has a forward of its own, as accelerate gives it"):
        BlockForward(model, layers, backend="eager")
    with BlockForward(model, layers, checkpointing="all"):
        run(model)
    assert len(calls) == 2 * layers.num_blocks, "once in forward, once in backward"
    run(model)
    assert len(calls) == 3 * layers.num_blocks, "undo() leaves it in place"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"compiled blocks need a C\+\+ compiler, and g\+\+ or clang\+\+"):
        check_compiler()


class Stack(nn.Module):
    """A small model that compiles fast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x.square().sum()


def count_compiling(example: str) -> list[int]:
    """Run an example that builds `optimizer` and `lisa`, and count graphs after each of four periods."""
    model = Stack()
    names = {"lisatune": lisatune, "torch": torch, "model": model}
    exec(example.replace("period=10", "period=1"), names)  # noqa: S102
    graphs: list[int] = []
    for step in range(4):
        names.get("compiled", model)(torch.full((2, 4), step + 1.0)).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        graphs.append(num_graphs())
    assert names["lisa"].periods_proven == 4
    return graphs


def test_the_example_on_the_page_of_speed_compiles_no_more_than_four_graphs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "speed.md").read_text(encoding="utf-8")
    (example,) = (
        each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "blocks(model" in each
    )
    graphs = count_compiling(example.replace("blocks(model)", "blocks(model, backend='eager')"))
    assert graphs[0] > 0
    assert graphs[-1] <= 4  # frozen or active, with an input that needs a gradient or not


def test_a_model_compiled_as_a_whole_is_warned_of_at_the_next_draw() -> None:
    example = """
compiled = torch.compile(model, backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
lisa = lisatune.LISA(model, optimizer, active=1, period=1)
"""
    with pytest.warns(UserWarning, match=r"compiles it again.*lisatune\.compile_blocks\(model\)") as caught:
        graphs = count_compiling(example)
    assert len([each for each in caught if "whole model" in str(each.message)]) == 1
    assert graphs == [1, 2, 3, 4]


def test_a_model_that_is_compiled_already_is_warned_of_at_once() -> None:
    for compiled in (torch.compile(tiny.llama(), backend="eager"), tiny.llama()):
        compiled.compile(backend="eager")
        with pytest.warns(UserWarning, match="torch.compile has compiled the whole model"):
            LISA(compiled, torch.optim.AdamW(compiled.parameters()))


@pytest.mark.smollm2
def test_inductor_gives_the_same_gradients() -> None:
    model = build("llama")
    freeze(
        model, *FREEZES["everything"]
    )  # one graph; which graphs there are is the compiler's business above
    want = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's own modules say when they are imported
        with BlockForward(model, find_layers(model), backend="inductor"):
            got = run(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
