import pytest
import torch
from torch import nn

import tiny
from lisatune import LISA, AdamW
from lisatune.lisa.moved_share import MovedShare, rounds_to_nearest


def fill(values: int) -> nn.Parameter:
    return nn.Parameter(torch.arange(values).float())


def test_the_share_is_that_of_all_numbers_and_not_of_windows() -> None:
    large, small, resting = fill(4096), fill(1024), fill(64)
    moved = MovedShare(torch.optim.SGD([large, small, resting], lr=1.0))
    moved.begin(1, {"block 0": [large, small], "block 3": [resting]})
    with torch.no_grad():
        large[1024:1536] += 1  # half of the window of period 1
        small += 1
    moved.end({"block 0"})  # block 3 had no reason to move
    assert moved.share == pytest.approx((4096 * 0.5 + 1024) / (4096 + 1024))  # 0.6
    moved.begin(2, {"block 0": [large, small]})
    with torch.no_grad():
        large += 1
        small += 1
    moved.end({"block 0"})
    assert moved.share == pytest.approx((0.6 + 1) / 2)


@pytest.mark.filterwarnings("ignore:the weights are bfloat16:UserWarning")
def test_a_period_in_which_hardly_any_number_moves_is_warned_of_once() -> None:
    model = tiny.llama().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    lisa = LISA(model, optimizer, active=2, period=3)
    says = r"in period 0 only \d\.?\d* % of the drawn blocks' numbers changed.*dtype=torch\.float32"
    with pytest.warns(UserWarning, match=says) as caught:
        tiny.fit(model, optimizer, 9)
    assert len(caught) == 1
    assert lisa.moved_share is not None
    assert 0 < lisa.moved_share < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_updates_move_nearly_all_numbers_and_a_run_says_so(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    optimizer = AdamW(model.parameters(), lr=2e-6)
    lisa = LISA(model, optimizer, active=2, period=3)
    tiny.fit(model, optimizer, 2)
    assert lisa.moved_share is None
    assert "moved_share" not in lisa.summarize()
    tiny.fit(model, optimizer, 7)
    summary = lisa.summarize()
    assert 0.95 < summary["moved_share"] <= 1
    share = f"{100 * lisa.moved_share:.3g}"
    said = f"3 periods: drawn blocks moved ({share} % of their numbers), 4 others bit-identical"
    assert summary["proof"] == f"{said} in a moving sample"


def test_the_share_survives_a_resume(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=1e-3)
    lisa = LISA(untied_llama, optimizer, active=2, period=2)
    tiny.fit(untied_llama, optimizer, 4)
    saved = optimizer.state_dict()
    lisa.detach()
    again = torch.optim.AdamW(untied_llama.parameters(), lr=1e-3)
    resumed = LISA(untied_llama, again, active=2, period=2)
    again.load_state_dict(saved)
    assert resumed.moved_share == lisa.moved_share
    del saved["lisa"]["moved"]  # an older version saved none
    again.load_state_dict(saved)
    assert resumed.moved_share is None


def test_blocks_without_a_reason_to_move_are_not_counted(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters(), lr=0.0)
    lisa = LISA(untied_llama, optimizer, active=2, period=2)
    tiny.fit(untied_llama, optimizer, 4)
    assert lisa.moved_share is None


@pytest.mark.parametrize(("kahan_sum", "rounds"), [(None, False), (True, False), (False, True)])
def test_kahan_sums_keep_what_rounding_loses(kahan_sum: bool | None, rounds: bool) -> None:
    optimizer = torch.optim.SGD([{"params": [fill(4)], "kahan_sum": kahan_sum}], lr=1.0)
    assert rounds_to_nearest(optimizer) == rounds
