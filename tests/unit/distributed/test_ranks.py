"""Ranks hear of each other's failures, and a failure to begin is one sentence."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lisatune.distributed import ranks
from lisatune.distributed.ranks import pick_device
from rank_launcher import start, wait_for_all


def errors_of_two_ranks(folder: Path, act: Callable[[], object]) -> list[str]:
    """Call a function on two ranks; return what each printed, with its error as ASCII."""

    def rank() -> int:
        try:
            with ranks.process_group("cpu"):
                act()
        except (OSError, RuntimeError) as error:
            print(type(error).__name__, ascii(str(error)))
        return 0

    wait_for_all(start(2, rank, folder), folder, within=60)
    return [(folder / f"rank-{number}.log").read_text() for number in range(2)]


def test_a_part_that_the_first_rank_cannot_make_ends_the_others_too(tmp_path: Path) -> None:
    def make_parts() -> Iterator[object]:
        for number in range(3):
            if number == 1 and ranks.is_rank0():
                raise RuntimeError("no memory for part 1")
            yield ranks.gather_numbers([number, number])

    first, second = errors_of_two_ranks(tmp_path, lambda: ranks.consume_on_rank0(make_parts(), list))
    assert "RuntimeError 'no memory for part 1'" in first
    assert "rank 1 lost another rank" in second


def test_every_rank_hears_of_a_file_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    def fail() -> None:
        if ranks.rank() == 1:
            raise OSError("there is no caf\udce9.txt")

    first, second = errors_of_two_ranks(tmp_path, lambda: ranks.on_every_rank(fail))
    assert r"OSError 'rank 1: there is no caf\udce9.txt'" in first
    assert r"OSError 'there is no caf\udce9.txt'" in second


def test_ranks_without_a_number_are_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(RuntimeError, match="WORLD_SIZE is 2 and RANK is not set; start the ranks with"),
        ranks.process_group("cpu"),
    ):
        pass


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
