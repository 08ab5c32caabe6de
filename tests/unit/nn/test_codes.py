"""Weights as int8 rows and as NF4, and layers that compute with them."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from lisatune.lisa.frozen_weights import RamMasters
from lisatune.nn.coded import (
    CodedEmbedding,
    CodedLinear,
    CodedWeight,
    coded_weights,
    exact_parameters,
    own_parameter,
)
from lisatune.nn.codes import Format, Int8Rows, Nf4, make_format

FORMATS: dict[str, tuple[Format, float, float]] = {
    "int8": (Int8Rows(), 0.01, 8 + 32 / 96),
    "nf4": (Nf4("fp32"), 0.1, 4.5),
    "nf4, 8-bit scales": (Nf4("8bit"), 0.1, 4 + 8 / 64 + 32 / (64 * 96)),
}
"""Each format, its relative error on normal weights, its bits a weight of [64, 96]: 96 scales, one group."""


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=FORMATS)
def made(request: pytest.FixtureRequest) -> tuple[Format, float, float]:
    return FORMATS[request.param]


def freeze(*layers: nn.Module, format: Format) -> CodedWeight:
    weight = CodedWeight("weight", layers, format, RamMasters())
    weight.freeze()
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_near_their_weight_and_take_the_stated_bits(
    made: tuple[Format, float, float], dtype: torch.dtype
) -> None:
    format, error, bits = made
    weight = torch.randn(64, 96, dtype=dtype)
    codes = format.encode(weight)
    decoded = format.decode(codes, weight.shape, torch.float32)
    assert (decoded - weight.float()).norm() / weight.float().norm() < error
    assert sum(tensor.nbytes for tensor in codes.values()) * 8 / weight.numel() == pytest.approx(bits)


def test_encoding_a_strided_weight_gives_the_codes_of_its_numbers(made: tuple[Format, float, float]) -> None:
    format = made[0]
    weight = torch.randn(96, 64).T
    again = format.encode(weight.contiguous())
    assert all(torch.equal(tensor, again[name]) for name, tensor in format.encode(weight).items())


def test_what_compiled_code_expects_of_an_operator_is_what_it_returns(
    made: tuple[Format, float, float],
) -> None:
    """Compiled code lays out memory by an operator's shapes for fake tensors, and stops at any other."""
    format, weight = made[0], torch.randn(64, 96)
    codes = format.encode(weight)

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.namespace == "bitsandbytes":
                with FakeTensorMode(allow_non_fake_inputs=True):
                    assert func(*args, **(kwargs or {})).shape == out.shape
            return out

    with Shapes():
        format.decode(codes, weight.shape, torch.float32)


def test_zeros_stay_zeros(made: tuple[Format, float, float]) -> None:
    weight = torch.zeros(4, 64)
    assert torch.equal(made[0].decode(made[0].encode(weight), weight.shape, torch.float32), weight)


def test_each_row_has_its_own_int8_scale_and_the_largest_number_is_exact() -> None:
    weight = torch.tensor([[1.0, -0.6, 0.0], [1e-6, 6e-7, -1e-6]])
    codes = Int8Rows().encode(weight)
    assert codes["codes"].tolist() == [[127, -76, 0], [127, 76, -127]]
    assert codes["scales"].tolist() == pytest.approx([1 / 127, 1e-6 / 127])


def test_a_large_weight_is_encoded_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 8)
    whole = Int8Rows().encode(weight)
    monkeypatch.setattr("lisatune.nn.codes.AT_ONCE", 24)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in Int8Rows().encode(weight).items())


def test_rows_are_decoded_as_in_the_whole_weight() -> None:
    weight, format = torch.randn(10, 8), Int8Rows()
    codes = format.encode(weight)
    whole = format.decode(codes, weight.shape, torch.bfloat16)
    ids = torch.tensor([[3, 0], [9, 9]])
    assert torch.equal(format.decode_rows(codes, slice(2, 5), torch.bfloat16), whole[2:5])
    assert torch.equal(format.decode_rows(codes, ids, torch.bfloat16), whole[ids])


@pytest.mark.parametrize("bias", [True, False])
def test_a_coded_layer_computes_as_a_dense_one_with_the_decoded_weight(
    made: tuple[Format, float, float], bias: bool
) -> None:
    layer = nn.Linear(96, 64, bias=bias)
    weight = freeze(layer, format=made[0])
    dense = nn.Linear(96, 64, bias=bias)
    dense.weight.data = made[0].decode(weight.codes, dense.weight.shape, torch.float32)
    if bias:
        dense.bias.data = layer.bias.data
    x, y = (torch.randn(2, 5, 96).requires_grad_() for _ in range(2))
    y.data = x.data
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(y))
    torch.testing.assert_close(x.grad, y.grad)
    assert layer.weight.grad is None


def test_forward_keeps_codes_alone_for_backward(made: tuple[Format, float, float]) -> None:
    layer = nn.Linear(96, 64, bias=False)
    codes = freeze(layer, format=made[0]).codes
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(2, 96).requires_grad_())
    assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in codes.values()}


def test_input_gradients_survive_an_evaluation(made: tuple[Format, float, float]) -> None:
    """bitsandbytes' own layer loses them on some CPUs."""
    layer = nn.Linear(96, 64)
    freeze(layer, format=made[0])
    with torch.no_grad():
        layer.eval()(torch.randn(2, 96))
    x = torch.randn(2, 96).requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_evaluation_is_exact_and_training_computes_with_codes() -> None:
    layer, embedding = nn.Linear(8, 4), nn.Embedding(6, 8)
    x, ids = torch.randn(3, 8), torch.tensor([[5, 0]])
    want, rows = layer(x).detach(), embedding(ids).detach()
    freeze(layer, format=Int8Rows())
    freeze(embedding, format=Int8Rows())
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), want)
        assert torch.equal(embedding.eval()(ids), rows)
        assert not torch.equal(layer.train()(x), want)
        assert not torch.equal(embedding.train()(ids), rows)
    assert not torch.equal(layer.eval()(x), want), "with gradients a layer trains, whatever its mode"
    torch.testing.assert_close(layer(x), want, atol=0.02, rtol=0)


def test_parameter_object_shape_and_dtype_stay_and_a_stray_read_is_nan() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    before = layer.weight
    weight = freeze(layer, format=Int8Rows())
    parameter = dict(layer.named_parameters())["weight"]
    assert parameter is own_parameter(layer) is before
    assert (parameter.shape, parameter.dtype) == ((4, 8), torch.bfloat16)
    assert parameter.untyped_storage().nbytes() == 2
    assert parameter.isnan().all()
    with pytest.raises(RuntimeError, match="memory location"), torch.no_grad():
        parameter.add_(1)
    assert type(layer) is CodedLinear
    assert [name for name, _ in layer.named_buffers()] == ["weight_codes", "weight_scales"]
    weight.thaw()
    assert layer.weight is before
    assert type(layer) is nn.Linear
    assert list(layer.named_buffers()) == []
    assert "_coded_weight" not in vars(layer)


def test_who_reads_the_weight_of_a_layer_gets_what_the_layer_computes_with(
    made: tuple[Format, float, float],
) -> None:
    """A loss that multiplies by `head.weight` trains what one that calls the head trains."""
    layer = nn.Linear(96, 64, bias=False)
    exact = layer.weight.detach().clone()
    freeze(layer, format=made[0])
    x = torch.randn(3, 96, requires_grad=True)
    called = layer(x)
    read = x @ layer.weight.T
    torch.testing.assert_close(read, called)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (read, called)))
    assert not layer.weight.requires_grad
    assert not torch.equal(layer.weight, exact)
    with torch.no_grad():
        assert torch.equal(layer.eval().weight, exact)
    assert copy.deepcopy(layer.state_dict())["weight"].equal(exact)


def test_tying_again_keeps_the_parameter_of_a_coded_head() -> None:
    """transformers ties a model's ends more than once, as after loading a checkpoint."""
    model = tiny.llama(tied=True)
    weight = own_parameter(model.lm_head)
    freeze(model.model.embed_tokens, model.lm_head, format=Int8Rows())
    read = model.lm_head.weight
    model.tie_weights()
    assert own_parameter(model.lm_head) is weight
    assert torch.equal(model.lm_head.weight, read)


def test_freeze_and_thaw_give_the_same_bits(made: tuple[Format, float, float]) -> None:
    layer = nn.Linear(96, 64).to(torch.bfloat16)
    before = layer.weight.detach().clone()
    weight = freeze(layer, format=made[0])
    assert torch.equal(weight.exact(), before)
    weight.thaw()
    assert torch.equal(layer.weight, before)


def test_tied_layers_share_their_codes_and_their_exact_weight() -> None:
    embedding, head = nn.Embedding(6, 8), nn.Linear(8, 6, bias=False)
    head.weight = embedding.weight
    freeze(embedding, head, format=Int8Rows())
    model: Any = nn.ModuleDict({"embedding": embedding, "head": head})
    assert isinstance(embedding, CodedEmbedding)
    assert head.weight_codes is embedding.weight_codes
    assert list(exact_parameters(model)) == ["embedding.weight"] == list(coded_weights(model))
    state = model.state_dict()
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()


def test_state_dict_gives_and_takes_exact_weights() -> None:
    layer, other = nn.Linear(8, 4), nn.Linear(8, 4)
    want = layer.weight.detach().clone()
    freeze(layer, format=Int8Rows())
    weight = freeze(other, format=Int8Rows())
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert torch.equal(layer.state_dict()["weight"], want)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(weight.exact(), want)
    assert weight.codes_fit()
    assert torch.equal(other.bias, layer.bias)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(4)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict({"bias": torch.ones(4)})


def test_codes_that_were_changed_do_not_fit() -> None:
    weight = freeze(nn.Linear(8, 4), format=Int8Rows())
    assert weight.codes_fit()
    weight.codes["codes"][2, 3] += 1
    assert not weight.codes_fit()


def test_codes_of_a_diverged_weight_fit_it() -> None:
    layer = nn.Linear(8, 4)
    layer.weight.data[1, 2], layer.weight.data[3] = torch.inf, torch.nan
    assert freeze(layer, format=Int8Rows()).codes_fit()


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(
        ValueError, match="frozen_weights must be 'exact', 'int8', 'mixed' or 'nf4', got 'int4'"
    ):
        make_format("int4")
    with pytest.raises(ValueError, match="frozen_scales must be 8bit or fp32, got 'fp8'"):
        make_format("nf4", scales="fp8")  # type: ignore[arg-type]
