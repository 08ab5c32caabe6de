"""Picking a device: a failure is one sentence, also if torch's error has no message."""

import pytest
import torch

from lisatune.distributed.ranks import pick_device


@pytest.mark.parametrize(("message", "reason"), [("", "RuntimeError"), ("no driver\nlong text", "no driver")])
def test_device_that_fails_is_refused_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, message: str, reason: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ValueError, match=rf"'cuda' cannot be used here \({reason}\)"):
        pick_device("cuda")
