"""pytorch's own tests of AdamW, with `lisatune.AdamW` in its place.

    git clone --depth 1 --branch v2.13.0 https://github.com/pytorch/pytorch /tmp/pytorch
    .venv/bin/pip install expecttest
    PYTORCH_TESTS=/tmp/pytorch/test .venv/bin/python tests/oracles/pytorch_optim.py

The version is that of the installed torch. Further arguments go to pytest, whose exit code is the script's.
Without `PYTORCH_TESTS` the script says so and exits with 0.

pytorch keeps a table of its optimizers, and what each is tried with, in `torch.testing._internal`, a private
part of the installed torch. Here the entry of AdamW gets our class, and every test of `test_optim.py` that
the table makes for AdamW runs: steps on contiguous and on strided weights, param groups, states that are
saved, loaded, older or without tensors, copies, hooks, errors. Each input is tried with every way to store
moments. What our AdamW does not have is left out: `amsgrad`, `maximize`, `capturable`, complex weights, and
the switches `foreach`, `fused` and `differentiable`.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lisatune import AdamW

LACKING = {"amsgrad", "maximize", "capturable"}
MOMENTS = ("fp32", "bf16", "factored", *(["8bit"] if find_spec("bitsandbytes") else []))


def put_ours_into_the_table() -> None:
    """Replace the class in AdamW's entry, and what it is tried with."""
    from torch.testing._internal import common_optimizers as table

    number, theirs = next((i, each) for i, each in enumerate(table.optim_db) if each.name == "AdamW")

    def make_inputs(device: Any, dtype: Any = None) -> list[Any]:
        known = [each for each in theirs.optim_inputs_func(device, dtype) if not LACKING & each.kwargs.keys()]
        return [
            table.OptimizerInput(None, {**each.kwargs, "moments": moments}, f"{each.desc}, {moments}")
            for each in known
            for moments in MOMENTS
        ]

    def make_errors(device: Any, dtype: Any) -> list[Any]:
        errors = table.get_error_inputs_for_all_optims(device, dtype)
        return [each for each in errors if each.optimizer_error_input.params is not None]

    table.optim_db[number] = table.OptimizerInfo(
        AdamW,
        optim_inputs_func=make_inputs,
        optim_error_inputs_func=make_errors,
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )


def main(arguments: list[str]) -> int:
    """Run the tests, and return pytest's exit code."""
    folder = os.environ.get("PYTORCH_TESTS")
    if not folder or find_spec("expecttest") is None:
        print(
            "skipped: set PYTORCH_TESTS to the folder test/ of pytorch's sources, and pip install expecttest"
        )
        return 0
    file = Path(folder) / "test_optim.py"
    if not file.is_file():
        raise SystemExit(f"there is no {file}; set PYTORCH_TESTS to the folder test/ of pytorch's sources")
    put_ours_into_the_table()
    chosen = [
        "-k",
        "AdamW and not complex",
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        "-p",
        "no:cacheprovider",
    ]
    return int(pytest.main([str(file), *chosen, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
