"""What every test gets: one thread, no hub, random numbers that neither leak in nor out."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, whose sums must be ours to the bit
if "PYTEST_XDIST_WORKER" not in os.environ:  # one cache of prepared tokens for all processes of a session
    os.environ["LISATUNE_TOKENS"] = tempfile.mkdtemp(prefix="lisatune-tokens-")

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

os.fsync = lambda fd: None  # no test cuts the power, and test_train.py alone would sync 2,463 times

# A job that a shell started in the background inherits a Ctrl-C that is ignored; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Delete the cache of the session."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["LISATUNE_TOKENS"], ignore_errors=True)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Import torch where tests are collected: not in the process that only hands them out."""
    if not isinstance(collector, pytest.Session):
        return
    gc.disable()  # imports make a million objects and no garbage
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, where triton is installed


def pytest_collection_finish() -> None:
    """Leave what was imported out of every garbage collection, and look through the rest less often.

    Each full collection takes 0.1 s, because tests import more. By default there is one for every few tests.
    """
    gc.freeze()
    gc.set_threshold(20_000, 5, 5)
    gc.enable()


@pytest.hookimpl(trylast=True)  # after fixtures have let go of it
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Free the real model, which a LISA and its optimizer hold in a circle."""
    if item.get_closest_marker("smollm2"):
        gc.collect()


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    import torch

    # torch.manual_seed also notes for a CUDA that may come who asked it, which takes 0.7 ms in a test.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    with torch.random.fork_rng(devices=[]):
        seed(0)
        yield


@pytest.fixture
def untied_llama() -> "LlamaForCausalLM":
    """6 blocks, hidden size 32, vocabulary 128."""
    import tiny

    return tiny.llama(tied=False)


@pytest.fixture
def tied_llama() -> "LlamaForCausalLM":
    """6 blocks, hidden size 32, vocabulary 128, embedding and head are one parameter."""
    import tiny

    return tiny.llama(tied=True)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tiny_llama(request: pytest.FixtureRequest) -> "LlamaForCausalLM":
    """Either of the two."""
    import tiny

    return tiny.llama(tied=request.param)
