"""The ranks of a run: processes that a launcher such as `torchrun` started, one for each device.

Every function also works with one rank, without a process group. The functions that compare
or add up are collective: every rank must call them, in the same order. Numbers travel over gloo, on the CPU;
in a group that somebody else made for an accelerator alone, on that.
"""

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

__all__ = [
    "average_gradients",
    "broadcast_text",
    "check_equal",
    "consume_on_rank0",
    "count",
    "fake_ranks",
    "gather_numbers",
    "has_others",
    "is_rank0",
    "max_over_ranks",
    "name_kind",
    "on_every_rank",
    "on_rank0",
    "on_this_machine",
    "pick_device",
    "process_group",
    "rank",
    "ranks_are_fake",
    "sum_over_ranks",
]

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")


TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another one that is alive but silent. A rank that has died is noticed at once."""


Result = TypeVar("Result")


Part = TypeVar("Part")


def count() -> int:
    """Number of ranks."""
    is_on = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_on else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_rank0() -> bool:
    """Whether this rank is the one that writes and prints."""
    return rank() == 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the ranks that a launcher started; does nothing in a process that was started alone.

    Inside, the accelerator that the launcher assigned is torch's current one; ranks other than the first
    print nothing and show no warnings.

    Args:
        device: `run.device`.

    Raises:
        ValueError: a device's number, which would put all ranks onto one device.
        RuntimeError: another rank has gone, or the launcher did not say which rank this process is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and RANK is not set; start the ranks with torchrun, "
            "or unset WORLD_SIZE to run on one"
        )
    if ":" in device:
        raise ValueError(f"run.device {device} would put all ranks onto one device; leave out the number")
    accelerator = torch.accelerator.current_accelerator(check_available=True) if device != "cpu" else None
    backend = "gloo"
    if accelerator is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{accelerator.type}:{distributed.get_default_backend_for_device(accelerator)}"
    with _lost_rank(), _silent_unless_rank0(int(os.environ["RANK"])):
        distributed.init_process_group(backend, timeout=TIMEOUT)
        yield
    distributed.destroy_process_group()  # not after an error: it could wait for a rank that has gone


@contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `number` ranks. The others do not exist and send nothing.

    Tensors that ranks exchange have the right shape and no meaning. Only for planning.

    Raises:
        RuntimeError: there are real ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        raise RuntimeError("fake ranks are not possible in a process that has joined real ranks")
    distributed.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def ranks_are_fake() -> bool:
    """Whether the other ranks are those of `fake_ranks`."""
    return count() > 1 and distributed.get_backend() == "fake"


def has_others() -> bool:
    """Whether there are other ranks to exchange numbers with."""
    return count() > 1 and not ranks_are_fake()


def sum_over_ranks(*numbers: float) -> list[float]:
    """Add up numbers over all ranks, in float64."""
    if not has_others():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=_find_device())
    distributed.all_reduce(sums)
    return [float(each) for each in sums]


def max_over_ranks(number: int) -> int:
    """Return the largest of all ranks' numbers."""
    if not has_others():
        return number
    largest = torch.tensor(number, device=_find_device())
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over the ranks, in place.

    A rank without a gradient that another one has gets zeros for its own.

    Args:
        parameters: the same ones in the same order on every rank, each whole on every rank.
    """
    if not has_others() or not parameters:
        return
    number = count()
    has_one = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    has_one = has_one.to(parameters[0].device)
    distributed.all_reduce(has_one, distributed.ReduceOp.MAX)
    gradients = []
    for p, anybody in zip(parameters, has_one.tolist(), strict=True):
        if anybody:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(p.grad)
    pending = [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for gradient, work in zip(gradients, pending, strict=True):
        work.wait()
        gradient.div_(number)


def _find_device() -> torch.device:
    """Find where numbers can be exchanged."""
    if "cpu" in distributed.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def check_equal(what: str, value: object) -> None:
    """Compare `repr(value)` between the ranks.

    Raises:
        RuntimeError: the value differs; the message names the ranks that differ from rank 0.
    """
    if not has_others():
        return
    digest = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
    mine = torch.tensor([digest], device=_find_device())
    everyone = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(everyone, mine)
    others = [i for i, each in enumerate(everyone) if int(each) != int(everyone[0])]
    if others:
        raise RuntimeError(
            f"{what} differ between ranks: rank {', '.join(map(str, others))} not as rank 0, and "
            f"rank {rank()} has {value}; give every rank the same recipe, seed and checkpoint"
        )


def on_rank0(work: Callable[[], Result]) -> Result | None:
    """Do `work` on the first rank while the others wait; the others get None.

    Raises:
        RuntimeError: on the other ranks, if `work` failed on the first; OSError if its error was an OSError.
    """
    result, failure = None, None
    if is_rank0():
        try:
            result = work()
        except BaseException as error:
            failure = error
    outcome = max_over_ranks(0 if failure is None else 2 if isinstance(failure, OSError) else 1)
    if failure is not None:
        raise failure
    if outcome:
        raise (OSError if outcome == 2 else RuntimeError)("rank 0 failed; its own message says why")
    return result


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Do `work` on each rank at the same time.

    Raises:
        RuntimeError: on all ranks, if `work` failed on one, with its message; OSError if its error was one.
    """
    result, failure = None, None
    try:
        result = work()
    except BaseException as error:
        failure = error
    failed = max_over_ranks(-1 if failure is None else rank())
    if failed >= 0:
        kind = "" if failure is None else "OSError" if isinstance(failure, OSError) else "other"
        kind, _, reason = broadcast_text(f"{kind}:{failure}", source=failed).partition(":")
        if failure is not None:
            raise failure
        raise (OSError if kind == "OSError" else RuntimeError)(f"rank {failed}: {reason}")
    return cast(Result, result)


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Return the whole numbers of every rank, of which each has equally many."""
    if not (has_others() and numbers):
        return [list(numbers) for _ in range(count())]
    mine = torch.tensor(numbers, dtype=torch.int64, device=_find_device())
    everyone = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(everyone, mine)
    return [each.tolist() for each in everyone]


def broadcast_text(text: str, *, source: int = 0) -> str:
    """Return the text of a rank, the first one by default."""
    if not has_others():
        return text
    # A file's name that is not UTF-8 is in a text as lone surrogates.
    mine = list(text.encode(errors="surrogatepass")) if rank() == source else []
    size = max_over_ranks(len(mine))
    arrived = torch.tensor(mine or [0] * size, dtype=torch.uint8, device=_find_device())
    distributed.broadcast(arrived, src=source)
    return bytes(arrived.tolist()).decode(errors="surrogatepass")


def on_this_machine() -> int:
    """Number of ranks that share this machine's memory; all of them if the launcher does not say."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE") or count()), count())


def consume_on_rank0(parts: Iterator[Part], work: Callable[[Iterator[Part]], Result]) -> Result | None:
    """All ranks produce `parts` together; rank 0 consumes them with `work`. Other ranks return None.

    If `work` fails, rank 0 still takes the remaining parts, so that no rank waits for it. If a part cannot be
    made, its error is raised at once: the other ranks then lose this one.

    Raises:
        RuntimeError, OSError: as in `on_rank0`.
    """
    exhaust = deque[Part](maxlen=0).extend  # a loop's variable would hold a part while the next is made
    if not is_rank0():
        exhaust(parts)
        return on_rank0(lambda: None)
    are_made = False

    def make_parts() -> Iterator[Part]:
        nonlocal are_made
        yield from parts
        are_made = True

    made = make_parts()  # held, because an iterator that nobody holds would close `parts`
    result, failure = None, None
    try:
        try:
            result = work(made)
        finally:
            exhaust(made)
    except BaseException as error:
        if not are_made:  # the others are inside a part, and hear nothing but the end of this process
            raise
        failure = error

    def finish() -> Result | None:
        if failure is not None:
            raise failure
        return result

    return on_rank0(finish)


@contextmanager
def _silent_unless_rank0(number: int) -> Iterator[None]:
    if number == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _lost_rank() -> Iterator[None]:
    """Say in one sentence that another rank has gone."""
    try:
        yield
    except RuntimeError as error:
        is_network = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
        if not is_network:
            raise
        number = os.environ.get("RANK", "0")
        raise RuntimeError(
            f"rank {number} lost another rank and cannot continue alone; that rank's message, if it had time "
            "to print one, says why; continue from the last checkpoint with --resume"
        ) from error


def pick_device(name: str) -> torch.device:
    """Turn `auto` into the accelerator of this machine, or into the CPU if there is none.

    Raises:
        ValueError: no such device, or torch cannot use it on this machine.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    name_kind(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        if name.startswith("cuda") and not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            raise ValueError(
                f"run.device {name!r}: this torch ({torch.__version__}) is built for CPUs alone; install one "
                "with CUDA (https://pytorch.org/get-started), or use auto"
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"run.device {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device


def name_kind(name: str) -> str:
    """Return the kind of a device's name: `cuda` of `cuda:1`. This machine need not have it.

    Raises:
        ValueError: no such kind.
    """
    kind = name.partition(":")[0]
    if kind not in ("auto", *DEVICES):
        raise ValueError(f"unknown run.device {name!r}; use auto or one of {', '.join(DEVICES)}")
    return kind
