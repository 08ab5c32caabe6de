"""Attention for CPUs: equal to torch's, forward and backward, and not used where it does not apply."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import tiny_run
from lisatune import find_layers
from lisatune.memory.plan import plan_memory
from lisatune.nn.attention import attention, use_cpu_attention
from lisatune.nn.blocks import BlockForward, num_graphs
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe


def inputs(dtype: torch.dtype, heads: int, shared: int, length: int) -> list[Tensor]:
    """Query, key and value as a model hands them over, heads behind tokens in memory, and a gradient."""
    rng = torch.Generator().manual_seed(0)
    sizes = (heads, shared, shared)
    made = [torch.randn(2, length, n, 8, generator=rng).to(dtype).transpose(1, 2) for n in sizes]
    return [x.requires_grad_() for x in made] + [torch.randn(2, length, heads, 8, generator=rng).to(dtype)]


def both(attend: Any, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    out = attend(query, key, value)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal = mask is None
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale).transpose(
        1, 2
    )


def packed(*lengths: int) -> Tensor:
    """Sequences one after another, each causal: [1, 1, T, T]."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]


def one_mask_for_each_sequence() -> Tensor:
    return torch.cat([packed(100, 50), packed(20, 130)])


def one_mask_for_each_head() -> Tensor:
    return torch.rand(1, 6, 150, 150, generator=torch.Generator().manual_seed(0)) < torch.tril(
        torch.full((150, 150), 0.3), -1
    ) + torch.eye(150)


MASKS = {
    "packed": packed(30, 64, 1, 55),
    "one for each sequence": one_mask_for_each_sequence(),
    "one for each head": one_mask_for_each_head(),
    "window": packed(150) & ~torch.ones(150, 150).tril(-20).bool(),
    "padded": packed(150) & (torch.arange(150) < 90),
    "prefix seen from everywhere": packed(150) | (torch.arange(150) < 80),
    "everything": torch.ones(1, 1, 150, 150, dtype=torch.bool),
    "more keys than queries": packed(200)[:, :, 50:],
    "fewer keys than queries": packed(150)[..., :70],
}


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_values_and_gradients_are_those_of_torch(heads: int, shared: int, length: int) -> None:
    given = inputs(torch.float64, heads, shared, length)
    for ours, theirs in zip(both(attention, *given), both(reference, *given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_shows_is_attended_to_as_in_torch(name: str) -> None:
    mask = MASKS[name]
    queries, keys = mask.shape[2:]
    query, *_, grad = inputs(torch.float64, 6, 2, queries)
    _, key, value, _ = inputs(torch.float64, 6, 2, keys)
    ours = both(lambda *qkv: attention(*qkv, mask), query, key, value, grad)
    theirs = both(lambda *qkv: reference(*qkv, mask), query, key, value, grad)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blind", [40, 70])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(blind: int) -> None:
    mask = packed(150) & (torch.arange(150) >= blind)  # padding on the left; whole chunks of rows for 70
    out, *gradients = both(lambda *qkv: attention(*qkv, mask), *inputs(torch.float64, 4, 2, 150))
    assert not out[:, :blind].any()
    assert not gradients[0][:, :, :blind].any()
    given = [x[:, blind:] if x.shape[1] == 150 else x[:, :, blind:] for x in inputs(torch.float64, 4, 2, 150)]
    given = [x.detach().requires_grad_() for x in given]
    for all_of_it, want in zip((out, *gradients), both(reference, *given), strict=True):
        rest = all_of_it[:, blind:] if all_of_it is out else all_of_it[:, :, blind:]
        torch.testing.assert_close(rest, want, rtol=1e-10, atol=1e-12)


def test_a_scale_of_ones_own_is_heeded() -> None:
    given = inputs(torch.float64, 4, 2, 70)
    ours = both(lambda *qkv: attention(*qkv, scale=0.3), *given)
    for mine, theirs in zip(ours, both(lambda *qkv: reference(*qkv, scale=0.3), *given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_bf16_errs_no_more_than_twice_as_much_as_torch() -> None:
    given = inputs(torch.bfloat16, 6, 2, 200)
    exact = both(reference, *(x.detach().double().requires_grad_() for x in given))
    for want, ours, theirs in zip(exact, both(attention, *given), both(reference, *given), strict=True):
        errors = [float((x.double() - want).norm() / want.norm()) for x in (ours, theirs)]
        assert errors[0] < 2 * errors[1] < 0.02


def test_it_keeps_queries_keys_and_values_alone() -> None:
    *given, _ = inputs(torch.float32, 6, 2, 100)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(*given)
    assert sorted(x.numel() for x in kept) == sorted(x.numel() for x in given)


A_WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def model(**changes: Any) -> LlamaForCausalLM:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**config | heads | changes)).train()


def gradients(of: LlamaForCausalLM, length: int, **more: Any) -> dict[str, Tensor]:
    ids = torch.arange(2 * length).view(2, length) % 64
    of.zero_grad()
    of(input_ids=ids, labels=ids, use_cache=False, **more).loss.backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def calls(patch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []

    def spy(*args: Any) -> Tensor:
        seen.append(args[0].shape[2])
        return attention(*args)

    patch.setattr("lisatune.nn.attention.attention", spy)
    return seen


def test_a_model_trains_through_it_with_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    theirs = gradients(of, 70)
    use_cpu_attention(of)
    seen = calls(monkeypatch)
    assert_same(gradients(of, 70), theirs)
    assert seen == [70] * 3


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.ones(2, 70, dtype=torch.long).tril(60)},
        {"position_ids": (torch.arange(70) % 40).expand(2, -1)},
    ],
    ids=["padding", "packing"],
)
def test_padding_and_packed_records_train_through_it(
    more: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = model()
    plain, theirs = gradients(of, 70), gradients(of, 70, **more)
    assert not torch.allclose(plain[A_WEIGHT], theirs[A_WEIGHT], rtol=1e-2)
    use_cpu_attention(of)
    seen = calls(monkeypatch)
    assert_same(gradients(of, 70, **more), theirs)
    assert seen == [70] * 3


@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (2, 1, 70, 1)], ids=["all queries", "all keys"])
def test_a_mask_that_is_one_for_all_queries_or_keys_goes_to_torch(shape: tuple[int, ...]) -> None:
    of = model()
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 60:] = False
    theirs = gradients(of, 70, attention_mask=mask)
    use_cpu_attention(of)
    assert_same(gradients(of, 70, attention_mask=mask), theirs)


@pytest.mark.parametrize("kind", ["dropout", "cache"])
def test_what_it_can_not_do_goes_to_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(attention_dropout=0.5 if kind == "dropout" else 0.0)
    use_cpu_attention(of)
    seen = calls(monkeypatch)
    if kind == "dropout":
        gradients(of, 8)
        assert seen == []
    else:
        of.eval().generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False)
        assert set(seen) <= {4}  # the prompt alone


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_compiled_blocks_take_batches_of_any_length_in_the_same_graphs(packing: bool) -> None:
    def batch(length: int) -> dict[str, Tensor]:
        return {"position_ids": (torch.arange(length) % 30).expand(2, -1)} if packing else {}

    of = model()
    theirs = [gradients(of, length, **batch(length)) for length in (40, 70, 130)]
    use_cpu_attention(of)
    with BlockForward(of, find_layers(of), backend="aot_eager"):
        assert_same(gradients(of, 40, **batch(40)), theirs[0])
        graphs = num_graphs()
        for length, want in zip((70, 130), theirs[1:], strict=True):
            assert_same(gradients(of, length, **batch(length)), want)
        assert num_graphs() == graphs


def test_under_autocast_it_computes_in_the_dtype_of_its_inputs() -> None:
    *given, grad = inputs(torch.float32, 4, 2, 70)
    plain = both(attention, *given, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, both(attention, *given, grad), strict=True))


def test_a_recipe_asks_for_it_by_name_and_the_written_model_does_not(tmp_path: Path) -> None:
    folder = tiny_run.write_model(tmp_path / "tiny")
    path = tiny_run.write_recipe(tmp_path, folder, tiny_run.write_rows(tmp_path / "rows.jsonl"))
    plain = train(load_recipe(path))
    recipe = load_recipe(path, ["model.attention=lisatune_cpu"])
    ours = train(recipe, overwrite=True)
    assert ours["held_out_loss_after"] == pytest.approx(plain["held_out_loss_after"], abs=1e-4)
    assert ours["held_out_loss_after"] < ours["held_out_loss_before"]
    written = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert "lisatune" not in str(written.to_dict())
    assert plan_memory(recipe).kind == "traced"
