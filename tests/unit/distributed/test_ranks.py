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
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(ValueError, match=rf"'cuda' cannot be used here \({reason}\)"):
        pick_device("cuda")


def test_cuda_with_a_torch_for_cpus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", fail)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match=r"run\.device 'cuda:0': this torch \(.+\) is built for CPUs alone"):
        pick_device("cuda:0")
