import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from lisatune import LISA
from lisatune.runs.named_state import check_same, from_json, from_names, to_json, to_names

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["__tensor__", "__tuple__"]), inner)
        | st.dictionaries(st.integers(), inner)
    ),
    max_leaves=10,
)


@given(STATES)
def test_json_and_back_is_the_same(state: object) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    assert from_json(json.loads(json.dumps(to_json(state, "state", tensors))), tensors) == state


def test_tensors_are_kept_beside_under_their_path() -> None:
    tensors: dict[str, torch.Tensor] = {}
    norm = torch.ones(2)
    plain = to_json({"lisa": {"norms": [norm]}}, "optimizer", tensors)
    assert tensors == {"optimizer.lisa.norms.0": norm}
    assert from_json(plain, tensors)["lisa"]["norms"][0] is norm


def test_what_is_not_json_is_refused_by_its_path() -> None:
    with pytest.raises(TypeError, match=r"cannot save scheduler.fn.1: function"):
        to_json({"fn": [1, lambda: 1]}, "scheduler", {})


def test_state_dicts_come_back_when_the_groups_list_their_parameters_in_another_order() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    saved, tensors = to_names(model, optimizer)

    turned = torch.optim.AdamW(list(model.parameters())[::-1])
    turned.load_state_dict(from_names(model, turned, saved, tensors))
    for parameter in model.parameters():
        assert torch.equal(turned.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_state_of_lisa_comes_back_in_another_order_too() -> None:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    lisa = LISA(model, optimizer)
    tiny.fit(model, optimizer, 3)
    saved, tensors = to_names(model, optimizer)
    moments = {p: state["exp_avg"].clone() for p, state in optimizer.state.items()}
    lisa.detach()

    turned = torch.optim.AdamW(list(model.parameters())[::-1])
    LISA(model, turned)
    turned.load_state_dict(from_names(model, turned, saved, tensors))
    assert moments.keys() == turned.state.keys()
    assert all(torch.equal(turned.state[p]["exp_avg"], moment) for p, moment in moments.items())


def test_a_parameter_outside_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[7\] that the model does not own"):
        to_names(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(7))]))


def test_the_first_difference_is_named() -> None:
    with pytest.raises(ValueError, match="weights are not the saved ones: b was 2 and is 3"):
        check_same("weights", {"a": "1", "b": "2"}, {"a": "1", "b": "3"})
    with pytest.raises(ValueError, match="c was not there and is 1"):
        check_same("weights", {}, {"c": "1"})
