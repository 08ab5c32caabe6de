"""QLISA: frozen blocks are codes on the device and exact elsewhere."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import tiny
from lisatune import LISA, AdamW, ProofError, Sampler, find_layers, param_groups, use_chunked_loss
from lisatune.files.masters import DiskMasters
from lisatune.lisa.frozen_weights import FrozenWeights, RamMasters
from lisatune.lisa.statistics import BlockStatistics
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.nn.coded import coded_weights, exact_parameters
from lisatune.nn.layers import LayerMap

BITS = pytest.mark.parametrize("bits", ["int8", "mixed", "nf4"])

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks will never train:UserWarning")


def attach(
    model: nn.Module,
    *,
    ends: str = "train",
    adamw: dict[str, Any] | None = None,
    in_backward: bool = False,
    **options: Any,
) -> tuple[AdamW, LISA]:
    """Attach QLISA with γ = 2, K = 3, int8 and the full proof."""
    layers = find_layers(model)
    optimizer = AdamW(param_groups(model, layers, ends=ends), lr=1e-2, **(adamw or {}))
    if in_backward:
        optimizer.update_in_backward()
    chosen = {"period": 3, "verify": "full", "frozen_weights": "int8", "ends": ends, **options}
    return optimizer, LISA(model, optimizer, **chosen)


def bf16(**options: Any) -> LlamaForCausalLM:
    model: LlamaForCausalLM = tiny.llama(**options).to(torch.bfloat16)
    return model


def coded_blocks(model: nn.Module) -> set[int]:
    return {int(name.split(".")[2]) for name in coded_weights(model) if ".layers." in name}


@BITS
@pytest.mark.parametrize("masters", ["ram", "disk"])
def test_frozen_blocks_are_codes_and_active_ones_are_exact(bits: str, masters: str, tmp_path: Path) -> None:
    model = tiny.llama()
    parameters = dict(model.named_parameters())
    options = {"masters": DiskMasters(tmp_path)} if masters == "disk" else {}
    optimizer, lisa = attach(model, frozen_weights=bits, **options)

    def check(step: int) -> None:
        assert coded_blocks(model) == set(range(6)) - set(lisa.active_blocks)
        assert len(coded_weights(model)) == 4 * 7
        assert all(parameters[name] is p for name, p in model.named_parameters())

    check(0)
    tiny.fit(model, optimizer, 9, after=check)
    lisa.check()
    assert lisa.periods_proven == 3


@BITS
def test_blocks_that_never_trained_are_bit_identical(bits: str) -> None:
    model = bf16()
    before = tiny.weights(model)
    optimizer, lisa = attach(model, frozen_weights=bits, active=1, sampler="ascending")
    tiny.fit(model, optimizer, 6)
    moved = {name.split(".")[2] for name in tiny.moved(before, model) if ".layers." in name}
    assert moved == {"0", "1"}
    lisa.detach()
    assert {name.split(".")[2] for name in tiny.moved(before, model) if ".layers." in name} == {"0", "1"}
    assert coded_weights(model) == {}


def test_all_blocks_active_is_exact_bit_for_bit() -> None:
    plain, model = tiny.llama(), tiny.llama()
    for each, frozen_weights in ((plain, "exact"), (model, "int8")):
        tiny.fit(each, attach(each, active=6, frozen_weights=frozen_weights)[0], 4)
    tiny.assert_same_weights(model, plain)


def test_disk_and_memory_give_the_same_weights(tmp_path: Path) -> None:
    one, other = bf16(), bf16()
    tiny.fit(one, attach(one)[0], 9)
    tiny.fit(other, attach(other, masters=DiskMasters(tmp_path))[0], 9)
    tiny.assert_same_weights(one, other)
    assert list(tmp_path.iterdir()) == [], "the scratch file has no name"


def test_a_copy_holds_its_frozen_weights_as_its_own_lisa_says(tmp_path: Path) -> None:
    model = tiny.llama()
    tiny.fit(model, attach(model, masters=DiskMasters(tmp_path))[0], 4)
    saved = model.state_dict()
    for frozen_weights, masters in (("exact", None), ("int8", RamMasters())):
        twin = copy.deepcopy(model).requires_grad_(True)
        optimizer, lisa = attach(twin, frozen_weights=frozen_weights, masters=masters)
        assert bool(coded_weights(twin)) == (frozen_weights == "int8")
        assert (lisa.host_bytes() > 0) == (frozen_weights == "int8"), "the store that was given is used"
        tiny.fit(twin, optimizer, 4)
        lisa.check()
        assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


@BITS
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_moved_holds_no_whole_weight_beside_its_codes(bits: str, tied: bool) -> None:
    """As by Accelerate, which moves a model after LISA was attached to it."""
    stayed, moved = tiny.llama(tied=tied), tiny.llama(tied=tied)
    tiny.fit(stayed, attach(stayed, frozen_weights=bits, ends="frozen")[0], 7)
    optimizer, _ = attach(moved, frozen_weights=bits, ends="frozen")
    moved._apply(torch.clone)  # what `to` does with another device
    assert coded_weights(moved)
    for name, coded in coded_weights(moved).items():
        assert coded.parameter is dict(moved.named_parameters())[name]
        assert coded.parameter.untyped_storage().nbytes() == coded.parameter.element_size()
    tiny.fit(moved, optimizer, 7)
    tiny.assert_same_weights(moved, stayed)


@BITS
def test_a_model_with_codes_cannot_become_another_dtype(bits: str) -> None:
    model = tiny.llama()
    _, lisa = attach(model, frozen_weights=bits)
    with pytest.raises(RuntimeError, match=r"codes of torch.float32 .* cannot become torch.bfloat16;"):
        model.to(torch.bfloat16)
    lisa.detach()
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@BITS
@pytest.mark.parametrize(
    ("ends", "tied"),
    [("train", True), ("train", False), ("frozen", True), ("head", False), ("every:2+8bit", True)],
)
def test_evaluation_is_that_of_the_saved_model(bits: str, tied: bool, ends: str, tmp_path: Path) -> None:
    model = tiny.llama(tied=tied)
    optimizer, lisa = attach(model, frozen_weights=bits, ends=ends)
    tiny.fit(model, optimizer, 5)
    ids = tiny.tokens(0)
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(saved(input_ids=ids).logits, want)
    tiny.assert_same_weights(saved, model)
    lisa.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_ends_are_int8_whatever_the_blocks_are(tied: bool) -> None:
    model = tiny.llama(tied=tied)
    attach(model, frozen_weights="nf4", ends="frozen")
    formats = {name: weight.format.name for name, weight in coded_weights(model).items()}
    of_ends = {name: format for name, format in formats.items() if ".layers." not in name}
    assert of_ends == dict.fromkeys(
        ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"], "int8"
    )
    assert {format for name, format in formats.items() if ".layers." in name} == {"nf4"}


@pytest.mark.parametrize("unit", ["block", "module"])
def test_mixed_codes_are_int8_for_a_third_of_a_block_that_is_its_smallest_matrices(unit: str) -> None:
    model = tiny.llama()
    attach(model, frozen_weights="mixed", active=1, unit=unit)
    coded = {name: weight for name, weight in coded_weights(model).items() if ".layers." in name}
    by_kind = {name.split(".")[-2]: weight.format.name for name, weight in coded.items()}
    # q has 1024 numbers and comes first, k and v 512: with o, of 1024, they would be 3072 of 7680.
    small, large = ("k_proj", "v_proj", "q_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")
    assert by_kind == dict.fromkeys(small, "int8") | dict.fromkeys(large, "nf4")


@pytest.mark.parametrize("tied", [True, False])
def test_loss_over_a_coded_head_is_that_of_its_decoded_weight(tied: bool) -> None:
    model = tiny.llama(tied=tied)
    attach(model, ends="frozen")
    twin = tiny.llama(tied=tied)
    with torch.no_grad():
        for name, weight in coded_weights(model).items():
            twin.get_parameter(name).copy_(
                weight.format.decode(weight.codes, weight.parameter.shape, torch.float32)
            )
    ids = tiny.tokens(0)
    use_chunked_loss(model)
    losses = [each.train()(input_ids=ids, labels=ids).loss for each in (model, twin)]
    losses[0].backward()
    losses[1].backward()
    torch.testing.assert_close(*losses)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, twin.get_parameter(name).grad, msg=name)
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_weight(reentrant: bool) -> None:
    plain, model = tiny.llama(), tiny.llama()
    for each in (plain, model):
        optimizer, _ = attach(each, active=2)
        if each is model:
            each.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                each.enable_input_require_grads()
        each.train()
        tiny.fit(each, optimizer, 5)
    tiny.assert_same_weights(model, plain)


@pytest.mark.parametrize(
    "adamw",
    [
        {"rounding": "stochastic", "moments": "8bit"},
        {"rounding": "exact"},
        {"rounding": "stochastic", "state_device": "cpu"},
    ],
)
@pytest.mark.parametrize("state", ["drop", "cpu"])
def test_every_format_of_state_works_beside_codes(adamw: dict[str, Any], state: str) -> None:
    model = bf16()
    optimizer, lisa = attach(model, adamw=adamw, state=state)
    tiny.fit(model, optimizer, 9)
    assert lisa.periods_proven == 3
    assert all(p.isfinite().all() for p in exact_parameters(model).values())


def test_resume_in_the_middle_of_a_period_is_bit_equal() -> None:
    whole, first, second = bf16(), bf16(), bf16(seed=1)
    adamw = {"rounding": "exact"}
    tiny.fit(whole, attach(whole, adamw=adamw)[0], 10)
    optimizer, _ = attach(first, adamw=adamw)
    tiny.fit(first, optimizer, 5)
    resumed, lisa = attach(second, adamw=adamw)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert coded_blocks(second) == coded_blocks(first) == set(range(6)) - set(lisa.active_blocks)
    tiny.fit(second, resumed, range(5, 10))
    tiny.assert_same_weights(second, whole)


@pytest.mark.parametrize("what", ["codes", "master"])
def test_proof_sees_that_codes_or_exact_weights_were_changed(what: str) -> None:
    model = tiny.llama()
    optimizer, _ = attach(model, active=1, sampler="ascending")
    tiny.fit(model, optimizer, 1)
    weight = next(each for name, each in coded_weights(model).items() if ".layers.4." in name)
    if what == "codes":
        weight.codes["codes"][0, 0] ^= 1
    else:
        weight.exact()[0, 0] += 1
    with pytest.raises(ProofError, match="frozen weights moved in block 4"):
        tiny.fit(model, optimizer, range(1, 3))


def test_codes_that_fit_no_exact_weight_are_found_before_a_period_begins() -> None:
    model = tiny.llama()
    optimizer, _ = attach(model, active=1, sampler="ascending", verify="sample")
    frozen = FrozenWeights.of(model)
    assert frozen is not None
    frozen.prove(0)
    for weight in coded_weights(model).values():
        weight.codes["codes"][0, 0] ^= 1
    with pytest.raises(ProofError, match=r"codes of the frozen weight .* are not those of its exact numbers"):
        tiny.fit(model, optimizer, 3)


def test_weights_that_train_through_codes_lose_most_of_an_update() -> None:
    """Why exact weights are kept: codes made of codes forget small steps."""
    model = bf16(hidden=64)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().float()
    step = 2e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for bits in ("int8", "nf4"):
        attach(
            other := bf16(hidden=64, seed=2),
            active=0,
            frozen_weights=bits,
            sampler="permutation",
            ends="train",
        )
        format = next(each.format for name, each in coded_weights(other).items() if ".layers." in name)

        def through(x: Tensor, format: Any = format) -> Tensor:
            decoded: Tensor = format.decode(format.encode(x), x.shape, torch.float32)
            return decoded

        start = through(weight)
        kept = through(start + step) - start
        assert float((kept - step).norm() / step.norm()) > 0.5


def test_host_memory_holds_the_frozen_weights_once() -> None:
    model = bf16()
    _, lisa = attach(model)
    frozen = [p for name, p in exact_parameters(model).items() if name in coded_weights(model)]
    assert lisa.host_bytes() == sum(p.nbytes for p in frozen)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) < sum(p.nbytes for p in model.parameters()) - lisa.host_bytes() + 100


@dataclass(frozen=True)
class Heaviest(Sampler):
    """The block with the largest norm of weights."""

    num_blocks: int
    reads = ("weight_norm",)

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics) -> tuple[int, ...]:  # type: ignore[override]
        assert statistics.weight_norm is not None
        return (int(statistics.weight_norm.argmax()),)

    def inclusion(self) -> tuple[float, ...]:
        return (1 / self.num_blocks,) * self.num_blocks


def test_samplers_read_the_norms_of_exact_weights() -> None:
    model = bf16()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight.mul_(3)
    optimizer, lisa = attach(model, sampler=Heaviest(6))
    tiny.fit(model, optimizer, 6)
    assert lisa.visits == [0, 0, 0, 0, 2, 0]


def test_models_whose_blocks_have_no_linear_layers_are_refused_by_name() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16))
    with pytest.raises(ValueError, match=r"only 0% .*transformer\.h\.0\.mlp\.c_fc\.weight is .* in Conv1D"):
        attach(gpt2)


@pytest.mark.parametrize("options", [{"frozen_weights": "int8"}, {"correction": "lora"}])
def test_torchs_encoder_layers_are_refused_because_they_read_weights_past_codes_and_adapters(
    options: dict[str, Any],
) -> None:
    blocks = [nn.TransformerEncoderLayer(8, 2, 32, batch_first=True) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 8))
    layers = find_layers(model, blocks=["0", "1", "2"])
    with pytest.raises(ValueError, match="without calling them, past"):
        LISA(model, AdamW(model.parameters()), active=1, layers=layers, **options)


def test_a_layer_with_code_of_its_own_stays_exact() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), Scaled(8, 8)) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 8))
    layers = LayerMap(("0", "1", "2"), ("3.weight", "3.bias"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    LISA(model, optimizer, active=1, period=1, layers=layers, frozen_weights="int8")
    assert {name.split(".")[1] for name in coded_weights(model)} == {"0", "2"}
    for _ in range(4):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_layer_whose_weight_is_made_of_other_parameters_stays_exact() -> None:
    model = tiny.llama()
    prune.identity(model.model.layers[0].mlp.up_proj, "weight")  # type: ignore[no-untyped-call]
    attach(model, active=1, sampler="descending", verify="off")
    assert "model.layers.0.mlp.up_proj.weight_orig" not in coded_weights(model)
    assert "model.layers.0.mlp.down_proj.weight" in coded_weights(model)


def test_what_ddp_ignores_already_is_ignored_with_codes_and_after_them() -> None:
    model = tiny.llama()
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    weights = FrozenWeights(model, find_layers(model), "int8")
    weights.detach(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
    weights = FrozenWeights(model, find_layers(model), "int8")
    weights._hide_from_ddp(model)
    assert {"mine", "model.layers.0.mlp.up_proj.weight"} < set(model._ddp_params_and_buffers_to_ignore)
    weights.detach(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]


def test_a_layer_that_was_given_a_forward_stays_exact() -> None:
    """As Accelerate's hooks do; they would keep the decoded weight for backward."""
    model = tiny.llama()
    for block in model.model.layers:
        block.self_attn.q_proj.forward = block.self_attn.q_proj.forward
    optimizer, _ = attach(model)
    coded = {name.split(".")[-2] for name in coded_weights(model)}
    assert coded == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    tiny.fit(model, optimizer, 4)
    of_all = tiny.llama()
    for module in of_all.modules():
        if type(module) is nn.Linear:
            module.forward = module.forward
    with pytest.raises(
        ValueError, match=r"only 0% .* in Linear with a forward of its own; use frozen_weights"
    ):
        attach(of_all)


def test_update_in_backward_gives_the_same_weights() -> None:
    one, other = bf16(), bf16()
    adamw = {"rounding": "stochastic"}
    tiny.fit(one, attach(one, adamw=adamw)[0], 7)
    optimizer, _ = attach(other, adamw=adamw, in_backward=True)
    tiny.fit(other, optimizer, 7)
    tiny.assert_same_weights(one, other)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be inst:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_give_the_same_weights_and_few_graphs() -> None:
    torch._dynamo.reset()
    plain, model = tiny.llama(), tiny.llama()
    tiny.fit(plain.train(), attach(plain)[0], 9)
    optimizer, lisa = attach(model)
    before = num_graphs()
    with BlockForward(model, lisa.layers, backend="eager"):
        tiny.fit(model.train(), optimizer, 9)
    for name, exact in exact_parameters(model).items():
        torch.testing.assert_close(exact, exact_parameters(plain)[name], msg=name)
    assert num_graphs() - before <= 4
