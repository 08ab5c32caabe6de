"""Learning rates by step: equal to the formulas, and to what transformers' users know by other names."""

import math
import warnings
from typing import Any

import pytest
import torch

from lisatune.recipe import OptimizerConfig
from lisatune.train.schedule import (
    count_warmup_steps,
    describe_schedule,
    lr_factor,
    make_scheduler,
    warn_of_long_warmup,
)


def factors(steps: int, **options: Any) -> list[float]:
    config = OptimizerConfig(**options)
    return [lr_factor(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("options", "falling"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 3 / 4, 1 / 2, 1 / 4]),
        ({"schedule": "linear", "min_lr_share": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ({"min_lr_share": 0.1}, [0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ({"schedule": "wsd", "decay_share": 0.5}, [1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "wsd"}, [1, 1, 1, 1 / 2]),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 2}, {"warmup_share": 0.3}])
def test_the_rate_rises_in_a_line_and_falls_as_the_schedule_says(
    options: dict[str, Any], falling: list[float], warmup: dict[str, Any]
) -> None:
    assert factors(6, **options, **warmup) == pytest.approx([0, 1 / 2, *falling])


def test_wsd_warms_up_from_where_it_falls_to() -> None:
    rates = factors(8, schedule="wsd", warmup_steps=2, min_lr_share=0.2, decay_share=0.25)
    assert rates == pytest.approx([0.2, 0.6, 1, 1, 1, 1, 1, 0.6])


def test_every_group_keeps_its_own_peak() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 5.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    config = OptimizerConfig(lr=1.0, schedule="linear", min_lr_share=0.5)
    scheduler = make_scheduler(config, optimizer, 2)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75, 3.75])


@pytest.mark.parametrize(
    ("share", "steps", "warmup"), [(0.03, 100, 3), (0.031, 100, 4), (0.9, 5, 4), (0.1, 1, 0)]
)
def test_a_share_of_warmup_is_rounded_up_and_leaves_a_step_at_the_peak(
    share: float, steps: int, warmup: int
) -> None:
    config = OptimizerConfig(warmup_share=share)
    assert count_warmup_steps(config, steps) == warmup
    warn_of_long_warmup(config, steps)  # no warning


def test_a_warmup_as_long_as_the_run_is_named() -> None:
    config = OptimizerConfig(warmup_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_warmup(config, 11)
    with pytest.warns(
        UserWarning, match=r"optimizer.warmup_steps=10 lasts as long as the whole run of 10 steps"
    ):
        warn_of_long_warmup(config, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_share": 1.0}, "optimizer.warmup_share must be >= 0 and below 1, got 1.0"),
        ({"warmup_share": -0.1}, "optimizer.warmup_share must be >= 0 and below 1, got -0.1"),
        ({"warmup_share": math.nan}, "optimizer.warmup_share must be >= 0 and below 1, got nan"),
        ({"min_lr_share": 1.5}, "optimizer.min_lr_share must be >= 0 and below 1, got 1.5"),
        (
            {"schedule": "wsd", "decay_share": 0.0},
            "optimizer.decay_share must be above 0 and at most 1, got 0.0",
        ),
        ({"warmup_share": 0.1, "warmup_steps": 5}, "warmup_steps=5 and optimizer.warmup_share=0.1 both say"),
        ({"schedule": "constant", "min_lr_share": 0.1}, "optimizer.min_lr_share=0.1 does nothing"),
        (
            {"decay_share": 0.1},
            "decay_share=0.1 belongs to optimizer.schedule=wsd, and the schedule is cosine",
        ),
        (
            {"schedule": "wsd", "warmup_share": 0.6, "decay_share": 0.5},
            "optimizer.warmup_share=0.6 and optimizer.decay_share=0.5 are more than the whole run together",
        ),
        ({"schedule": "wds"}, "optimizer.schedule must be one of constant, cosine, linear, wsd, got 'wds'"),
    ],
)
def test_what_makes_no_schedule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_a_schedule_is_described_in_words() -> None:
    assert describe_schedule(OptimizerConfig(), 100) == "cosine"
    config = OptimizerConfig(schedule="wsd", warmup_share=0.05, min_lr_share=0.1, decay_share=0.1)
    assert (
        describe_schedule(config, 100) == "wsd down to 0.1 of it over the last 10 steps after 5 warm-up steps"
    )
